"""Runs the passes on a captured model and writes the output folder: weights, ONNX files, engines and the report."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from mpcompile.analysis.block_macs import charged_from_costs
from mpcompile.analysis.graph_outline import outline
from mpcompile.analysis.macs import cost
from mpcompile.data.images import Data
from mpcompile.driver.artifact import COMPRESSED, DENSE, PASSES, RECIPE, file_rows
from mpcompile.driver.captured_signature import captured_signature
from mpcompile.driver.commented_recipe import commented
from mpcompile.driver.compare_engines import Arrays, arrays, parity_of
from mpcompile.driver.gates import gates_of
from mpcompile.driver.part import OpenPart
from mpcompile.driver.quantized_baselines import (
    dense_baselines,
    lower_dense,
    outputs_in_float,
    writes_dense,
)
from mpcompile.driver.run_engines import (
    built_engines,
    kernel_verdicts,
    latencies,
    quantized_kernels,
    quantized_rows,
)
from mpcompile.driver.run_plan import RunPlan
from mpcompile.driver.tune import SearchResult
from mpcompile.driver.weight_files import write_weights
from mpcompile.export.onnx_export import Lowered
from mpcompile.frontend.load_model import Loaded
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import QUANTIZED
from mpcompile.measure.checked_comparison import checked_comparison
from mpcompile.measure.layer_verdict import LayerVerdict, one_per_weight
from mpcompile.passes import Quantize
from mpcompile.passes.restore import ATTRIBUTION
from mpcompile.pipeline.checkpoints import Checkpoints
from mpcompile.pipeline.pass_manager import Observer, PassManager
from mpcompile.pipeline.ranks import begin_together
from mpcompile.recipe.schema import Recipe
from mpcompile.report.layer_counts import weight_owners
from mpcompile.report.layer_rows import layer_rows
from mpcompile.report.quantized_schema import Quantized
from mpcompile.report.render import write as write_report
from mpcompile.report.schema import DataUsed, LayerRow, Parity, Report
from mpcompile.report.search_needs import recipe_file
from mpcompile.report.sentences import verdict_on
from mpcompile.runtimes import Runtime, has_sparse_kernel
from mpcompile.runtimes.ort.overflow import require_finite
from mpcompile.runtimes.ort.session import cpu_engine
from mpcompile.runtimes.ort.unrounded import require_unrounded_parity
from mpcompile.system.device import device_name
from mpcompile.system.hardware import environment

PARITY_IMAGES = 32
QUANTIZE_DENSE = "quantize dense"  # the stage that makes the dense model in 8 bits


def build_artifact(
    loaded: Loaded,
    dense: Model,
    plan: RunPlan,
    data: Data,
    folder: Path,
    observe: Observer,
    searched: SearchResult | None,
    checkpoints: Checkpoints,
    keep_passes: bool,
    part: OpenPart | None = None,
    command_line: Sequence[str] | None = None,
) -> Report:
    """Runs the passes of a plan, writes all files of the output into `folder`, and returns the report.

    Args:
        loaded: the module as it was given, whose parameter names model.safetensors keeps, and its source.
        dense: the captured model.
        plan: recipe, passes and runtime.
        data: calibration, validation, training and held-out images.
        folder: exists and is empty.
        observe: called with the name of each stage as it begins.
        searched: the search that chose the recipe, for the report and the files of the recipes that it tried.
        checkpoints: results of earlier passes, to read and to write.
        keep_passes: whether the checkpoints are copied into the folder.
        part: the part of the model that `dense` is; None for the whole model.
        command_line: the words of the command that started the run, for the report; None for a run from Python.

    Raises a MpcompileError.
    """
    recipe = plan.recipe
    check = _check_inputs(data, dense)
    metadata = _onnx_metadata(loaded.source.sha256, recipe)
    observe("export dense")
    before = plan.lower(dense, folder / DENSE, metadata)
    parities = [_parity(before, check, "dense: ONNX Runtime against PyTorch")]
    in_float: list[NDArray[np.float32]] = []  # outputs before the pass quantize, on held-out images

    def before_pass(name: str, model: Model) -> None:
        if name == Quantize.name and writes_dense(plan):
            with TemporaryDirectory() as temporary:
                in_float.extend(outputs_in_float(plan, model, data.held_out, Path(temporary) / COMPRESSED))

    begin_together(dense, data)
    model, records = PassManager(plan.passes).run(
        dense, data, observe, checkpoints, before_pass, plan.device, ranks=True
    )
    dense_cost, cost_left = cost(dense), cost(model)
    observe("export compressed")
    after = plan.lower(model, folder / COMPRESSED, metadata, like=before)
    require_finite(after, _calibration(data, check))
    parities.append(_parity(after, check, "compressed: ONNX Runtime against PyTorch"))
    quantized = None
    if writes_dense(plan):
        observe(QUANTIZE_DENSE)
        quantized = lower_dense(plan, dense, data, folder, metadata)
        parities.append(_parity(quantized, check, f"dense in {recipe.precision}: ONNX Runtime against PyTorch"))
    observe("build")
    built = built_engines(plan, before, after, quantized, folder, check)
    with TemporaryDirectory() as temporary:
        baselines = dense_baselines(
            plan, before, built.dense_quantized, plan.build_options(folder), data, Path(temporary)
        )
        observe("evaluate")
        engines = built.dense, built.compressed
        comparison = None
        if len(data.held_out):
            comparison = checked_comparison(
                *engines, data.held_out, dense.source, dense.head, loaded.claimed, recipe.data.examples
            )
        masked, baselines = quantized_rows(plan, built.dense, in_float, baselines, data, dense)
        observe("time")
        latency, baselines, over = latencies(plan, built, baselines, data, dense)
    in_8_bits = None
    if recipe.precision in QUANTIZED:
        rows = tuple(baseline.row for baseline in baselines)
        in_8_bits = Quantized(recipe.precision, masked, rows, over, quantized_kernels(plan, built, data, dense))
    in_whole = part.compared(model) if part else None
    verdicts = built.verdicts if plan.idle else kernel_verdicts(built, after, data, dense, recipe)
    observe("write")
    write_weights(folder, loaded.module, model)
    (folder / RECIPE).write_text(commented(recipe), encoding="utf-8")
    if searched:
        _write_tried(folder, searched)
    if keep_passes:
        checkpoints.copy_to(folder / PASSES)
    layers = layer_rows(model, after, dense_cost, cost_left)
    verdicts = one_per_weight(verdicts, weight_owners(layers))
    costs = charged_from_costs(dense_cost, cost_left, model)
    accelerated = _accelerated(plan, layers, verdicts)
    factor = next((one.logit_factor for one in model.plan.values() if one.logit_factor), None)
    report = Report(
        version=version("mpcompile"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command_line=None if command_line is None else tuple(command_line),
        model=loaded.source,
        captured=captured_signature(dense, model, data),
        graph=outline(dense.graph),
        recipe=recipe,
        recipe_sha256=recipe.sha256,
        environment=environment({**_versions(plan.runtime), **plan.origins}, built.dense.device)
        | {"passes": device_name(plan.device)},
        data=_data_used(data, model, recipe),
        passes=records,
        layers=layers,
        certificate=model.certificate,
        cost=costs,
        epochs=model.epochs,
        polished=model.polished,
        accelerated=accelerated,
        parity=(*parities, *built.parity),
        quantized=in_8_bits,
        comparison=comparison,
        tuning=searched.tuning if searched else None,
        logit_factor=factor,
        part=in_whole,
        latency=latency,
        gates=gates_of(recipe, comparison),
        idle=plan.idle,
        notes=(*dense.notes, *built.notes),
        commands=built.commands,
        verdicts=verdicts,
        files=file_rows(folder),
        verdict=verdict_on(
            layers,
            recipe.target,
            accelerated,
            costs,
            comparison,
            latency,
            verdicts,
            plan.idle,
            model.certificate,
            tuple(note for record in records for note in record.notes if note.startswith(ATTRIBUTION)),
            in_8_bits,
            in_whole,
            factor,
            model.polished,
        ),
    )
    write_report(report, folder)
    return report


def _write_tried(folder: Path, searched: SearchResult) -> None:
    """Writes the recipes that a search measured, under the numbers of their rows in the report."""
    for number, (recipe, point) in enumerate(zip(searched.tried, searched.tuning.points, strict=True), 1):
        if point.failed is None:
            path = folder / recipe_file(number)
            path.parent.mkdir(exist_ok=True)
            path.write_text(commented(recipe), encoding="utf-8")


def _onnx_metadata(source_sha256: str, recipe: Recipe) -> dict[str, str]:
    """The metadata of both ONNX files: the version of mpcompile, and the hashes of source and recipe."""
    return {
        "mpcompile.version": version("mpcompile"),
        "mpcompile.source_sha256": source_sha256,
        "mpcompile.recipe_sha256": recipe.sha256,
    }


def _accelerated(plan: RunPlan, layers: tuple[LayerRow, ...], verdicts: tuple[LayerVerdict, ...]) -> bool:
    """Whether masked layers run on sparse kernels: by the verdicts if the engine ran, else by the target's kernels."""
    if not plan.idle and verdicts:
        return any(row.chosen for row in verdicts)
    patterns = {NM.parse(row.pattern) for row in layers if row.pattern}
    return bool(patterns) and all(has_sparse_kernel(plan.runtime, one, plan.recipe.precision) for one in patterns)


