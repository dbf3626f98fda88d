"""Selects the products that run on the native operator: those measured to be faster than dense on this machine.

Products with the same operator, weight shape, pattern, rows per pattern and input shape are measured once. Each is
built as two sessions of one node, native and dense, with the real weights and random activations, which are timed in
turns. The native operator is a candidate if the whole confidence interval of its speedup lies above 1. Every other
product stays on ONNX Runtime's dense kernel, with the reason.

The file with all candidates must then be significantly faster than the dense file at every batch size (whole_file.py).
Otherwise candidates are dropped, convolutions first: ONNX Runtime runs chains of its own convolutions in a blocked
layout, and a native convolution among them forces layout conversions, which a session of one node does not show.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from mpcompile.export.mask_check import ProvenMask
from mpcompile.measure.timing import Speedup, Timing, speedup
from mpcompile.runtimes.native.microbenchmark import input_shapes, judged, measure, session
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm, Refused, find, packed, replace
from mpcompile.runtimes.native.packing import Packed
from mpcompile.runtimes.native.whole_file import Compare, Loss, Names, accept
from mpcompile.system.progress import tracked

if TYPE_CHECKING:
    import onnxruntime

NOT_IN_FILE = (
    "alone the native kernel is {alone} times as fast as {other}, but with {products} the whole file is not "
    "significantly faster at batch {batch}, {whole} times as fast as {file}; {layout}it runs {instead}"
)
BLOCKED_LAYOUT = "ONNX Runtime runs neighbouring convolutions in a blocked layout; "


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel selected for one masked weight, the reason as a sentence, and both times if it was measured.

    `skips_zeros` is False for an int8 weight whose zeros the native kernel multiplies like other numbers.
    """

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
    skips_zeros: bool = True


@dataclass(frozen=True, slots=True)
class Accelerated:
    """A file with the native operator for the products that it makes faster, and one Choice per masked product.

    Without such products, the file is the dense one.
    """

    file: onnx.ModelProto
    choices: tuple[Choice, ...]

    @property
    def count(self) -> int:
        """The number of products on the native operator."""
        return sum(choice.native for choice in self.choices)


@dataclass(frozen=True, slots=True)
class OtherKernels:
    """What the native operators are compared with, in words.

    Attributes:
        kernel: the other kernel for one product.
        file: the file without native operators.
        run: how a product runs in that file.
    """

    kernel: str
    file: str
    run: str


DENSE = OtherKernels("the dense one", "the dense file", "as dense")


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

    The whole file must be faster at that batch and at the batch of each array in `also`; otherwise products are dropped
    until it is. `threads` is the number of intra-op threads. `seconds` bounds the time to measure one pair, but the
    minimum number of rounds of mpcompile.measure.timing is always run. Raises BuildError.
    """
    products, refused = find(file, masks)
    streams = packed(products)
    shapes = input_shapes(file, products, images)
    measured: dict[tuple[object, ...], tuple[Timing, Timing, Speedup]] = {}
    choices: list[Choice] = [_unsupported(row) for row in refused]
    faster = []
    for product in tracked(products, lambda product: product.name, "layers"):
        weight, x = streams[product.prefix], shapes[product.x]
        window = None if product.convolution is None else product.convolution.window
        key = (product.op, window, product.weight.shape, product.pattern, weight.rows_per_pattern, x)
        if key not in measured:
            measured[key] = measure(product, weight, x, library, threads, seconds)
        choice = _choice(product, weight, x, *measured[key])
        choices.append(choice)
        if choice.native:
            faster.append(product)
    if not faster:
        return Accelerated(file, tuple(choices))
    batches = {len(given): given for given in (images, *also)}
    convolutions = {product.name for product in faster if product.convolution is not None}
    accepted = accept(
        {choice.name: choice.speedup.ratio for choice in choices if choice.native and choice.speedup},
        convolutions,
        sorted(batches),
        _comparison(file, faster, streams, library, threads, seconds, batches),
    )
    kept = [product for product in faster if product.name in accepted.kept]
    return Accelerated(
        replace(file, kept, streams),
        tuple(
            dropped(choice, loss, convolution=choice.name in convolutions)
            if (loss := accepted.dropped.get(choice.name))
            else choice
            for choice in choices
        ),
    )


def _comparison(
    file: onnx.ModelProto,
    products: Sequence[MaskedGemm],
    streams: Mapping[str, Packed],
    library: Path,
    threads: int | None,
    seconds: float,
    images: Mapping[int, NDArray[np.float32]],
) -> Compare:
    """Returns the function that compares the file with native products with the dense file; `images` by batch size."""
    dense = session(file, None, threads)

    @lru_cache(maxsize=1)  # a set of products is compared at several batch sizes
    def native(names: Names) -> "onnxruntime.InferenceSession":
        replaced = [product for product in products if product.name in names]
        return session(replace(file, replaced, streams), library, threads)

    return lambda names, batch: compare_whole(dense, native(names), images[batch], seconds)


def compare_whole(
    dense: "onnxruntime.InferenceSession",
    native: "onnxruntime.InferenceSession",
    images: NDArray[np.float32],
    seconds: float,
    baseline: str = DENSE.file,
) -> Speedup:
    """Returns the speedup of the session `native` over the session `dense`, both of whole files, timed in turns.

    If the difference is not significant, as many rounds are added once more.
    """
    given = {dense.get_inputs()[0].name: images}
    turns = {"dense": partial(dense.run, None, given), "native": partial(native.run, None, given)}
    _, ratio = judged(
        turns,
        seconds,
        lambda found: speedup(found["dense"], found["native"], baseline),
        lambda found: found.significant,
    )
    return ratio


def dropped(choice: Choice, loss: Loss, baseline: OtherKernels = DENSE, convolution: bool = False) -> Choice:
    """Returns the choice of a product that could be native alone, and with which the whole file is not faster."""
    assert choice.speedup is not None
    others = loss.operators - 1
    with_products = f"it and {others} other{'s' if others > 1 else ''}" if others else "it"
    reason = NOT_IN_FILE.format(
        alone=choice.speedup.with_interval(),
        products=with_products,
        batch=loss.batch,
        whole=loss.speedup.with_interval(),
        layout=BLOCKED_LAYOUT if convolution else "",
        other=baseline.kernel,
        file=baseline.file,
        instead=baseline.run,
    )
    return with_fields(choice, native=False, reason=reason)


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
