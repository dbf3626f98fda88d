"""Selects the 8-bit products and convolutions of a file that run on native operators, by measurement on this machine.

Each of them is timed alone: the native operator against the one that ONNX Runtime has for it. Equal ones are timed
once. It is a candidate unless it is significantly slower alone, because the native operator also takes over its
neighbours (int8_rewrite.py), which the time alone does not show. The file with all candidates must then be
significantly faster than the file as ONNX Runtime runs it, at every batch size (whole_file.py); otherwise candidates
are dropped. Attentions are replaced if the whole file gains by that at every batch size, too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpcompile.errors import BuildError, cause_of
from mpcompile.export.mask_check import ProvenMask
from mpcompile.export.quantized_weights import quantized_weights
from mpcompile.measure.timing import Speedup
from mpcompile.runtimes.native import attention_match, int8_convolutions, int8_products, int8_rewrite
from mpcompile.runtimes.native.int8_convolutions import Int8Convolution
from mpcompile.runtimes.native.int8_microbenchmark import (
    by_columns,
    measure_convolution,
    measure_product,
    skips_zeros,
)
from mpcompile.runtimes.native.int8_products import Int8Product
from mpcompile.runtimes.native.kernel_selection import Accelerated, Choice, OtherKernels, compare_whole, dropped
from mpcompile.runtimes.native.microbenchmark import session
from mpcompile.runtimes.native.whole_file import Names, accept
from mpcompile.system.progress import tracked

if TYPE_CHECKING:
    import onnxruntime

MOST_COLUMNS = 1 << 16  # input channels that the operator takes; its 32-bit sums cannot overflow
FASTER = "the native int8 kernel is {} times as fast as ONNX Runtime's"
NOT_FASTER = "the native int8 kernel is {} times as fast as ONNX Runtime's; it runs there because the whole file gains"
SLOWER = "the native int8 kernel is slower: {} times as fast as ONNX Runtime's, which runs it"
NOT_A_PRODUCT = (
    "the native int8 kernel takes a MatMul or Gemm of u8 activations by s8 weights with one scale per output channel "
    "and at most 65,536 input channels; this is another {}, and runs on ONNX Runtime's kernels"
)
MULTIPLIES_ZEROS = (
    "; it multiplies the zeros too, because it skips them only where at most 8 of 16 neighbouring input channels "
    "are kept: give a --pattern of 2:4, 4:8, 8:16 or sparser"
)
THEIRS = OtherKernels("ONNX Runtime's", "the file on ONNX Runtime's int8 kernels", "on ONNX Runtime's")
WITHOUT_ATTENTION = "the file without the native attention"


@dataclass(frozen=True, slots=True)
class _File:
    """A file in 8 bits, and what the native operators could replace in it.

    Attributes:
        model: the file.
        products: all 8-bit products.
        attentions: all attentions.
        convolutions: all 8-bit convolutions.
        refused: why each other convolution, by name, does not run on the native operator.
        shapes: of the float32 tensors around the products, for a batch of at least 2 if the batch is free.
    """

    model: onnx.ModelProto
    products: tuple[Int8Product, ...]
    attentions: tuple[attention_match.FileAttention, ...]
    convolutions: tuple[Int8Convolution, ...]
    refused: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def layers(self) -> list[Int8Product | Int8Convolution]:
        """All products, then all convolutions."""
        return [*self.products, *self.convolutions]

    def refusal(self, mask: ProvenMask) -> str:
        """Returns why the native operators do not compute a masked layer that is none of these."""
        return self.refused.get(mask.nodes[0], NOT_A_PRODUCT.format(mask.op))

    def input_of(self, each: Int8Product | Int8Convolution, batch: int) -> tuple[int, ...]:
        """Returns the shape of the u8 tensor that a native operator reads at a batch."""
        if isinstance(each, Int8Convolution):
            _, channels, height, width = self.shapes[each.source]
            return batch, height, width, channels
        return batch, *self.shapes[each.y][1:-1], len(each.weight)

    def rewritten(self, names: Names, attention: bool) -> onnx.ModelProto:
        """Returns the file with the native operators for the named products."""
        return int8_rewrite.replace(
            self.model,
            [product for product in self.products if product.name in names],
            self.shapes,
            self.attentions if attention else (),
            convolutions=[convolution for convolution in self.convolutions if convolution.name in names],
        )


def accelerate(
    file: onnx.ModelProto,
    masks: Iterable[ProvenMask],
    library: Path,
    images: NDArray[np.float32],
    threads: int | None = 1,
    seconds: float = 0.5,
    also: Sequence[NDArray[np.float32]] = (),
) -> Accelerated:
    """Returns the file with the native operators for what they make faster, at the batch of `images` and of `also`.

    Layers without a mask are included: the native operators run dense int8 layers too. `threads` is the number of
    intra-op threads; `seconds` bounds the time to measure one pair, but the minimum number of rounds of
    mpcompile.measure.timing is always run. Raises BuildError.
    """
    found, masks = inspected(file, images), tuple(masks)
    by_initializer = {mask.initializer: mask for mask in masks}
    layers = {node: row.layers for row in quantized_weights(file) for node in row.nodes}
    measured: dict[tuple[object, ...], Any] = {}
    replaceable = {each.initializer for each in found.layers}
    choices = [
        Choice((mask.layer,), mask.nodes[0], False, found.refusal(mask), mask.pattern)
        for mask in masks
        if mask.initializer not in replaceable
    ]
    for each in tracked(found.layers, lambda each: each.name, "layers"):
        mask = by_initializer.get(each.initializer)
        pattern = None if mask is None else mask.pattern
        x, weight = found.input_of(each, len(images)), by_columns(each)
        columns, rows = weight.shape
        key = (each.weight.shape, pattern, x, each.window if isinstance(each, Int8Convolution) else None)
        if key not in measured:
            measured[key] = (
                measure_convolution(each, x, library, threads, seconds)
                if isinstance(each, Int8Convolution)
                else measure_product(each, x, library, threads, seconds)
            )
        dense, sparse, ratio = measured[key]
        slower = ratio.conclusion == "slower"
        reason = (FASTER if ratio.faster else SLOWER if slower else NOT_FASTER).format(ratio.with_interval())
        skips = skips_zeros(weight)
        if pattern and not skips and not slower:
            reason += MULTIPLIES_ZEROS
        choices.append(
            Choice(
                layers=layers.get(each.name, ()),
                name=each.name,
                native=not slower,
                reason=reason,
                pattern=pattern,
                shape=(rows, columns),
                rows_per_pattern=1 if mask is None or mask.nm is None else mask.nm.rows,
                x=x,
                dense=dense,
                sparse=sparse,
                speedup=ratio,
                skips_zeros=skips,
            )
        )
    candidates = {choice.name: choice.speedup.ratio for choice in choices if choice.native and choice.speedup}
    if not candidates:
        return Accelerated(file, tuple(choices))
    batches = {len(given): given for given in (images, *also)}
    theirs = session(file, None, threads)

    @lru_cache(maxsize=1)  # a set of products is compared at several batch sizes
    def native(names: Names, attention: bool) -> "onnxruntime.InferenceSession":
        return session(found.rewritten(names, attention), library, threads)

    def compare(names: Names, batch: int) -> Speedup:
        return compare_whole(theirs, native(names, False), batches[batch], seconds, THEIRS.file)

    accepted = accept(candidates, (), sorted(batches), compare)
    attention = bool(accepted.kept and found.attentions) and _gains(
        native(accepted.kept, False),
        session(found.rewritten(accepted.kept, True), library, threads),
        batches.values(),
        seconds,
    )
    return Accelerated(
        found.rewritten(accepted.kept, attention),
        tuple(
            dropped(choice, loss, THEIRS) if (loss := accepted.dropped.get(choice.name)) else choice
            for choice in choices
        ),
    )


def _gains(
    before: "onnxruntime.InferenceSession",
    after: "onnxruntime.InferenceSession",
    batches: Iterable[NDArray[np.float32]],
    seconds: float,
) -> bool:
    """Whether the second file is significantly faster at every batch."""
    return all(
        compare_whole(before, after, images, seconds, WITHOUT_ATTENTION).conclusion == "faster" for images in batches
    )


def inspected(file: onnx.ModelProto, images: NDArray[np.float32]) -> _File:
    """Returns what the native operators could replace in a file. Raises BuildError if it does not run on the images."""
    products = tuple(product for product in int8_products.find(file) if len(product.weight) <= MOST_COLUMNS)
    run = runner(file, images)
    computed = {name for node in file.graph.node for name in node.output}
    sums = {name for node in file.graph.node if node.op_type == "Add" for name in (*node.input, *node.output)}
    ends = {name for node in file.graph.node if node.op_type == "Conv" for name in (node.input[0], node.output[0])}
    values = run(sorted({product.y for product in products} | ((sums | ends) & computed)))
    shapes = {name: value.shape for name, value in values.items()}
    convolutions, refused = int8_convolutions.find(file, shapes)
    attentions = tuple(attention_match.find(file, run)) if products else ()
    return _File(file, products, attentions, tuple(convolutions), refused, shapes)


def runner(
    file: onnx.ModelProto, images: NDArray[np.float32]
) -> Callable[[Sequence[str]], Mapping[str, NDArray[np.float32]]]:
    """Returns a function that gives the values of named tensors of the file, on as many images as its batch allows.

    If the batch is free, these are two, repeated from `images` (b, c, h, w).
    """
    given = file.graph.input[0]
    size = given.type.tensor_type.shape.dim[0]
    count = size.dim_value if size.HasField("dim_value") else 2
    batch = np.resize(images, (count, *images.shape[1:]))

    def run(names: Sequence[str]) -> Mapping[str, NDArray[np.float32]]:
        probe = onnx.ModelProto()
        probe.CopyFrom(file)
        if not names:  # ONNX Runtime would return all outputs
            return {}
        known = {output.name for output in probe.graph.output}
        probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        try:
            values = session(probe, None, None).run(list(names), {given.name: batch})
        except Exception as error:  # ONNX Runtime raises its own types, and any of them can occur here
            raise BuildError(f"ONNX Runtime cannot run the file on {count} images: {cause_of(error)}") from error
        return dict(zip(names, values, strict=True))

    return run
