"""Random views: crops of the same images, the same for the same key, which enter the moments beside the images."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.errors import PassError, UsageError
from mpcompile.passes import NMMask
from mpcompile.passes.reconstruct import calibration_batches
from mpcompile.passes.reconstruct.calibration_batches import PARTS, CalibrationBatches
from mpcompile.passes.reconstruct.layerwise import layerwise
from mpcompile.passes.reconstruct.views import random_view
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.system.distributed import ProcessRank
from mpcompile.testing import tiny_cnn, tiny_data, tiny_mlp


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_views_of_even_images_are_these_images(count: int, channels: int, height: int, width: int, key: int) -> None:
    images = torch.rand(count, channels, 1, 1).expand(-1, -1, height, width).contiguous()
    # Interpolation weights add up to 1 but for float32 rounding.
    torch.testing.assert_close(random_view(images, str(key)), images, rtol=1e-5, atol=1e-6)


def test_a_view_is_a_part_of_its_image() -> None:
    # A ramp from left to right: its values tell where a crop lies, and whether it is mirrored.
    ramp = torch.linspace(0, 1, 64).expand(400, 1, 64, 64).contiguous()
    rows = random_view(ramp, "ramp")[:, 0, 32]
    left, right = rows[:, 4], rows[:, -5]  # away from the edges, where bicubic interpolation overshoots
    spans = (right - left).abs() * 64 / 55
    assert float(spans.max()) <= 1.02
    # The narrowest crop is 0.35 of the area, stretched by 4/3: a width of √(0.35 · 3/4) = 0.51.
    assert 0.49 < float(spans.min()) < 0.65
    mirrored = float((right < left).double().mean())
    assert 0.4 < mirrored < 0.6  # 400 throws of a coin: within four standard deviations


def test_the_key_determines_the_views_and_the_memory_format_is_kept() -> None:
    images = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    one, same, other = (random_view(images, key) for key in ("0 1", "0 1", "0 2"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@pytest.mark.parametrize("views", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_image_and_its_views_are_in_one_part_of_one_rank(
    monkeypatch: pytest.MonkeyPatch, views: int, ranks: int
) -> None:
    images = tiny_data(tiny_mlp(), 90).calibration
    batches = CalibrationBatches(images, torch.float32, views)
    taken: list[int] = []
    for rank in range(ranks):
        monkeypatch.setattr(calibration_batches, "share", lambda rank=rank: ProcessRank(rank, ranks))
        taken += batches.own
        assert len({batches.part(index) for index in batches.own}) == PARTS // ranks
    assert sorted(taken) == [*range(len(batches))]
    assert sum(batches.size(index) for index in taken) == batches.count == len(images) * (1 + views)
    for index in range(len(batches)):
        first = index // (1 + views) * (1 + views)  # the batch of the images themselves
        assert batches.part(index) == batches.part(first)
        [pixels], [own] = batches[index], batches[first]
        assert len(pixels) == batches.size(index)
        assert torch.equal(pixels, own) == (index == first)


def test_views_are_rows_of_the_moments() -> None:
    model = tiny_cnn()
    images = tiny_data(model, 40).calibration
    names = [name for name, _ in model.layers()]

    def counts(views: int) -> list[int]:
        moments = [step.moments for step in layerwise(model, None, images, names, views=views)]
        return [one.count for one in moments if one is not None]

    # Small feature maps, so every position of every image is taken.
    assert counts(2) == [3 * count for count in counts(0)]
    assert len(counts(0)) > 1


def test_a_refit_with_views_differs_and_repeats() -> None:
    def masked(views: int) -> dict[str, torch.Tensor]:
        model = tiny_cnn()
        result, _ = PassManager([NMMask(views=views)]).run(model, tiny_data(model, 40))
        return dict(result.graph.state_dict())

    without, one, same = masked(0), masked(1), masked(1)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, without[name]) for name, value in one.items())


def test_what_has_no_views_is_refused() -> None:
    with pytest.raises(UsageError, match="views is -1; give the number of random views of each image, 0 for none"):
        NMMask(views=-1)
    with pytest.raises(UsageError, match="views is 1; only a refit uses views of the images, and refit is none"):
        NMMask(views=1, refit="none", criterion="magnitude")
    model = tiny_mlp()
    data = tiny_data(model, 40)
    volumes = replace(model, example=torch.zeros(2, 1, 4, 8, 8))
    two_inputs = replace(model, others=(torch.zeros(2, 3),))
    for refused, found in (volumes, r"inputs of the shape \(1, 4, 8, 8\)"), (two_inputs, "several inputs"):
        with pytest.raises(PassError, match=f"the model has {found}; set views to 0"):
            NMMask(views=1).require_inputs(refused, data)
