"""mpcompile: compress a trained PyTorch vision model, ship it, and show the evidence.

    import mpcompile
    recipe = mpcompile.Recipe(passes=("mp-budget", "permute", "nm-mask"))
    artifact = mpcompile.compile(module, recipe, data="images/", output="out/")

Importing this loads no runtime (onnxruntime, TensorRT) and does not touch CUDA.
"""

from mpcompile.artifact import Artifact
from mpcompile.capture import capture
from mpcompile.compile import compile
from mpcompile.data import Data, load_data
from mpcompile.errors import MpcompileError
from mpcompile.load import Loaded, Request, load
from mpcompile.lower import Lowered, lower
from mpcompile.model import NM, LayerPlan, Model, Source, Spectrum
from mpcompile.pipeline import Effect, Pass, PassManager, PassRecord
from mpcompile.recipe import Recipe, read_recipe
from mpcompile.report import Report

__all__ = [
    "NM",
    "Artifact",
    "Data",
    "Effect",
    "LayerPlan",
    "Loaded",
    "Lowered",
    "Model",
    "MpcompileError",
    "Pass",
    "PassManager",
    "PassRecord",
    "Recipe",
    "Report",
    "Request",
    "Source",
    "Spectrum",
    "capture",
    "compile",
    "load",
    "load_data",
    "lower",
    "read_recipe",
]
