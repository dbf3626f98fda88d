"""mpcompile: compress a trained PyTorch vision model, ship it, and show the evidence.

    import mpcompile
    from mpcompile.passes import MPBudget, NMMask, Permute

    passes = [MPBudget(), Permute(), NMMask()]
    artifact = mpcompile.compile(module, mpcompile.Recipe(), passes=passes, data="images/", output="out/")
    logits = artifact.load("onnx")(images)

Errors are in mpcompile.errors, passes in mpcompile.passes, runtimes in mpcompile.runtimes, and what checks a pass of
your own in mpcompile.testing. Importing this loads no runtime (onnxruntime, TensorRT) and does not touch CUDA.
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
from mpcompile.progress import Progress, tracked
from mpcompile.recipe import Recipe, Step, read_recipe
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
    "Progress",
    "Recipe",
    "Report",
    "Request",
    "Source",
    "Spectrum",
    "Step",
    "capture",
    "compile",
    "load",
    "load_data",
    "lower",
    "read_recipe",
    "tracked",
]
