"""Channel reordering, folded into the weights, so that an N:M pattern keeps more of them."""

from mpcompile.passes.permute.permute import Permute

__all__ = ["Permute"]
