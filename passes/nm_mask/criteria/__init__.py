"""The mask criteria, one file each. CRITERIA is the one table of their names.

The values of `criterion` in a recipe, their checks and their error texts come from this table. A new criterion is a new
file in this folder and one row here (docs/writing-a-pass.md).
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpcompile.passes.nm_mask.criteria.covariance import covariance
from mpcompile.passes.nm_mask.criteria.joint import joint
from mpcompile.passes.nm_mask.criteria.magnitude import magnitude
from mpcompile.passes.nm_mask.criteria.wanda import wanda
from mpcompile.passes.nm_mask.criterion import Criterion

CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "magnitude": Criterion(magnitude, needs_images=False),
        "wanda": Criterion(wanda),
        "covariance": Criterion(covariance, uses_prior=True),
        "joint": Criterion(joint, needs_refit=True),
    }
)
DEFAULT = "joint"  # with calibration images and a refit
DEFAULT_WITHOUT_REFIT = "magnitude"
