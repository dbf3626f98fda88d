"""Quantized: a report's part on a model in 8 bits: the dense models in 8 bits beside it, and the loss of each part.

Three versions split the loss: the model before the pass `quantize` (masks alone, in fp32), the dense model in 8 bits
(8 bits alone), and the compressed model (both).
"""

from dataclasses import dataclass

from mpcompile.measure.quantized_layer import QuantizedLayer
from mpcompile.measure.timing import Speedup, Timing


@dataclass(frozen=True, slots=True)
class Variant:
    """One version of the model, compared with the dense model in fp32 on the held-out images.

    Attributes:
        name: such as `int8, mpcompile` or `int8, dynamic`.
        method: how it was quantised and why, within a sentence.
        file: its file in the output folder, if it has one.
        failed: why there is no such model; the values below are then None or empty.
        top1: share of right decisions, in [0, 1]; None without labelled images.
        agreement: share of images with the dense model's decision; None without images, or if outputs are values.
        logit_shift_mean: mean over images of the largest change of an output; None without images.
        relative_error: mean over images of ‖Δ‖ / ‖dense output‖; None unless the outputs are values.
        cosine: mean over images of the cosine similarity with the dense output; None unless the outputs are values.
        timings: latency at each batch size, timed in the same rounds as the dense and the compressed model.
        speedups: over the dense model in fp32, one for each batch size.
    """

    name: str
    method: str | None = None
    file: str | None = None
    failed: str | None = None
    top1: float | None = None
    agreement: float | None = None
    logit_shift_mean: float | None = None
    relative_error: float | None = None
    cosine: float | None = None
    timings: tuple[Timing, ...] = ()
    speedups: tuple[Speedup, ...] = ()


@dataclass(frozen=True, slots=True)
class Quantized:
    """A compressed model in 8 bits beside dense models in 8 bits.

    Attributes:
        precision: int8 or fp8.
        before_quantize: the model before the pass `quantize`, in fp32, such as `masks alone`; None if no other pass
            changes the model, or without held-out images.
        baselines: dense models in 8 bits: ours, if the compressed model is another one, and those of the target's own
            tools.
        over_fastest: for each batch size, the speedup of the compressed model over the fastest baseline, which
            `baseline` names.
        kernels: for each quantised layer, whether the target ran it on an 8-bit kernel, and if not, why; empty if the
            target does not report it.
    """

    precision: str
    before_quantize: Variant | None
    baselines: tuple[Variant, ...]
    over_fastest: tuple[Speedup, ...]
    kernels: tuple[QuantizedLayer, ...] = ()
