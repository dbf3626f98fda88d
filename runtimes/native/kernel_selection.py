"""Which products are faster with the native operator, on this machine: measured, each beside the dense node.

Every distinct product (same operator, weight shape, pattern, shared rows and input shape) is built twice as a session
of one node, with its real weights and random activations, and the two take turns. The operator is taken where the
whole interval of the speedup lies above 1; ONNX Runtime's dense kernel stays everywhere else, with the reason.

Convolutions have to pass once more, all together in the whole file: ONNX Runtime runs chains of its own in a blocked
layout, and pays for leaving it, which a node alone does not show. What that costs and what the kernel gains both change
with the batch, so they have to pass at the largest as well as at the smallest.
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

OWN_LAYOUT = (
    "alone the native kernel is {} times as fast as the dense one, but the whole file is not faster with it at "
    "batch {} ({}): ONNX Runtime keeps neighbouring convolutions in a layout of its own; it runs as dense"
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One masked layer: what it will run as, both times where it was measured, and why, as a sentence."""

    layers: tuple[str, ...]
    name: str
    native: bool
    reason: str
    pattern: str | None = None
    shape: tuple[int, int] | None = None  # of the weight, (out, in)
    share: int | None = None  # rows that are computed from one pattern
    x: tuple[int, ...] | None = None  # shape of its input
    dense: Timing | None = None
    sparse: Timing | None = None
    speedup: Speedup | None = None


@dataclass(frozen=True, slots=True)
class Accelerated:
    """A file with the native operator where it is faster, and a row for every masked layer."""

    file: onnx.ModelProto
    choices: tuple[Choice, ...]

    @property
    def count(self) -> int:
        """How many products run on the native operator."""
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
    """The file with the operator where it is faster for a batch like `images`, on so many threads.

    The file with convolutions has to be faster for batches like those of `also`, too. `seconds` bounds the time for one
    pair; the fewest rounds of mpcompile.measure.timing are always run. Raises BuildError.
    """
    products, refused = find(file, masks)
    streams = packed(products)
    shapes = input_shapes(file, products, images)
    measured: dict[tuple[object, ...], tuple[Timing, Timing, Speedup]] = {}
    choices: list[Choice] = [_left_dense(row) for row in refused]
    taken = []
    for product in products:
        made, x = streams[product.prefix], shapes[product.x]
        key = (product.op, product.weight.shape, product.pattern, made.share, x)
        if key not in measured:
            measured[key] = measure(product, made, x, library, threads, seconds)
        choice = _choice(product, made, x, *measured[key])
        choices.append(choice)
        if choice.native:
            taken.append(product)
    convolutions = {product.name for product in taken if product.op == CONV}
    if convolutions:
        others = [product for product in taken if product.op != CONV]
        with_them, without = (replace(file, some, streams) for some in (taken, others))
        before, after = (session(model, library, threads) for model in (without, with_them))
        for batch in (images, *also):
            ratio = compare_whole(before, after, batch, seconds)
            if not ratio.faster:
                left = (_blocked(one, ratio, len(batch)) if one.name in convolutions else one for one in choices)
                return Accelerated(without, tuple(left))
        return Accelerated(with_them, tuple(choices))
    return Accelerated(replace(file, taken, streams), tuple(choices))


def compare_whole(
    before: "onnxruntime.InferenceSession",
    after: "onnxruntime.InferenceSession",
    images: NDArray[np.float32],
    seconds: float,
) -> Speedup:
    """How many times as fast as `before` `after` is, sessions of whole files, in turns."""
    given = {before.get_inputs()[0].name: images}
    samples = sample({"before": partial(before.run, None, given), "after": partial(after.run, None, given)}, seconds)
    return speedup(samples["before"], samples["after"], "the file without native convolutions")


def _blocked(choice: Choice, whole: Speedup, batch: int) -> Choice:
    assert choice.speedup is not None
    return with_fields(
        choice, native=False, reason=OWN_LAYOUT.format(choice.speedup.with_interval(), batch, whole.with_interval())
    )


def _left_dense(row: Refused) -> Choice:
    return Choice(row.layers, row.name, False, f"{row.reason}; it runs as dense")


def _choice(
    product: MaskedGemm, made: Packed, x: tuple[int, ...], dense: Timing, sparse: Timing, ratio: Speedup
) -> Choice:
    native, measured = ratio.faster, ratio.with_interval()
    reason = (
        f"the native kernel is {measured} times as fast as the dense one"
        if native
        else f"the native kernel is not surely faster, {measured} times as fast as the dense one; it runs as dense"
    )
    rows, columns = product.weight.shape
    return Choice(
        product.layers, product.name, native, reason, str(product.pattern), (rows, columns), made.share, x,
        dense, sparse, ratio,
    )  # fmt: skip
