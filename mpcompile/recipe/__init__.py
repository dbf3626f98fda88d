"""The recipe: its schema, its YAML text, and the command-line options that override it."""

from mpcompile.recipe.schema import BenchOptions, DataChoice, Gates, Recipe, Step, read_recipe
from mpcompile.system.moved_modules import renamed_names

__all__ = ["BenchOptions", "DataChoice", "Gates", "Recipe", "Step", "read_recipe"]

__getattr__ = renamed_names(__name__, {"Bench": "BenchOptions"})
