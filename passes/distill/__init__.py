"""A short distillation against the dense model, masks held."""

from mpcompile.passes.distill.distill import Distill

__all__ = ["Distill"]
