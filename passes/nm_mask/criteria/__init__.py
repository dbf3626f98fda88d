"""The mask criteria, one file each. CRITERIA is the one table of their names.

The values of `criterion` in a recipe, their checks and their error texts come from this table. A new criterion is a new
file in this folder and one row here (docs/writing-a-pass.md).
"""

from collections.abc import Mapping
from types import MappingProxyType

from mpcompile.passes.nm_mask.criteria.covariance import covariance_mask
from mpcompile.passes.nm_mask.criteria.joint import joint_mask
from mpcompile.passes.nm_mask.criteria.magnitude import magnitude_mask
from mpcompile.passes.nm_mask.criteria.wanda import wanda_mask
from mpcompile.passes.nm_mask.criterion import Criterion

CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "magnitude": Criterion(magnitude_mask, needs_images=False),
        "wanda": Criterion(wanda_mask),
        "covariance": Criterion(covariance_mask, uses_prior=True),
        "joint": Criterion(joint_mask, needs_refit=True),
    }
)
DEFAULT = "joint"  # with calibration images and a refit
DEFAULT_WITHOUT_REFIT = "magnitude"
