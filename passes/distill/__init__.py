"""Short distillation from the dense model, with masks held."""

from mpcompile.passes.distill.distill import Distill

__all__ = ["Distill"]
