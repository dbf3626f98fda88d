"""The example images whose decision changed: which are shown, and that a thumbnail is the image."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from mpcompile.ir.head import Head
from mpcompile.ir.source import Source
from mpcompile.measure.changed_examples import SIDE, changed_examples, thumbnail

LOGITS = arrays(np.float32, (12, 4), elements=st.floats(-8, 8, width=32))


@given(LOGITS, LOGITS, st.integers(0, 12))
def test_examples_are_changed_images_in_order_of_the_dense_margin(
    before: np.ndarray, after: np.ndarray, count: int
) -> None:
    found = changed_examples(before, after, np.arange(12) % 4, Head(), count)
    changed = before.argmax(1) != after.argmax(1)
    assert len(found) == min(count, int(changed.sum()))
    margins = [one.dense_margin for one in found]
    assert margins == sorted(margins, reverse=True)
    for one in found:
        assert changed[one.index]
        assert (one.dense, one.compressed) == (before[one.index].argmax(), after[one.index].argmax())
        assert one.label == one.index % 4
        top = np.sort(before[one.index].astype(np.float64))[::-1]
        assert one.dense_margin == pytest.approx(top[0] - top[1])
    if count:  # none that is left out has a larger margin
        left = [n for n in np.flatnonzero(changed) if n not in {one.index for one in found}]
        ends = np.sort(before[left].astype(np.float64), axis=1)
        assert all(ends[:, -1] - ends[:, -2] <= min(margins, default=np.inf))


def test_one_logit_and_ranks_have_examples_and_values_have_none() -> None:
    before, after = np.array([[2.0], [-1.0], [0.5]]), np.array([[1.0], [0.25], [-0.5]])
    [first, second] = changed_examples(before, after, None, Head("sigmoid"), 8)
    assert (first.index, first.dense, first.compressed, first.dense_margin) == (1, 0, 1, 1.0)
    assert (second.index, second.dense, second.compressed, second.compressed_margin) == (2, 1, 0, 0.5)
    assert first.label is None
    for head in (Head("values"), Head("multilabel")):
        assert changed_examples(before, after, None, head, 8) == ()
    maps = np.zeros((3, 2, 4, 4)), np.ones((3, 2, 4, 4))
    assert changed_examples(*maps, None, Head(), 8) == ()


@pytest.mark.parametrize(("channels", "order"), [(1, "rgb"), (3, "rgb"), (3, "bgr")])
def test_a_thumbnail_is_the_image_without_its_normalisation(channels: int, order: str) -> None:
    mean, std = (0.3, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    source = Source("m", "0", "m", (channels, 40, 64), mean, std, channel_order=order)
    shades = torch.linspace(0.1, 0.9, channels).reshape(-1, 1, 1).expand(channels, 40, 64)
    normalised = (shades - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)
    uri = thumbnail(normalised, source)
    assert uri is not None
    picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert picture.size == (64, 40)
    expected = shades[:, 0, 0].numpy()[::-1] if order == "bgr" else shades[:, 0, 0].numpy()
    found = np.asarray(picture, np.float64).reshape(40, 64, -1).mean((0, 1)) / 255
    assert found == pytest.approx(expected, abs=0.02)  # JPEG at this quality moves a flat shade by less


def test_large_images_shrink_and_other_channels_have_no_thumbnail() -> None:
    source = Source("m", "0", "m", (3, 400, 200), (0.5,) * 3, (0.5,) * 3)
    uri = thumbnail(torch.zeros(3, 400, 200), source)
    assert uri is not None
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert picture.size == (SIDE // 2, SIDE)
    assert thumbnail(torch.zeros(4, 8, 8), source) is None
    assert thumbnail(torch.zeros(1, 8, 8), source) is None  # three means for one channel: not what the source says
    assert thumbnail(torch.zeros(16), source) is None
