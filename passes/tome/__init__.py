"""Token merging: the pass ToMe, its graph rewrite, its schedules, and the search for one."""

from mpcompile.passes.tome.tome import ToMe

__all__ = ["ToMe"]
