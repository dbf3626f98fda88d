"""N:M masks and the refit of what they keep."""

from mpcompile.passes.nm_mask.nm_mask import NMMask

__all__ = ["NMMask"]
