"""The Marchenko–Pastur budget: fits each layer's spectrum and plans a pattern for each layer."""

from mpcompile.passes.mp_budget.mp_budget import MPBudget

__all__ = ["MPBudget"]
