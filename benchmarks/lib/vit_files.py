"""Untrained ViTs of timm at 224 pixels, with token merging, and their ONNX files with every Linear masked."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import timm
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.data.images import Data
from mpcompile.export.mask_check import ProvenMask, file_weights
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.source import Source
from mpcompile.passes import ToMe
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.pipeline.pass_manager import Pass, PassManager

IMAGE = 3, 224, 224
Images = NDArray[np.float32]
Run = Callable[[], object]
Engine = Callable[[Images], Images]


def untrained(name: str) -> Model:
    """Returns a timm model with random weights, captured."""
    torch.manual_seed(0)
    return capture(timm.create_model(name, pretrained=False).eval(), Source(name, "", name), torch.randn(1, *IMAGE))


def merging(model: Model, r: int, before: Sequence[Pass] = ()) -> Model:
    """Returns the model after the passes `before`, with r tokens merged after each attention."""
    passes = [*before, *([ToMe(r=r)] if r else [])]
    return PassManager(passes).run(model, Data())[0] if passes else model


def with_batch(file: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Returns the file for one batch size: a runtime can then compute shapes when it loads the file."""
    result = onnx.ModelProto()
    result.CopyFrom(file)
    del result.graph.value_info[:]
    for value in (*result.graph.input, *result.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return result


def torch_logits(model: Model, images: Images) -> Images:
    """Returns the logits of the graph in torch."""
    return model(torch.from_numpy(images)).numpy()


def masked(file: onnx.ModelProto, pattern: NM) -> tuple[onnx.ModelProto, list[ProvenMask]]:
    """Returns the file with every Linear weight in its blocks masked by magnitude, and the masks."""
    result = onnx.ModelProto()
    result.CopyFrom(file)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    proven = []
    for weight in file_weights(file):
        if weight.values.ndim != 2 or not any("blocks." in scope for scope in weight.scopes):
            continue
        kept = nm_mask(torch.from_numpy(np.abs(weight.values)), pattern).numpy()
        values = np.where(kept, weight.values, np.float32(0))
        values = values if weight.axis == 1 else np.ascontiguousarray(values.T)
        stored[weight.initializer].CopyFrom(numpy_helper.from_array(values, weight.initializer))
        zeros = int(kept.size - kept.sum())
        proven.append(
            ProvenMask(
                weight.scopes[-2],  # the layer, before the node's own name
                weight.initializer,
                (weight.node,),
                weight.op,
                weight.axis,
                str(pattern),
                pattern.of,
                zeros,
                kept.size,
            )
        )
    return result, proven
