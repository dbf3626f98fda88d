"""Sentences of the verdict on a model in 8 bits: its speed beside dense models in 8 bits, and the loss of each part."""

from collections.abc import Sequence

from mpcompile.measure.comparison import Comparison
from mpcompile.report.head_words import accuracy_name
from mpcompile.report.quantized_schema import Quantized
from mpcompile.report.schema import Latency


def beside_dense(quantized: Quantized, latency: Sequence[Latency]) -> list[str]:
    """For each batch size a sentence on the speed of the compressed model beside the fastest dense model in 8 bits.

    `latency` has one entry for each batch size; without baselines there are no sentences.
    """
    sentences = []
    for pair, speed in zip(latency, quantized.over_fastest, strict=False):
        baseline = f"the fastest dense {quantized.precision} model ({speed.baseline})"
        subject = "" if speed.conclusion == "interval includes 1" else "the compressed model is "
        sentences.append(f"At batch {pair.dense.batch} {subject}{speed.describe(baseline)}.")
    return sentences


def without_kernel(quantized: Quantized) -> list[str]:
    """A sentence on what masks without sparse kernels bring beside dense 8-bit models; none if nothing was timed."""
    kind = quantized.precision
    if not quantized.over_fastest:
        return []
    if any(speed.conclusion == "faster" for speed in quantized.over_fastest):
        return [f"No {kind} kernel that skips zeros ran, so the masks do not cause the gain beside dense {kind}."]
    return [f"The masks bring no speed beside dense {kind} on this target: no {kind} kernel that skips zeros ran."]


def on_8_bit_kernels(quantized: Quantized) -> list[str]:
    """A sentence with the number of quantised layers that ran on 8-bit kernels; none if it was not reported."""
    ran, count = sum(row.in_8_bits for row in quantized.kernels), len(quantized.kernels)
    if not count:
        return []
    native = sum(row.native for row in quantized.kernels)
    ours = f", {native} of them on the native kernels of mpcompile" if native else ""
    others = "" if ran == count else " The table of layers gives the reason for each other one."
    return [f"{ran} of {count} quantised layers ran on 8-bit kernels{ours}.{others}"]


def loss_split(quantized: Quantized, comparison: Comparison | None) -> list[str]:
    """A sentence on the loss of masks alone, of 8 bits alone, and of both; none if these were not measured."""
    ours = next((row for row in quantized.baselines if row.file), None)
    first, kind = quantized.before_quantize, quantized.precision
    if comparison is None or first is None or ours is None:
        return []
    if comparison.values and first.relative_error is not None and ours.relative_error is not None:
        return [
            f"The mean relative error of the outputs is {first.relative_error:.2%} by {first.name}, "
            f"{ours.relative_error:.2%} by {kind} alone and {comparison.values.relative_error_mean:.2%} by both."
        ]
    if first.logit_shift_mean is None or ours.logit_shift_mean is None:
        return []
    sentence = (
        f"The mean logit shift is {first.logit_shift_mean:.3f} by {first.name}, {ours.logit_shift_mean:.3f} by {kind} "
        f"alone and {comparison.logit_shift_mean:.3f} by both"
    )
    if comparison.dense and comparison.compressed and first.top1 is not None and ours.top1 is not None:
        found = (first.top1, ours.top1, comparison.compressed.top1)
        one, other, both = (100 * (top1 - comparison.dense.top1) for top1 in found)
        sentence += f"; {accuracy_name(comparison.head)} changes by {one:+.2f}, {other:+.2f} and {both:+.2f} points"
    return [f"{sentence}."]


def methods(quantized: Quantized) -> tuple[str, ...]:
    """For each dense model in 8 bits a phrase on how it was quantised and why."""
    return tuple(f"{row.name}: {row.method}" for row in quantized.baselines if row.method)
