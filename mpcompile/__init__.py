"""mpcompile: compress a trained PyTorch vision model, ship it, and show the evidence.

    import mpcompile
    from mpcompile.passes import MPBudget, NMMask, Permute

    passes = [MPBudget(), Permute(), NMMask()]
    artifact = mpcompile.compile(module, mpcompile.Recipe(), passes=passes, data="images/", output="out/")
    logits = artifact.load("onnx")(images)

Errors are in mpcompile.errors, passes in mpcompile.passes, runtimes in mpcompile.runtimes, and what checks a pass of
your own in mpcompile.testing. Importing this loads no runtime (onnxruntime, TensorRT) and does not touch CUDA.
"""

from mpcompile.data.images import Data
from mpcompile.data.load_data import load_data
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.compile import compile
from mpcompile.errors import MpcompileError
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Loaded, Request, load
from mpcompile.ir.model import LayerPlan, Model, Source
from mpcompile.ir.pattern import NM
from mpcompile.ir.results import Spectrum
from mpcompile.pipeline.pass_manager import Effect, Pass, PassManager, PassRecord
from mpcompile.recipe.schema import Recipe, Step, read_recipe
from mpcompile.report.schema import Report
from mpcompile.system.moved_modules import install_moved_modules
from mpcompile.system.progress import Progress, tracked

install_moved_modules()

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
