"""Scales of inputs: against the layer's inputs taken by hand, and the layout on weights of grouped convolutions."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mpcompile.activations import input_scales, per_weight
from mpcompile.capture import capture
from mpcompile.data import ArrayImages, Split
from mpcompile.progress import listening
from mpcompile.testing import tiny_cnn, tiny_mlp, tiny_source


def images(count: int = 40) -> Split:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 8, 8, 1), np.uint8)
    data = ArrayImages(pixels, np.zeros(count, np.int64), 10, torch.tensor([0.5]), torch.tensor([0.5]))
    return Split(data, tuple(range(count)), labelled=True)


def test_scales_are_root_mean_squares_over_every_image() -> None:
    model, split = tiny_mlp(), images()
    found = input_scales(model, split)
    x = torch.cat([batch for batch, _ in split.batches()])
    stem, hidden = model.layer("stem"), model.layer("hidden")
    assert isinstance(stem, nn.Linear)
    first = F.gelu(stem(x.flatten(1)))
    # float32 forward passes in other batch sizes.
    torch.testing.assert_close(found["hidden"], first.double().square().mean(0).sqrt(), rtol=1e-5, atol=0)
    assert found["hidden"].dtype == torch.float64
    second = F.gelu(hidden(first))
    torch.testing.assert_close(found["head"], second.double().square().mean(0).sqrt(), rtol=1e-5, atol=0)


def test_convolutions_have_a_scale_a_channel_and_groups_their_own() -> None:
    model = tiny_cnn()
    found = input_scales(model, images())
    layer = model.layer("grouped")
    assert found["grouped"].shape == (16,)
    laid = per_weight(layer, found["grouped"])
    assert laid.shape == layer.weight.shape
    assert torch.equal(laid[0, :, 0, 0], found["grouped"][:8])
    assert torch.equal(laid[-1, :, 0, 0], found["grouped"][8:])


def test_fetched_weights_are_seen() -> None:
    class Fetched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(64, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.linear(x.flatten(1), self.stem.weight))  # type: ignore[no-any-return]

    found = input_scales(capture(Fetched(), tiny_source()), images())
    assert found["stem"].shape == (64,)


def test_progress_is_told_to_the_one_who_listens() -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda what, done, total: heard.append((what, done, total))):
        input_scales(tiny_mlp(), images(40))
    assert heard == [("image 0", 0, 2), ("image 32", 1, 2)]
    input_scales(tiny_mlp(), images(40))
    assert len(heard) == 2
