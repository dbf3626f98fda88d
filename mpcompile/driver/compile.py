"""The front door: model + recipe -> Artifact."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpcompile.data.images import Data
from mpcompile.driver.artifact import PASSES, Artifact
from mpcompile.driver.build_artifact import produced
from mpcompile.driver.inputs import data_for, decoded_for, loaded_from, path_of
from mpcompile.driver.plugins import GIVEN
from mpcompile.driver.run_plan import RunPlan, plan_of
from mpcompile.driver.tune import tuned
from mpcompile.errors import AccuracyError, UsageError
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request
from mpcompile.ir.pattern import NM
from mpcompile.passes import Distill, NMMask
from mpcompile.pipeline.checkpoints import Checkpoints
from mpcompile.pipeline.fingerprint import facts_of
from mpcompile.pipeline.partial_results import keeping
from mpcompile.pipeline.pass_manager import Effect, Observer, Pass, PassManager
from mpcompile.pipeline.run_folder import note_written, working, written_by
from mpcompile.recipe.schema import Recipe
from mpcompile.runtimes import Runtime
from mpcompile.system.atomic_folder import require_writable, written_atomically
from mpcompile.system.distributed import process_rank
from mpcompile.system.progress import Progress, stage_progress
from mpcompile.system.resource_errors import as_resource_errors

ONE_RUN = threading.RLock()


def compile(
    model: str | Path | nn.Module | Request,
    recipe: Recipe,
    *,
    passes: Sequence[Pass] | None = None,
    runtime: Runtime | None = None,
    data: str | Path | Data | None = None,
    output: str | Path,
    force: bool = False,
    start: str | None = None,
    keep_passes: bool = False,
    observe: Callable[[Progress], None] | None = None,
) -> Artifact:
    """The compressed model, its files and its report, in the folder `output`.

    The folder appears whole or not at all; the model given is left as it was. What passes finish is kept beside it
    until then, and a run that follows one that was stopped goes on after them. `start` names the pass to start from, if
    those before it are there; `keep_passes` keeps them all in the folder.

    `passes` are those to run, in order, where the recipe names none: built-in ones or your own, which are written into
    the recipe with every field. With `runtime` the result runs on that in place of the recipe's target. `observe` is
    called in this thread as each stage begins, and each step of a pass; what it raises ends the run (out of a step as
    the cause of a PassError).

    One run at a time: what other threads compile meanwhile waits, since all runs measure speed and torch's exporter is
    not made for threads. Raises a MpcompileError. Where only a gate of the recipe fails, the folder is written, its
    report says so, and AccuracyError is raised: `Artifact.open(output)` has it then.
    """
    plan = plan_of(recipe, passes, runtime)
    with ONE_RUN, stage_progress(observe, stages(plan.recipe)) as tell:
        return _compiled(model, plan, data, Path(output), force, start, keep_passes, tell)


def _compiled(
    model: str | Path | nn.Module | Request,
    plan: RunPlan,
    data: str | Path | Data | None,
    output: Path,
    force: bool,
    start: str | None,
    keep_passes: bool,
    observe: Observer,
) -> Artifact:
    """`compile`, for the one thread that may."""
    recipe = plan.recipe
    _require_tunable(plan)
    inputs = [path for path in map(path_of, (model, data)) if path is not None]
    ended = written_by(output) if start is None else None
    if ended is None:
        require_writable(output, force, inputs)
    if recipe.gates.max_drop is not None and data is None:
        raise UsageError("a gate on accuracy (--max-drop) needs labelled images (--data)")
    stage = "load"

    def began(name: str) -> None:
        nonlocal stage
        stage = name
        observe(name)

    needed_bytes = 0
    short_of = partial(as_resource_errors, lambda: stage, output, lambda: needed_bytes)
    with working(output) as work, short_of():
        began("load")
        loaded, leaves = loaded_from(model)
        needed_bytes = output_bytes(loaded.module)
        began("capture")
        dense = capture(loaded.module, loaded.source, leaves=leaves)
        images = data_for(data, dense, recipe.data)
        if recipe.gates.max_drop is not None and not images.held_out.labelled:
            raise UsageError(f"a gate on accuracy (--max-drop) needs labelled images; {'; '.join(images.notes)}")
        images = decoded_for(images, dense, needed_bytes)
        tuning = None
        if recipe.tune is not None:
            began("tune")
            recipe, tuning = tuned(recipe, dense, images)
            plan = plan_of(recipe)
        facts = facts_of(dense, images, plan.passes, PassManager(plan.passes).shows_held_out)
        whole = facts[-1] | {"the recipe": recipe.sha256, "what is kept": str(keep_passes)}
        if ended == whole:  # killed when all was written, and only the work folder was left to remove
            for step in plan.passes:
                _skip(step)
            artifact = Artifact.open(output)
        else:
            if ended is not None:
                require_writable(output, force, inputs)
            checkpoints = Checkpoints(work, plan.passes, facts, needed_bytes, _skip)
            checkpoints.resume(start, output / PASSES)
            with (
                written_atomically(output, force, inputs) as folder,
                short_of(),  # here too, while what fills the disk is still there
                keeping(work, needed_bytes),
            ):
                report = produced(loaded, dense, plan, images, folder, began, tuning, checkpoints, keep_passes)
                note_written(work, folder, whole)
            artifact = Artifact(output, report)
    failed = [gate for gate in artifact.report.gates if not gate.holds]
    if failed:
        raise AccuracyError(f"{output} is written, and fails its gate: {'; '.join(map(str, failed))}")
    return artifact


def _require_tunable(plan: RunPlan) -> None:
    """Raises UsageError where the recipe asks for a search that cannot be made."""
    if plan.recipe.tune is None:
        return
    if plan.recipe.gates.max_drop is None:
        raise UsageError("tune needs a limit on the loss of accuracy; give --max-drop (gates.max_drop)")
    if process_rank().size > 1:
        raise UsageError("tune runs in one process; start it without torchrun, then train the recipe that it finds")
    if own := [what for what, origin in plan.origins.items() if origin.endswith(GIVEN)]:
        raise UsageError(f"tune tries recipes, which know no {own[0]} that is {GIVEN}; install it with an entry point")


def output_bytes(module: nn.Module) -> int:
    """About how large an output is: the weights as they are, in three ONNX files, and a byte for each mask's place."""
    tensors: list[Tensor] = list(module.state_dict().values())
    return sum(value.numel() * (4 * value.element_size() + 1) for value in tensors) + 2**20


