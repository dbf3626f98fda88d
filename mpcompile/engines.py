"""How a recipe makes an ONNX file and an engine of a model: in the search over recipes as in what is shipped."""

from collections.abc import Mapping
from pathlib import Path

from mpcompile.lower import Lowered, lower
from mpcompile.model import Model
from mpcompile.recipe import Recipe
from mpcompile.resolve import Plan
from mpcompile.runtimes import Build, Engine
from mpcompile.runtimes.ort import cpu_engine


def lowered(recipe: Recipe, model: Model, path: Path, metadata: Mapping[str, str] | None = None) -> Lowered:
    """The model as an ONNX file in the recipe's precision, batch and opset. Raises BuildError or MaskError."""
    return lower(model, path, precision=recipe.precision, batch=recipe.batch, opset=recipe.opset, metadata=metadata)


def build_of(recipe: Recipe, folder: Path) -> Build:
    """How the recipe's engines are built; what they need beside the file goes into `folder`."""
    return Build(threads=recipe.bench.threads, batches=recipe.timed_batches, folder=folder)


def engine_of(plan: Plan, exported: Lowered, build: Build) -> Engine:
    """The target's engine; what runs nowhere here is judged by what runs the same file. Raises BuildError."""
    return cpu_engine(exported) if plan.idle else plan.runtime.build(exported, build)
