"""A recipe as YAML with a comment on each key and each parameter of the built-in passes."""

from mpcompile.driver.run_plan import PASSES, RUNTIMES, Known, recipe_schema
from mpcompile.recipe.commented_yaml import commented_yaml
from mpcompile.recipe.schema import Recipe


def commented(recipe: Recipe, title: str = "") -> str:
    """The recipe as YAML, which reads back as an equal recipe. Passes of other packages have no comments.

    The comments are the descriptions of the JSON Schema that `mpcompile schema` prints.
    """
    return commented_yaml(recipe, recipe_schema(Known(PASSES, RUNTIMES, {}, ())), title)