def _skip(step: Pass) -> None:
    """Tells the processes beside this one of a pass that is taken from a checkpoint."""
    if isinstance(step, Distill):
        step.skip()


def follow(model: str | Path | nn.Module | Request, recipe: Recipe, data: str | Path | Data | None = None) -> None:
    """What a process does that torchrun started beside the first: trains along in each distillation, writes nothing.

    The first process calls `compile` with the same arguments. Raises a MpcompileError.
    """
    plan = plan_of(recipe)
    loaded, leaves = loaded_from(model)
    dense = capture(loaded.module, loaded.source, leaves=leaves)
    images = data_for(data, dense, recipe.data)
    for step in plan.passes:
        if isinstance(step, Distill):
            step.follow(images, dense.source)


def stages(recipe: Recipe) -> tuple[str, ...]:
    """The names of the stages that `compile` tells, in order."""
    passes = tuple(step.name for step in recipe.passes)
    tune = () if recipe.tune is None else ("tune",)
    return (
        "load",
        "capture",
        *tune,
        "export dense",
        *passes,
        "export compressed",
        "build",
        "evaluate",
        "time",
        "write",
    )


def preview(
    model: str | Path | nn.Module | Request, recipe: Recipe, data: str | Path | Data | None = None
) -> dict[str, Any]:
    """What `compile` would do, without doing it: resolved recipe, stages, each layer's pattern or reason.

    Passes that only analyse are run, since they decide; of the others the first mask pass is asked.
    """
    plan = plan_of(recipe)
    loaded, leaves = loaded_from(model)
    dense = capture(loaded.module, loaded.source, leaves=leaves)
    images = data_for(data, dense, recipe.data)
    analyses = [step for step in plan.passes if step.effect is Effect.ANALYSIS]
    planned, _ = PassManager(analyses).run(dense, images.for_passes())
    rows = [
        {
            "layer": name,
            "pattern": str(choice) if isinstance(choice, NM) else None,
            "reason": choice if isinstance(choice, str) else None,
        }
        for step in plan.passes
        if isinstance(step, NMMask)
        for name, choice in step.choices(planned).items()
    ]
    return {
        "model": dataclasses.asdict(loaded.source),
        "recipe": recipe.model_dump(mode="json"),
        "stages": stages(recipe),
        "layers": rows,
    }
