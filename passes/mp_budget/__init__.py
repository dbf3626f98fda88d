"""The Marchenko–Pastur budget: a spectrum and a pattern for each layer."""

from mpcompile.passes.mp_budget.mp_budget import MPBudget

__all__ = ["MPBudget"]
