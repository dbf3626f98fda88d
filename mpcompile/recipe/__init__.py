"""The recipe: its schema, strict YAML, and options of the command line laid over it."""

from mpcompile.recipe.schema import Bench, DataChoice, Gates, Recipe, Step, read_recipe

__all__ = ["Bench", "DataChoice", "Gates", "Recipe", "Step", "read_recipe"]