def _data_used(data: Data, model: Model, recipe: Recipe) -> DataUsed:
    """The number of images in each split."""
    return DataUsed(
        calibration=len(data.calibration),
        validation=len(data.validation),
        training=len(data.for_training()) if model.epochs or model.polished else 0,
        held_out=len(data.held_out),
        seed=recipe.data.seed,
        notes=data.notes,
    )


def _check_inputs(data: Data, model: Model) -> Arrays:
    """The inputs for parity checks: of up to 32 calibration images, or the example if there are none."""
    split = data.calibration
    return arrays(split.first_inputs(PARITY_IMAGES) if len(split) else model.example_inputs)


def _calibration(data: Data, check: Arrays) -> Iterator[Arrays]:
    """The inputs of all calibration images in batches, or the example if there are none."""
    if not len(data.calibration):
        yield check
    for inputs, _ in data.calibration.announced():
        yield arrays(inputs)


def _parity(exported: Lowered, inputs: Arrays, what: str) -> Parity:
    """The parity of an ONNX file with the graph that it was exported from. Raises ParityError."""
    if exported.precision in QUANTIZED:
        require_unrounded_parity(exported, inputs[0])
    expected = exported.model(tuple(map(torch.from_numpy, inputs))).numpy()
    outputs = cpu_engine(exported)(*inputs)
    if exported.precision == "bf16":
        what += ", in float32 on the rounded weights"
    return parity_of(expected, outputs, exported, what)


def _versions(runtime: Runtime) -> dict[str, str]:
    names: Sequence[str] = ("torch", "timm", "onnx", "onnxscript")
    # Sums of products depend on how many threads share them.
    threads = f"{torch.get_num_threads()}; with another number, sums round differently and masks may differ"
    return {"threads of PyTorch": threads, **{name: version(name) for name in names}, **runtime.versions()}
