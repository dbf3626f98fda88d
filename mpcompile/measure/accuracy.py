"""Comparison of two engines on the same held-out images: accuracy, agreement and change of the outputs."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcompile.data.images import Split
from mpcompile.data.metric_values import MetricValues
from mpcompile.errors import ParityError
from mpcompile.ir.head import Head, head_for
from mpcompile.measure.changed_answers import ChangedAnswers
from mpcompile.measure.changed_examples import changed_examples
from mpcompile.measure.comparison import Accuracy, Comparison
from mpcompile.measure.confidence_comparison import compare_confidence
from mpcompile.measure.dense_check import check_dense, constant_check
from mpcompile.measure.metric_comparison import MetricComparison
from mpcompile.measure.value_errors import ValueDifferences, value_errors

Run = Callable[..., NDArray[np.float32]]  # (images, further inputs …) -> the primary output


def compare(
    dense: Run,
    compressed: Run,
    images: Split,
    observe: Callable[[int], None] = lambda done: None,
    *,
    head: Head | None = None,
    claimed: float | None = None,
    examples: int = 0,
) -> Comparison:
    """The comparison of two engines over all images of a split, batch by batch.

    `dense` and `compressed` return outputs (b, …), such as logits (b, outputs), for images (b, c, h, w). Outputs that
    are values are not kept, since maps of many images would not fit into memory.

    Args:
        dense: the dense engine.
        compressed: the compressed engine.
        images: the images; accuracy is measured if they have labels.
        observe: called with the number of images done.
        head: how outputs become decisions; None chooses it by the shape of the outputs.
        claimed: the accuracy that the checkpoint records, in [0, 1], if it records one.
        examples: how many images whose decision changed are listed at most, without a thumbnail.

    Raises ParityError if outputs are not finite.
    """
    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    labels: list[NDArray[np.int64]] = []
    found = ValueDifferences()
    done, targets = 0, images.targets()
    judged: tuple[list[MetricValues], list[MetricValues]] = ([], [])  # dense and compressed
    digest = hashlib.sha256()
    for given, classes in images.announced():
        inputs = [one.numpy() for one in given]
        for each in zip(*inputs, classes.numpy(), strict=True):  # by image, so that the batch size does not matter
            for array in each:
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        pair = dense(*inputs), compressed(*inputs)
        for name, outputs in zip(("dense", "compressed"), pair, strict=True):
            if not np.isfinite(outputs).all():
                raise ParityError(f"the {name} model returns numbers that are not finite on held-out images")
        head = head_for(head, pair[0])
        if head.decides:
            pairs.append(pair)
            labels.append(classes.numpy())
        else:
            found.add(*pair)
        done += len(inputs[0])
        if images.metric is not None:
            goal = next(targets)
            for values, outputs in zip(judged, pair, strict=True):
                values.append(images.metric.of_batch(outputs, goal))
        observe(done)
    metric = MetricComparison.between(images.metric.name, *judged) if images.metric is not None else None
    if head is not None and not head.decides:
        return _of_values(found, head, metric, digest.hexdigest())
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    truth, labelled = np.concatenate(labels), images.labelled and before.ndim == 2  # a label is not for positions
    head = head_for(head, before)
    shift = np.abs(after - before).reshape(len(before), -1).max(axis=1)
    return Comparison(
        dense=accuracy(before, truth, head) if labelled else None,
        compressed=accuracy(after, truth, head) if labelled else None,
        agreement=float(head.same(before, after).mean()),
        logit_shift_mean=float(shift.mean()),
        logit_shift_p99=float(np.percentile(shift, 99)),
        logit_shift_max=float(shift.max()),
        logit_range=float(np.ptp(before, axis=1).mean() if before.shape[1] > 1 else np.ptp(before)),
        count=len(before),
        turned=_changed(before, after, truth, head) if labelled else None,
        head=head,
        dense_check=check_dense(before, truth if labelled else None, head, claimed),
        metric=metric,
        confidence=compare_confidence(before, after, truth if labelled else None, head),
        positions=math.prod(before.shape[2:]),
        images_sha256=digest.hexdigest(),
        examples=changed_examples(before, after, truth if labelled else None, head, examples),
    )


def _of_values(found: ValueDifferences, head: Head, metric: MetricComparison | None, images_sha256: str) -> Comparison:
    """The comparison of outputs that are values."""
    shift = np.concatenate(found.shifts)
    return Comparison(
        dense=None,
        compressed=None,
        agreement=None,
        logit_shift_mean=float(shift.mean()),
        logit_shift_p99=float(np.percentile(shift, 99)),
        logit_shift_max=float(shift.max()),
        logit_range=float(np.concatenate(found.ranges).mean()),
        count=len(shift),
        head=head,
        dense_check=constant_check(len(shift)) if found.constant else None,
        values=value_errors(found.norms),
        metric=metric,
        images_sha256=images_sha256,
    )


def _changed(before: NDArray[Any], after: NDArray[Any], labels: NDArray[Any], head: Head) -> ChangedAnswers:
    """The answers that became right or wrong."""
    return ChangedAnswers.between(head.right(before, labels), head.right(after, labels))


def accuracy(logits: NDArray[Any], labels: NDArray[Any], head: Head | None = None) -> Accuracy:
    """Accuracy of logits (n, outputs) against labels (n,), or (n, outputs) for multilabel.

    In a tie of two classes the lower index ranks first.
    """
    head = head_for(head, logits)
    if head.kind != "softmax":
        return Accuracy(float(head.right(logits, labels).mean()), None, len(labels))
    order = np.argsort(-logits, axis=1, kind="stable")
    hits = order == labels[:, None]
    top5 = float(hits[:, :5].any(axis=1).mean()) if logits.shape[1] > 5 else None
    return Accuracy(float(hits[:, 0].mean()), top5, len(labels))
