"""Token merging written into the graph."""

from mpcompile.passes.tome.tome import ToMe

__all__ = ["ToMe"]
