"""`follow`: what a rank of torchrun above 0 does while rank 0 compiles."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.driver.compile import output_bytes
from mpcompile.driver.inputs import decoded_for, loaded_from
from mpcompile.driver.part import judged_run
from mpcompile.driver.run_plan import plan_of
from mpcompile.frontend.load_model import Request
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.pipeline.ranks import begin_together
from mpcompile.pipeline.run_folder import work_folder
from mpcompile.recipe.schema import Recipe
from mpcompile.system.memory import memory_limit
from mpcompile.system.resource_errors import as_resource_errors


def follow(
    model: str | Path | nn.Module | Request,
    recipe: Recipe,
    data: Any = None,
    output: Path | None = None,
    memory_bytes: int | None = None,
) -> None:
    """Runs a torchrun rank above 0: it takes part in the passes, and writes no files of the output.

    Rank 0 calls `compile` with the same arguments. Activations beyond `memory_bytes` go to files beside `output`, or to
    the system's folder for temporary files. Raises a MpcompileError.
    """
    plan = plan_of(recipe)
    loaded, request = loaded_from(model)
    dense, images = judged_run(loaded, request, data, recipe)
    if not begin_together(dense, images):
        return
    folder = None if output is None else work_folder(output)
    stage = "decode"

    def began(name: str) -> None:
        nonlocal stage
        stage = name

    with (
        memory_limit(memory_bytes, folder),
        as_resource_errors(lambda: stage, folder or Path(tempfile.gettempdir()), lambda: None),
    ):
        images = decoded_for(images, dense, output_bytes(loaded.module))
        PassManager(plan.passes).run(dense, images, began, device=plan.device, ranks=True)
