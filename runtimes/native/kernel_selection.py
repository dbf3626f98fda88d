"""Selects the products that run on the native operator: those measured to be faster than dense on this machine.

Products with the same operator, weight shape, pattern, rows per pattern and input shape are measured once. Each is
built as two sessions of one node, native and dense, with the real weights and random activations, which are timed in
turns. The native operator is used if the whole confidence interval of its speedup lies above 1. Every other product
stays on ONNX Runtime's dense kernel, with the reason.

Convolutions must also be faster together, in the whole file. ONNX Runtime runs chains of its own convolutions in a
blocked layout, and a native convolution among them forces layout conversions, which a session of one node does not
show. Both that cost and the kernel's gain depend on the batch. The whole file is therefore measured at the smallest
and at the largest batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from mpcompile.export.mask_check import ProvenMask
from mpcompile.measure.timing import Speedup, Timing, sample, speedup
from mpcompile.runtimes.native.custom_op import CONV
from mpcompile.runtimes.native.microbenchmark import input_shapes, measure, session
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm, Refused, find, packed, replace
from mpcompile.runtimes.native.packing import Packed

if TYPE_CHECKING:
    import onnxruntime

BLOCKED_LAYOUT = (
    "alone the native kernel is {} times as fast as the dense one, but the whole file is not significantly faster with "
    "it at batch {} ({}): ONNX Runtime runs neighbouring convolutions in a blocked layout; it runs as dense"
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel selected for one masked weight, the reason as a sentence, and both times if it was measured."""

    layers: tuple[str, ...]
    name: str
    native: bool
    reason: str
    pattern: str | None = None
    shape: tuple[int, int] | None = None  # of the weight, (out, in)
    rows_per_pattern: int | None = None
    x: tuple[int, ...] | None = None  # shape of its input
    dense: Timing | None = None
    sparse: Timing | None = None
    speedup: Speedup | None = None


@dataclass(frozen=True, slots=True)
class Accelerated:
    """A file with the native operator for the products that it makes faster, and one Choice per masked product."""

    file: onnx.ModelProto
    choices: tuple[Choice, ...]

    @property
    def count(self) -> int:
        """The number of products on the native operator."""
        return sum(choice.native for choice in self.choices)


def accelerate(
    file: onnx.ModelProto,
    masks: Iterable[ProvenMask],
    library: Path,
    images: NDArray[np.float32],
    threads: int | None = 1,
    seconds: float = 0.5,
    also: Sequence[NDArray[np.float32]] = (),
) -> Accelerated:
    """Returns the file with the native operator for the products that it makes faster at the batch of `images`.

    With native convolutions, the whole file must be faster at that batch and at the batch of each array in `also`.
    `threads` is the number of intra-op threads. `seconds` bounds the time to measure one pair, but the minimum number
    of rounds of mpcompile.measure.timing is always run. Raises BuildError.
    """
    products, refused = find(file, masks)
    streams = packed(products)
    shapes = input_shapes(file, products, images)
    measured: dict[tuple[object, ...], tuple[Timing, Timing, Speedup]] = {}
    choices: list[Choice] = [_unsupported(row) for row in refused]
    faster = []
    for product in products:
        weight, x = streams[product.prefix], shapes[product.x]
        key = (product.op, product.weight.shape, product.pattern, weight.rows_per_pattern, x)
        if key not in measured:
            measured[key] = measure(product, weight, x, library, threads, seconds)
        choice = _choice(product, weight, x, *measured[key])
        choices.append(choice)
        if choice.native:
            faster.append(product)
    convolutions = {product.name for product in faster if product.op == CONV}
    if convolutions:
        others = [product for product in faster if product.op != CONV]
        with_them, without = (replace(file, replaced, streams) for replaced in (faster, others))
        before, after = (session(model, library, threads) for model in (without, with_them))
        for batch in (images, *also):
            ratio = compare_whole(before, after, batch, seconds)
            if not ratio.faster:
                size = len(batch)
                left = (_slower_in_file(one, ratio, size) if one.name in convolutions else one for one in choices)
                return Accelerated(without, tuple(left))
        return Accelerated(with_them, tuple(choices))
    return Accelerated(replace(file, faster, streams), tuple(choices))


def compare_whole(
    before: "onnxruntime.InferenceSession",
    after: "onnxruntime.InferenceSession",
    images: NDArray[np.float32],
    seconds: float,
) -> Speedup:
    """Returns the speedup of the session `after` over the session `before`, both of whole files, timed in turns."""
    given = {before.get_inputs()[0].name: images}
    samples = sample({"before": partial(before.run, None, given), "after": partial(after.run, None, given)}, seconds)
    return speedup(samples["before"], samples["after"], "the file without native convolutions")


def _slower_in_file(choice: Choice, whole: Speedup, batch: int) -> Choice:
    """Returns the choice of a convolution that is faster alone and not in the whole file: dense."""
    assert choice.speedup is not None
    return with_fields(
        choice,
        native=False,
        reason=BLOCKED_LAYOUT.format(choice.speedup.with_interval(), batch, whole.with_interval()),
    )


def _unsupported(row: Refused) -> Choice:
    return Choice(row.layers, row.name, False, f"{row.reason}; it runs as dense")


def _choice(
    product: MaskedGemm, weight: Packed, x: tuple[int, ...], dense: Timing, sparse: Timing, ratio: Speedup
) -> Choice:
    """Returns the choice for a measured product: native if its whole interval lies above 1."""
    native, measured = ratio.faster, ratio.with_interval()
    reason = (
        f"the native kernel is {measured} times as fast as the dense one"
        if native
        else f"the native kernel is not significantly faster: {measured} times as fast as the dense one; "
        "it runs as dense"
    )
    rows, columns = product.weight.shape
    return Choice(
        product.layers, product.name, native, reason, str(product.pattern), (rows, columns), weight.rows_per_pattern, x,
        dense, sparse, ratio,
    )  # fmt: skip
