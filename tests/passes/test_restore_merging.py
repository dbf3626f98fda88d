"""Restore attributes a loss to token merging or to the masks, and reduces the one that causes it."""

import logging
from dataclasses import replace

import pytest
from torch import Tensor

from mpcompile.analysis.block_macs import merges
from mpcompile.data.images import Data, Split
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask, Restore, ToMe
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_data, tiny_vit


class Labelled:
    """Images in memory with these labels."""

    classes = 10

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])


def shift(model: Model, dense: Model, data: Data) -> float:
    """The measure of `max_shift`."""
    images = data.validation.first(len(data.validation))
    before, after = dense(images), model(images)
    return float((after - before).abs().amax(1).mean() / (before.amax(1) - before.amin(1)).mean())


def masked(model: Model) -> set[str]:
    return {name for name, plan in model.plan.items() if plan.mask is not None}


def test_masks_are_kept_if_token_merging_alone_exceeds_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    """All masks were given back, and the limit was still exceeded."""
    model = tiny_vit()
    data = tiny_data(model)
    mild = (NMMask(NM(15, 16)), ToMe(r=7))
    merged, _ = PassManager([ToMe(r=7)]).run(model, data)
    alone, _ = PassManager([NMMask(NM(15, 16))]).run(model, data)
    limit = shift(merged, model, data) / 2
    assert shift(alone, model, data) < limit / 2
    with caplog.at_level(logging.WARNING, "mpcompile"):
        result, records = PassManager([*mild, Restore(max_shift=limit)]).run(model, data)
    assert masked(result) == masked(alone)
    assert shift(result, model, data) <= limit
    found = merges(result.graph, result.example)
    assert 0 < sum(found) < 14
    note = records[-1].notes[-1]
    assert note.startswith("token merging without masks shifts the outputs by ")
    assert "of their range on 64 validation images, and the masks without token merging by " in note
    assert note.endswith(
        f"Fewer tokens are merged after each attention: {found[0]}, {found[1]} instead of 7, 4. No mask was given back"
    )
    assert records[-1].notes[-1] in caplog.text


def test_tokens_stay_merged_if_the_masks_lose_more() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    both = (NMMask(NM(1, 16), "magnitude", "none"), ToMe(r=1))
    merged, _ = PassManager([ToMe(r=1)]).run(model, data)
    total, _ = PassManager(both).run(model, data)
    limit = (2 * shift(merged, model, data) + shift(total, model, data)) / 3
    result, records = PassManager([*both, Restore(max_shift=limit)]).run(model, data)
    assert shift(result, model, data) <= limit
    assert masked(result) < masked(total)
    assert merges(result.graph, result.example) == (1, 1)
    count = len(masked(total) - masked(result))
    assert f"As many tokens are merged as before. {count} masked layers were restored" in records[-1].notes[-1]


def test_a_limit_of_zero_gives_the_dense_model_back() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    result, _ = PassManager([NMMask(NM(2, 4)), ToMe(r=4), Restore(max_shift=0.0)]).run(model, data)
    assert merges(result.graph, result.example) == (0, 0)
    assert shift(result, model, data) == 0


def test_a_limit_on_accuracy_is_attributed_in_points() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    images = data.validation.first(len(data.validation))
    labels = model(images).argmax(1)  # the dense model is always right
    data = replace(data, validation=Split(Labelled(images, labels), tuple(range(len(images))), labelled=True))
    passes = (NMMask(NM(15, 16)), ToMe(r=7), Restore(max_drop=0.0))
    result, records = PassManager(passes).run(model, data)
    assert (result(images).argmax(1) == labels).all()
    assert "points of accuracy on 64 validation images, and the masks without token merging" in records[-1].notes[-1]
