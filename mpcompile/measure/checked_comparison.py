"""The comparison of two engines on held-out images, with all checks of whether the dense model's accuracy can be right.

`compile` makes its report and its gate from this comparison; benchmarks/gate.py measures what the checks notice.
"""

from dataclasses import replace

from mpcompile.data.images import Split
from mpcompile.ir.head import Head
from mpcompile.ir.source import Source
from mpcompile.measure.accuracy import Run, compare
from mpcompile.measure.changed_examples import with_thumbnails
from mpcompile.measure.comparison import Comparison
from mpcompile.measure.preprocessing_check import better_preprocessing


def checked_comparison(
    dense: Run,
    compressed: Run,
    images: Split,
    source: Source,
    head: Head | None,
    claimed: float | None,
    examples: int = 0,
) -> Comparison:
    """The comparison on a split that is not empty; `dense_check.reasons` has what contradicts the dense accuracy.

    Args:
        dense: the dense engine.
        compressed: the compressed engine.
        images: the held-out images, preprocessed as `source` says.
        source: the source of the model.
        head: how outputs become decisions; None chooses it by the number of outputs.
        claimed: the accuracy that the checkpoint records, in [0, 1], if it records one.
        examples: how many images whose decision changed are listed at most, each with a thumbnail.

    If the images have labels and one decision each, other usual preprocessings are tried on some of them. Raises
    ParityError if outputs are not finite.
    """
    found = compare(dense, compressed, images, head=head, claimed=claimed, examples=examples)
    found = replace(found, examples=with_thumbnails(found.examples, images, source))
    check = found.dense_check
    if not images.labelled or check is None or found.head is None or check.commonest is None:
        return found
    better = better_preprocessing(dense, images, source, found.head)
    if better is None:
        return found
    return replace(found, dense_check=replace(check, reasons=(better, *check.reasons)))
