"""mpcompile compresses trained PyTorch vision models to N:M sparsity and measures the result.

    import mpcompile
    from mpcompile.passes import MPBudget, NMMask, Permute

    passes = [MPBudget(), Permute(), NMMask()]
    artifact = mpcompile.compile(module, mpcompile.Recipe(), passes=passes, data="images/", output="out/")
    logits = artifact.load("onnx")(images)

`mpcompile.errors` holds the errors, `mpcompile.passes` the passes and `mpcompile.runtimes` the runtimes.
`mpcompile.testing` checks a pass or a runtime of your own. `import mpcompile` is cheap: torch is imported when a name
is first used, and a runtime (onnxruntime, TensorRT) or CUDA only when a model is built or run.
"""

from typing import TYPE_CHECKING

from mpcompile.system.lazy_imports import lazy_names
from mpcompile.system.moved_modules import install_moved_modules

if TYPE_CHECKING:  # for type checkers and editors; the table below imports the same names on first use
    from mpcompile.data.images import Data
    from mpcompile.data.loading import load_data
    from mpcompile.driver.artifact import Artifact
    from mpcompile.driver.compile import compile
    from mpcompile.errors import MpcompileError
    from mpcompile.export.onnx_export import Lowered, lower
    from mpcompile.frontend.capture import capture
    from mpcompile.frontend.load_model import Loaded, Request, load
    from mpcompile.ir.model import LayerPlan, Model
    from mpcompile.ir.pattern import NM
    from mpcompile.ir.results import Spectrum
    from mpcompile.ir.source import Source
    from mpcompile.pipeline.pass_manager import Pass, PassManager
    from mpcompile.pipeline.pass_record import Effect, PassRecord
    from mpcompile.recipe.schema import Recipe, Step, read_recipe
    from mpcompile.report.schema import Report
    from mpcompile.system.progress import Progress, tracked
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "mpcompile.data.images": ("Data",),
            "mpcompile.data.loading": ("load_data",),
            "mpcompile.driver.artifact": ("Artifact",),
            "mpcompile.driver.compile": ("compile",),
            "mpcompile.errors": ("MpcompileError",),
            "mpcompile.export.onnx_export": ("Lowered", "lower"),
            "mpcompile.frontend.capture": ("capture",),
            "mpcompile.frontend.load_model": ("Loaded", "Request", "load"),
            "mpcompile.ir.model": ("LayerPlan", "Model"),
            "mpcompile.ir.pattern": ("NM",),
            "mpcompile.ir.results": ("Spectrum",),
            "mpcompile.ir.source": ("Source",),
            "mpcompile.pipeline.pass_manager": ("Pass", "PassManager"),
            "mpcompile.pipeline.pass_record": ("Effect", "PassRecord"),
            "mpcompile.recipe.schema": ("Recipe", "Step", "read_recipe"),
            "mpcompile.report.schema": ("Report",),
            "mpcompile.system.progress": ("Progress", "tracked"),
        },
        submodules=(
            "analysis", "data", "driver", "errors", "export", "frontend", "ir", "measure", "passes", "pipeline",
            "recipe", "report", "runtimes", "system",
        ),
    )  # fmt: skip

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
