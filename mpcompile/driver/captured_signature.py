"""The inputs and outputs of a captured model for the report, and how far compression moved each output."""

from typing import Any

import torch

from mpcompile.data.images import Data
from mpcompile.ir.batch import arguments
from mpcompile.ir.model import Model
from mpcompile.measure.output_errors import output_error
from mpcompile.report.schema import Captured, InputRow, OutputRow

MEASURED_IMAGES = 32  # at most
IMAGES_AT_ONCE = 8  # of them, which limits the memory of the two runs


def captured_signature(dense: Model, compressed: Model, data: Data) -> Captured:
    """What the model takes and returns, and how far each output moved on held-out images, or on the example."""
    split = data.held_out if len(data.held_out) else data.calibration
    inputs = arguments(split.first_inputs(MEASURED_IMAGES) if len(split) else dense.example_inputs, dense.example.dtype)
    outputs = []
    before, after = _outputs(dense, inputs), _outputs(compressed, inputs)
    for name, one, other in zip(dense.output_names, before, after, strict=True):
        error = output_error(one, other) if one.ndim and len(one) == len(inputs[0]) else None
        relative, cosine = (error.relative, error.cosine) if error else (None, None)
        outputs.append(OutputRow(**_signature(name, one), relative_error=relative, cosine=cosine))
    rows = tuple(InputRow(**_signature(name, one)) for name, one in zip(dense.input_names, inputs, strict=True))
    return Captured(by=dense.captured_by, inputs=rows, outputs=tuple(outputs), images=len(inputs[0]))


def _outputs(model: Model, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """All outputs, computed for a few images at a time; of an output without an axis of images, the first value."""
    parts = [model.outputs(part) for part in zip(*(one.split(IMAGES_AT_ONCE) for one in inputs), strict=True)]
    counts = [len(part) for part in inputs[0].split(IMAGES_AT_ONCE)]
    by_output = list(zip(*parts, strict=True))
    of_images = [[one.shape[:1] for one in values] == [(count,) for count in counts] for values in by_output]
    return tuple(
        torch.cat(values) if joined else values[0] for values, joined in zip(by_output, of_images, strict=True)
    )


def _signature(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    return {"name": name, "shape": tuple(tensor.shape[1:]), "dtype": str(tensor.dtype).removeprefix("torch.")}
