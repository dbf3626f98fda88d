"""Which masked layers of an int8 file can saturate on ONNX Runtime's own kernels, on processors without VNNI.

There ONNX Runtime multiplies pairs of neighbouring input channels, u8 by s8, and adds both products in 16 bits. The sum
is exact for every input if the positive weights of each pair sum to at most 128, and the negative ones to at least
-128. Masked layers are rounded for the lanes of the native kernel instead, which adds other products together.
"""

import numpy as np
import onnx
from numpy.typing import NDArray

from mpcompile.export.onnx_export import Exported
from mpcompile.export.quantized_weights import quantized_weights
from mpcompile.runtimes.ort.int8 import saturates

MOST_NAMES = 4  # in the sentence
LIMIT = 128  # 255 · 128 fits into 16 bits, and 255 · 129 does not
NOTE = (
    "ONNX Runtime's own int8 kernels add products in 16 bits on this processor, which can saturate in {count} masked "
    "{layers} of {file}: {names}. The native kernel is exact in these layers, if {native} is run with its library. For "
    "a {file} that is exact in ONNX Runtime alone, give the pass quantize `lanes: pairs` in the recipe"
)


def note(exported: Exported) -> tuple[str, ...]:
    """Returns a sentence on the layers that can saturate in the plain file; nothing if none can."""
    if exported.precision != "int8" or not exported.masks or not saturates():
        return ()
    masked = {mask.initializer for mask in exported.masks}
    file = onnx.load(exported.onnx)
    stored = {tensor.name: tensor for tensor in file.graph.initializer}
    names = [
        layer
        for row in quantized_weights(file)
        if row.op != "Conv"  # the pass rounds convolutions for ONNX Runtime's lanes
        and row.initializer in masked
        and pairs_saturate(onnx.numpy_helper.to_array(stored[row.initializer]), row.axis)
        for layer in row.layers
    ]
    if not names:
        return ()
    onnx_file, more = exported.onnx, len(names) - MOST_NAMES
    return (
        NOTE.format(
            count=len(names),
            layers="layer" if len(names) == 1 else "layers",
            file=onnx_file.name,
            names=", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else ""),
            native=f"{onnx_file.stem}.native.onnx",
        ),
    )


def pairs_saturate(weight: NDArray[np.int8], axis: int) -> bool:
    """Whether the sum of two neighbouring products can leave 16 bits; `axis` is that of the output channels."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.int64)
    pairs = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(len(rows), -1, 2)
    return bool((pairs.clip(min=0).sum(-1) > LIMIT).any() or (pairs.clip(max=0).sum(-1) < -LIMIT).any())
