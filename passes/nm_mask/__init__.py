"""N:M masks: criteria that select the kept weights, and the pass that applies them and refits the kept weights."""

from mpcompile.passes.nm_mask.nm_mask import NMMask

__all__ = ["NMMask"]
