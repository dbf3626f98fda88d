"""Looks for a usual preprocessing under which the dense model is right much more often than under the one in use.

With the wrong mean, deviation, channel order, resize or crop a model still answers, with less accuracy, and the dense
and the compressed model lose alike. So a part of the held-out images is also run with the preprocessings that models
are usually trained with. All set-ups see the same images, first few and then more; those that fall behind are dropped.
A right preprocessing raises no alarm: none of the others makes a model right on SMALLEST_GAIN more of the images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mpcompile.data.images import BATCH, Split
from mpcompile.ir.head import Head
from mpcompile.ir.source import Source
from mpcompile.measure.accuracy import Run
from mpcompile.measure.changed_answers import is_better
from mpcompile.measure.preprocessing_set_ups import (
    SetUp,
    crop_set_ups,
    has_picture_files,
    options_for,
    pixel_set_ups,
    readers,
    unlike,
    unnormalized,
)
from mpcompile.system.progress import PARTS, tracked

# Numbers of images; how many more of them than with the present set-up have to be right to go on to the next number,
# and how many at all. A set-up that is right on 10 points more images goes on with a probability of about 97 %.
ROUNDS = ((16, -2, 0), (64, 0, 1), (256, 8, 8))
FINALISTS = 3  # set-ups that are run on more images than those of the rounds
MOST = 1024  # images
SMALLEST_GAIN = 0.05  # as a share of the images
LEVEL = 1e-3  # of the exact McNemar tests of all set-ups together
LIKE = 0.2  # set-ups whose mean and deviation differ by less than this share of a deviation are not tried
SEED = 0  # of the order of the images; folders list them by class


def better_preprocessing(dense: Run, images: Split, present: Source, head: Head) -> str | None:
    """A sentence, without period, on the best significantly better preprocessing; None if there is none.

    Args:
        dense: the dense engine.
        images: labelled images.
        present: the source whose preprocessing the images have.
        head: how outputs become decisions.
    """
    order = tuple(np.random.default_rng(SEED).permutation(images.order)[:MOST].tolist())
    split = replace(images, order=order)
    first = split.first(min(BATCH, len(split)))
    pixels = unnormalized(first, present)
    if pixels.min() < -0.01 or pixels.max() > 1.01:
        return None  # the images do not have this preprocessing
    now, *others = unlike(pixel_set_ups(present, first), LIKE)
    found = _compared(dense, split, {now: np.zeros(0, bool)}, others, head)
    tried = len(others)
    if has_picture_files(images.images):
        more = crop_set_ups(_best(found, len(split)) or now)
        found = found | _compared(dense, split, {now: found[now]}, more, head)
        tried += len(more)
    level = LEVEL / max(1, tried)
    better = {one: right for one, right in found.items() if _is_better(found[now], right, level)}
    best = _best(better, len(split))
    if best is None:
        return None
    name = best.name.removeprefix(f"{now.name}, ")
    return (
        f"the dense model is right on {found[now].mean():.2%} of {len(split):,} held-out images with the preprocessing "
        f"in use, and on {found[best].mean():.2%} with another usual one, {name}: the preprocessing is not the one of "
        f"its training. Give {options_for(best.source, present)}"
    )


def _is_better(now: NDArray[np.bool_], other: NDArray[np.bool_], level: float) -> bool:
    """Whether a set-up that was run on as many images as the present one is right on significantly more of them."""
    return len(now) == len(other) and is_better(now, other, level, SMALLEST_GAIN)


def _best(found: Mapping[SetUp, NDArray[np.bool_]], count: int) -> SetUp | None:
    """The set-up that is right most often, of those that were run on all images; of equals, the first."""
    whole = [one for one, right in found.items() if len(right) == count]
    return max(whole, key=lambda one: found[one].sum(), default=None)


def _compared(
    dense: Run, images: Split, present: Mapping[SetUp, NDArray[np.bool_]], others: Sequence[SetUp], head: Head
) -> dict[SetUp, NDArray[np.bool_]]:
    """For each set-up, which images (n,) are right: of all images, or of the first rounds if it fell behind there.

    `present` has the present set-up, and its answers so far.
    """
    [(now, known)] = present.items()
    read, as_now, transform_of = readers(images.images, now.source)
    transforms = {now: as_now} | {one: transform_of(one.source) for one in others}
    found = {one: np.zeros(0, bool) for one in transforms}
    running, done = list(others), 0
    rounds = (*ROUNDS, (len(images), 0, 0))
    for end, gain, least in tracked(rounds, lambda stage: f"the first {min(stage[0], len(images))} images", PARTS):
        while running and done < min(end, len(images)):
            indices = images.order[done : min(end, done + BATCH)]
            pictures = [read(index) for index in indices]
            labels = torch.tensor([label for _, label in pictures]).numpy()
            for one in tracked((now, *running), lambda one: one.name, "preprocessings"):
                if one is now and len(known) >= done + len(indices):
                    answers = known[done : done + len(indices)]
                else:
                    batch = torch.stack([transforms[one](picture) for picture, _ in pictures]).numpy()
                    answers = head.right(dense(batch), labels)
                found[one] = np.concatenate([found[one], answers])
            done += len(indices)
        if done >= end:
            least = max(least, found[now].sum() + gain)
            running = [one for one in running if found[one].sum() >= least]
        if end == ROUNDS[-1][0]:  # the last round is the longest
            running = sorted(running, key=lambda one: -found[one].sum())[:FINALISTS]
    found[now] = max(found[now], known, key=len)
    return found
