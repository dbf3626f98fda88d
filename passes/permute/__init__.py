"""Channels reordered so that a pattern keeps more, folded into the weights around them."""

from mpcompile.passes.permute.permute import Permute

__all__ = ["Permute"]
