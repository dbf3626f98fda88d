"""Looks for a usual preprocessing under which the dense model is right much more often than under the one in use.

Images reach the model as (pixel − mean) / deviation. With the wrong values a model still answers, with less accuracy,
and the dense and the compressed model lose alike. So a part of the held-out images is also run with the values that
models are usually trained with. A right preprocessing raises no alarm: no other one makes a model significantly better.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpcompile.data.images import Split
from mpcompile.frontend.presets import PRESETS
from mpcompile.ir.head import Head
from mpcompile.measure.accuracy import Run

FIRST, MOST = 64, 256  # images: a candidate that gains nothing on the first is not run on the others
SMALLEST_GAIN = 0.05  # as a share of the images
SIGNIFICANCE = 1e-5  # p-value of the exact McNemar test, for about 7 candidates
SAME = 0.05  # candidates whose values differ by less from those in use are not tried


@dataclass(frozen=True, slots=True)
class PreprocessingCandidate:
    """A preprocessing: per-channel mean and deviation of pixels in [0, 1], and whether channels are reversed."""

    name: str
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    reverse: bool = False

    def apply(self, pixels: NDArray[np.float64]) -> NDArray[np.float32]:
        """Pixels (b, c, h, w) in [0, 1] as the model's input."""
        pixels = pixels[:, ::-1] if self.reverse else pixels
        return np.ascontiguousarray((pixels - _by_channel(self.mean)) / _by_channel(self.std), np.float32)

    def __str__(self) -> str:
        return f"{self.name} (mean {_listed(self.mean)}, deviation {_listed(self.std)})"


def better_preprocessing(
    dense: Run, images: Split, mean: tuple[float, ...], std: tuple[float, ...], head: Head
) -> str | None:
    """A sentence, without period, on the best significantly better preprocessing; None if there is none.

    Args:
        dense: the dense engine.
        images: labelled images, preprocessed with `mean` and `std`.
        mean: per-channel mean in use, for pixels in [0, 1].
        std: per-channel deviation in use.
        head: how outputs become decisions.
    """
    from scipy.stats import binom

    order = images.order[:: max(1, len(images) // MOST)][:MOST]
    parts = list(replace(images, order=order).batches(FIRST))
    labels = [answers.numpy() for _, answers in parts]
    used = PreprocessingCandidate("in use", np.array(mean), np.array(std))
    pixels = [part.numpy().astype(np.float64) * _by_channel(used.std) + _by_channel(used.mean) for part, _ in parts]
    if not pixels or min(map(np.min, pixels)) < -0.01 or max(map(np.max, pixels)) > 1.01:
        return None  # the images were not preprocessed with these values

    def right(candidate: PreprocessingCandidate, least: float = -1.0) -> NDArray[np.bool_]:
        found = [head.right(dense(candidate.apply(pixels[0])), labels[0])]
        if found[0].mean() > least:
            found += [head.right(dense(candidate.apply(p)), y) for p, y in zip(pixels[1:], labels[1:], strict=True)]
        return np.concatenate(found)

    now = right(used)
    best: tuple[float, PreprocessingCandidate] | None = None
    for candidate in _candidates(pixels, used):
        found = right(candidate, float(now[: len(labels[0])].mean()))
        if len(found) < len(now) or found.mean() - now.mean() < SMALLEST_GAIN:
            continue
        gained, lost = int((found & ~now).sum()), int((now & ~found).sum())
        if binom.cdf(lost, gained + lost, 0.5) < SIGNIFICANCE and (best is None or found.mean() > best[0]):
            best = float(found.mean()), candidate
    if best is None:
        return None
    return (
        f"the dense model is right on {now.mean():.2%} of {len(now):,} held-out images with mean {_listed(used.mean)} "
        f"and deviation {_listed(used.std)}, and on {best[0]:.2%} with {best[1]}: the preprocessing is not the one of "
        "its training. Give --mean and --std, or images in the other channel order"
    )


def _candidates(pixels: list[NDArray[np.float64]], used: PreprocessingCandidate) -> Iterator[PreprocessingCandidate]:
    """The usual preprocessings for this number of channels, without the one in use."""
    channels = len(used.mean)
    whole = np.concatenate(pixels)
    own = whole.mean(axis=(0, 2, 3)), np.maximum(whole.std(axis=(0, 2, 3)), 1e-3)
    one = np.ones(channels)
    found = [
        PreprocessingCandidate("the mean and deviation of these images", *own),
        PreprocessingCandidate("values from -1 to 1", 0.5 * one, 0.5 * one),
        PreprocessingCandidate("values from 0 to 1", 0 * one, one),
        PreprocessingCandidate("values from 0 to 255", 0 * one, one / 255),
    ]
    if channels == 3:
        imagenet = np.array(PRESETS["imagenet"].mean), np.array(PRESETS["imagenet"].std)
        found += [
            PreprocessingCandidate("ImageNet's values", *imagenet),
            PreprocessingCandidate("BGR channels and the values in use", used.mean, used.std, reverse=True),
            PreprocessingCandidate(
                "BGR channels, ImageNet's mean and values to 255", imagenet[0][::-1], one / 255, reverse=True
            ),
        ]
    for candidate in found:
        distance = max(
            float(np.abs(candidate.mean - used.mean).max() / used.std.min()),
            float(np.abs(candidate.std / used.std - 1).max()),
        )
        if candidate.reverse or distance > SAME:
            yield candidate


def _by_channel(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[:, None, None]


def _listed(values: NDArray[np.float64]) -> str:
    """Values as text; one number if all are equal."""
    texts = [f"{value:.3g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)
