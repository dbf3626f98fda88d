"""The passes, one transformation per file or folder. PASSES is the one table of the names that recipes may use."""

from collections.abc import Mapping
from types import MappingProxyType

if __name__ == "passes":  # this import would work in the repository root, and define every class twice
    raise ImportError("import mpcompile.passes, not passes")

from mpcompile.passes.batch_norm import BatchNorm
from mpcompile.passes.certify import Certify
from mpcompile.passes.confidence.confidence import Confidence
from mpcompile.passes.distill.distill import Distill
from mpcompile.passes.mp_budget.mp_budget import MPBudget
from mpcompile.passes.nm_mask.nm_mask import NMMask
from mpcompile.passes.permute.permute import Permute
from mpcompile.passes.polish.polish import Polish
from mpcompile.passes.quantize.quantize import Quantize
from mpcompile.passes.quantize.scale_migration import ScaleMigration
from mpcompile.passes.restore import Restore
from mpcompile.passes.tome.tome import ToMe
from mpcompile.passes.unread_tokens.drop_unread_tokens import DropUnreadTokens
from mpcompile.pipeline.pass_manager import Pass

PASSES: Mapping[str, type[Pass]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            MPBudget,
            DropUnreadTokens,
            Permute,
            NMMask,
            ToMe,
            BatchNorm,
            Restore,
            Distill,
            Polish,
            Confidence,
            ScaleMigration,
            Quantize,
            Certify,
        )
    }
)

__all__ = [
    "PASSES",
    "BatchNorm",
    "Certify",
    "Confidence",
    "Distill",
    "DropUnreadTokens",
    "MPBudget",
    "NMMask",
    "Permute",
    "Polish",
    "Quantize",
    "Restore",
    "ScaleMigration",
    "ToMe",
]
