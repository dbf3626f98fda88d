"""A short training without labels that spends given minutes: learning rate by a probe, the best weights kept."""

from mpcompile.passes.polish.polish import Polish

__all__ = ["Polish"]
