"""The recipe: its schema, strict YAML, and options of the command line laid over it."""

from mpcompile.recipe.schema import BenchOptions, DataChoice, Gates, Recipe, Step, read_recipe
from mpcompile.system.moved_modules import renamed_names

__all__ = ["BenchOptions", "DataChoice", "Gates", "Recipe", "Step", "read_recipe"]

__getattr__ = renamed_names(__name__, {"Bench": "BenchOptions"})
