"""`compile`: runs a recipe on a model and writes the output folder."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpcompile.analysis.eligibility import eligible_patterns, tied_layers
from mpcompile.driver.artifact import PASSES, Artifact
from mpcompile.driver.build_artifact import QUANTIZE_DENSE, build_artifact
from mpcompile.driver.inputs import decoded_for, headed, judged, loaded_from, metric_of, path_of
from mpcompile.driver.memory_forecast import memory_forecast
from mpcompile.driver.part import PART_HEAD, captured_run, judged_run
from mpcompile.driver.preflight import require_consistent, require_inputs, require_space
from mpcompile.driver.quantized_baselines import writes_dense
from mpcompile.driver.run_plan import RunPlan, plan_of
from mpcompile.driver.tune import search_recipe
from mpcompile.errors import AccuracyError
from mpcompile.frontend.load_model import Request
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask, Quantize
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.pipeline.checkpoints import Checkpoints
from mpcompile.pipeline.fingerprint import facts_of
from mpcompile.pipeline.partial_results import keeping
from mpcompile.pipeline.pass_manager import Observer, Pass, PassManager
from mpcompile.pipeline.pass_record import Effect
from mpcompile.pipeline.ranks import begin_together
from mpcompile.pipeline.run_folder import note_written, work_folder, working, written_by
from mpcompile.recipe.schema import Recipe
from mpcompile.runtimes import Runtime
from mpcompile.system.atomic_folder import require_writable, written_atomically
from mpcompile.system.memory import memory_limit
from mpcompile.system.progress import Progress, stage_progress
from mpcompile.system.resource_errors import as_resource_errors

ONE_RUN = threading.RLock()


def compile(
    model: str | Path | nn.Module | Request,
    recipe: Recipe,
    *,
    passes: Sequence[Pass] | None = None,
    runtime: Runtime | None = None,
    data: Any = None,
    output: str | Path,
    force: bool = False,
    start: str | None = None,
    keep_passes: bool = False,
    observe: Callable[[Progress], None] | None = None,
    metric: Callable[[Tensor, Any], Any] | None = None,
    command_line: Sequence[str] | None = None,
    memory_bytes: int | None = None,
) -> Artifact:
    """Compresses a model and returns the artifact in the folder `output`. The given model is not changed.

    The folder is written atomically: it is complete or absent. Until then the results of finished passes are kept
    beside it as checkpoints; if the run is interrupted, the next run with the same arguments continues after them.

    Args:
        model: a file, a name, a module, or a `Request`.
        recipe: passes, target, precision, gates.
        passes: the passes to run, in order, if the recipe names none: built-in ones or your own. They are recorded in
            the recipe with every field.
        runtime: runs the result in place of the recipe's target.
        data: a folder of images, an .npz file, `Data`, samples `(inputs, target)`, or `pkg.mod:fn`, a function that
            returns them (mpcompile/data/given.py).
        output: the folder to write.
        force: replace an output folder of an earlier run.
        start: the name of the pass to start from; needs a checkpoint of the pass before it.
        keep_passes: keep the checkpoints of all passes in the output folder.
        observe: called in this thread as each stage and each step of a pass begins. An exception that it raises ends
            the run; raised during a step it is the cause of a PassError.
        metric: a function of outputs and targets that replaces accuracy (mpcompile/data/metric.py), in place of the one
            that the recipe names.
        command_line: the words of the command that started the run, for the report.
        memory_bytes: how much memory the process may use. What passes keep beyond it goes to files in the work folder,
            and the result is the same. None: three quarters of what is free.

    Calls from several threads run one after another, because every run measures speed and torch's exporter is not
    thread-safe.

    Raises a MpcompileError. If only an accuracy gate of the recipe fails, AccuracyError is raised after the folder was
    written: `Artifact.open(output)` returns it, and its report has the failed gate.
    """
    plan = plan_of(recipe, passes, runtime)
    with (
        ONE_RUN,
        memory_limit(memory_bytes, work_folder(Path(output))),
        stage_progress(observe, stages(plan.recipe, writes_dense(plan))) as begin_stage,
    ):
        return _compiled(model, plan, data, Path(output), force, start, keep_passes, begin_stage, metric, command_line)


def _compiled(
    model: str | Path | nn.Module | Request,
    plan: RunPlan,
    data: Any,
    output: Path,
    force: bool,
    start: str | None,
    keep_passes: bool,
    observe: Observer,
    given_metric: Callable[[Tensor, Any], Any] | None = None,
    command_line: Sequence[str] | None = None,
) -> Artifact:
    """The artifact of a plan; the caller holds ONE_RUN."""
    recipe = plan.recipe
    require_consistent(plan, data is not None)
    metric = metric_of(recipe, given_metric)
    inputs = [path for path in map(path_of, (model, data)) if path is not None]
    written = written_by(output) if start is None else None
    if written is None:
        require_writable(output, force, inputs)
    stage = "load"

    def began(name: str) -> None:
        nonlocal stage
        stage = name
        observe(name)

    needed_bytes = 0
    explain_shortage = partial(as_resource_errors, lambda: stage, output, lambda: needed_bytes)
    with working(output) as work, explain_shortage():
        began("load")
        loaded, request = loaded_from(model)
        needed_bytes = output_bytes(loaded.module)
        require_space(output, least_output_bytes(loaded.module))
        began("capture")
        dense, images, part = captured_run(loaded, request, data, recipe.data, recipe.head, recipe.submodule)
        if part is None:
            images = judged(images, metric)
        else:
            part = part.judged_by(metric)
        require_inputs(plan, dense, images)
        dense, images = headed(dense, decoded_for(images, dense, needed_bytes), PART_HEAD if part else recipe.head)
        searched = None
        if recipe.tune is not None:
            began("tune")
            searched = search_recipe(recipe, dense, images)
            recipe = searched.recipe
            plan = plan_of(recipe)
        facts = facts_of(dense, images, plan.passes, PassManager(plan.passes).shows_held_out)
        whole = facts[-1] | {"the recipe": recipe.sha256, "what is kept": str(keep_passes)}
        if written == whole:  # the earlier run was killed after writing everything but before removing its work folder
            begin_together(None, images)
            artifact = Artifact.open(output)
        else:
            if written is not None:
                require_writable(output, force, inputs)
            checkpoints = Checkpoints(work, plan.passes, facts, needed_bytes)
            checkpoints.resume(start, output / PASSES)
            with (
                written_atomically(output, force, inputs) as folder,
                explain_shortage(),  # also inside, where the partial output that fills the disk can still be measured
                keeping(work, needed_bytes),
            ):
                report = build_artifact(
                    loaded, dense, plan, images, folder, began, searched, checkpoints, keep_passes, part, command_line
                )
                note_written(work, folder, whole)
            artifact = Artifact(output, report)
    failed = [gate for gate in artifact.report.gates if not gate.holds]
    if failed:
        raise AccuracyError(f"{output} is written, and fails its gate: {'; '.join(map(str, failed))}")
    return artifact


def output_bytes(module: nn.Module) -> int:
    """The approximate size of an output folder in bytes: four copies of the weights, one byte of mask for each, 1 MiB.

    The copies are model.safetensors and three ONNX files.
    """
    tensors = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    return sum(value.numel() * (4 * value.element_size() + 1) for value in tensors) + 2**20


def least_output_bytes(module: nn.Module) -> int:
    """The bytes that every output folder needs: the weights in model.safetensors and in two ONNX files."""
    tensors = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    return 3 * sum(value.numel() * value.element_size() for value in tensors)


def stages(recipe: Recipe, dense_quantized: bool = False) -> tuple[str, ...]:
    """The names of the stages that `compile` reports to `observe`, in order.

    `dense_quantized`: whether the dense model is written in 8 bits too.
    """
    passes = tuple(step.name for step in recipe.passes)
    tune = () if recipe.tune is None else ("tune",)
    return (
        "load",
        "capture",
        *tune,
        "export dense",
        *passes,
        "export compressed",
        *((QUANTIZE_DENSE,) if dense_quantized else ()),
        "build",
        "evaluate",
        "time",
        "write",
    )


def preview(
    model: str | Path | nn.Module | Request,
    recipe: Recipe,
    data: Any = None,
    output: str | Path | None = None,
    force: bool = False,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    """What `compile` would do, as JSON values: the resolved recipe, the stages, each layer's pattern or reason.

    It makes the checks that `compile` makes before it works; those of the output folder if `output` is given. Raises a
    MpcompileError.

    Analysis passes are run, because they choose the patterns. Other passes are not run; the passes nm-mask and quantize
    only report the pattern, the precision or the reason of each layer.
    """
    plan = plan_of(recipe)
    recipe = plan.recipe
    require_consistent(plan, data is not None)
    if output is not None:
        require_writable(Path(output), force, [path for path in map(path_of, (model, data)) if path is not None])
    loaded, request = loaded_from(model)
    if output is not None:
        require_space(Path(output), least_output_bytes(loaded.module))
    dense, images = judged_run(loaded, request, data, recipe)
    require_inputs(plan, dense, images)
    analyses = [step for step in plan.passes if step.effect is Effect.ANALYSIS]
    planned, _ = PassManager(analyses).run(dense, images.for_passes())
    rows = _preview_rows(plan, planned)
    with memory_limit(memory_bytes):
        memory = memory_forecast(plan, dense, images)
    return {
        "model": dataclasses.asdict(loaded.source),
        "recipe": recipe.model_dump(mode="json"),
        "stages": stages(plan.recipe, writes_dense(plan)),
        "layers": rows,
        "memory": dataclasses.asdict(memory),
        "notes": list(images.notes),
    }


def _preview_rows(plan: RunPlan, planned: Model) -> list[dict[str, Any]]:
    """One row for each layer that the passes nm-mask and quantize would decide on; empty without these passes.

    `pattern` and `precision` are None for a layer that is not masked or stays in floating point; `reason` and
    `unquantized` are then the reasons. Without the pass nm-mask every layer is dense, and `reason` says so.
    """
    choices: dict[str, NM | str] = {}
    unquantized: dict[str, str | None] = {}
    for step in plan.passes:
        if isinstance(step, NMMask):
            choices |= eligible_patterns(planned, step.pattern, step.include, step.exclude)
        if isinstance(step, Quantize):
            unquantized |= quantizable(planned, step.include, step.exclude)
    groups = tied_layers(planned, [name for name, _ in planned.layers()])
    owners = {name: first for first, *others in groups for name in others}
    rows = []
    for name in dict.fromkeys([*choices, *unquantized]):
        choice = choices.get(name, "no pass assigned a pattern to it")
        quantized = name in unquantized and unquantized[name] is None
        rows.append(
            {
                "layer": name,
                "pattern": str(choice) if isinstance(choice, NM) else None,
                "reason": choice if isinstance(choice, str) else None,
                "shares_weight_with": owners.get(name),
                "precision": plan.recipe.precision if quantized else None,
                "unquantized": unquantized.get(name),
            }
        )
    return rows
