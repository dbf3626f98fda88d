"""One architecture captured, masked at 2:4 and exported to ONNX; every step is compared with the original module."""

import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib.zoo_model import ZooModel, call
from mpcompile.analysis.eligibility import eligible
from mpcompile.data.images import Data
from mpcompile.errors import MpcompileError
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.output_tree import flattened
from mpcompile.ir.parity import TOLERANCE, is_constant, relative_difference
from mpcompile.ir.pattern import NM
from mpcompile.ir.source import Source
from mpcompile.passes.nm_mask.nm_mask import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.system.tensor_hashing import state_sha256

Inputs = Tensor | dict[str, Tensor]
# Part of a name -> why rounding alone makes outputs differ, found by adding noise of its size to values of the graph.
ROUNDED = {
    "caformer": "with random weights, a change of the images by 6e-08 alone changes outputs by 3e-01",
    "convmixer": "with random weights, a change of the images by 6e-08 alone changes outputs by 1e-04",
    "RTDetr": "with random weights, its inverse sigmoid of box corners multiplies the rounding of ONNX Runtime's "
    "Sigmoid, 1.5e-07, by 1,000",
    "LwDetr": "with random weights, its exponential of box sizes reaches 5e+05, and a change of the images by 6e-08 "
    "alone changes outputs by 2e-04",
}
SAME = 1e-5  # largest relative difference between graph and module, as in mpcompile/frontend/capture.py


def trial(name: str, entry: ZooModel, *, onnx: bool = True) -> dict[str, Any]:
    """The row of one architecture; without the export if `onnx` is False.

    `captured` is true if two captures of one instance leave it unchanged, and the graph gives the module's outputs on
    other images and on another batch size. `reason` says what failed, or is None.
    """
    started = time.perf_counter()
    row: dict[str, Any] = {"name": name, "captured": False, "reason": None}
    try:
        model = _captured_and_masked(row, name, entry)
        if onnx:
            row["onnx"] = False
            row["onnx_difference"] = _onnx_difference(model, (entry.batch(2, seed=3), entry.batch(3, seed=4)))
            row["onnx"] = row["onnx_difference"] <= TOLERANCE["fp32"]
            if not row["onnx"]:
                known = next((f": {why}" for part, why in ROUNDED.items() if part in name), "")
                row["reason"] = f"the outputs of the ONNX file differ by {row['onnx_difference']:.0e}{known}"
    except Exception as error:  # whatever a library raises on one of its models, ONNX Runtime's own types included
        row["reason"] = f"{'' if isinstance(error, MpcompileError) else type(error).__name__ + ': '}{_line(error)}"
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _captured_and_masked(row: dict[str, Any], name: str, entry: ZooModel) -> Model:
    """The masked model. Fills the row step by step, so that it has the steps before one that fails."""
    module = entry.lively()
    row["parameters"] = sum(p.numel() for p in module.parameters())
    source = source_of(module, name=name, arch=name, sha256="")
    before = _state(module)
    started = time.perf_counter()
    _capture(module, source, entry.batch(2, seed=0))
    row["capture_seconds"] = round(time.perf_counter() - started, 2)
    model = _capture(module, source, entry.batch(2, seed=0))
    if _state(module) != before:
        raise ValueError("capturing changed the model")
    row["way"] = model.captured_by
    images, batch = entry.batch(2, seed=3), entry.batch(3, seed=4)
    expected, expected_batch = named(call(module, images)), named(call(module, batch))
    if all(is_constant(one.numpy()) for one in expected.values() if one.ndim and one.is_floating_point()):
        raise ValueError("the outputs are the same for every image, so that parity proves nothing")
    row["outputs"] = len(expected)
    row["parity_images"] = largest_difference(expected, _returned(model, images))
    row["parity_batch"] = largest_difference(expected_batch, _returned(model, batch))
    row["batch_free"] = row["parity_batch"] <= SAME
    row["captured"] = row["parity_images"] <= SAME and row["batch_free"]
    if not row["captured"]:
        raise ValueError("the graph gives other outputs than the module")
    verdicts = eligible(model, NM(2, 4))
    row |= {"layers": len(verdicts), "eligible": sum(reason is None for reason in verdicts.values())}
    if row["eligible"]:
        model, _ = PassManager([NMMask(criterion="magnitude", refit="none")]).run(model, Data())
    row["masked"] = len(model.masks())
    return model


def _capture(module: nn.Module, source: Source, inputs: Inputs) -> Model:
    """The captured model; of several inputs, the first are the images."""
    if isinstance(inputs, Tensor):
        return capture(module, source, inputs)
    (_, images), *others = inputs.items()
    return capture(module, source, images, inputs=dict(others))


def _line(error: Exception) -> str:
    """The error on one line, with paths of installed files from the package on."""
    return re.sub(r"\S*/site-packages/", "", " ".join(str(error).split()))


def _state(module: nn.Module) -> tuple[str, dict[str, list[str]]]:
    """The hash of a module's weights and buffers, and the names of all attributes."""
    return state_sha256(module), {name: sorted(vars(part)) for name, part in module.named_modules()}


def named(outputs: object) -> dict[str, Tensor]:
    """The tensors of a module's outputs by their paths."""
    return dict(flattened(outputs)[1])


def _arguments(model: Model, inputs: Inputs) -> tuple[Tensor, ...]:
    """The inputs of the graph in its order."""
    return tuple(inputs[name] for name in model.input_names) if isinstance(inputs, dict) else (inputs,)


def _returned(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """What the compressed model returns in the original's form, flattened as the original's."""
    return named(model.as_returned(_arguments(model, inputs)))


def largest_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """The largest relative difference over all outputs; infinite if names or shapes differ."""
    if list(expected) != list(found) or any(expected[name].shape != found[name].shape for name in expected):
        return float("inf")
    return max(relative_difference(expected[n].double().numpy(), found[n].double().numpy()) for n in expected)


def _onnx_difference(model: Model, batches: tuple[Inputs, ...]) -> float:
    """The largest relative difference between the ONNX file and the graph, over all outputs of these batches."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        lower(model, file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        taken = {one.name for one in session.get_inputs()}
        worst = 0.0
        for inputs in batches:
            arguments = _arguments(model, inputs)
            feeds = dict(zip(model.input_names, (one.numpy() for one in arguments), strict=True))
            found = session.run(list(model.output_names), {name: feeds[name] for name in feeds if name in taken})
            wanted = dict(zip(model.output_names, model.outputs(arguments), strict=True))
            named_found = {n: torch.from_numpy(np.asarray(one)) for n, one in zip(wanted, found, strict=True)}
            worst = max(worst, largest_difference(wanted, named_found))
    return worst
