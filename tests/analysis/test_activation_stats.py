"""Input scales: compared with inputs computed by hand, and their layout on the weights of grouped convolutions."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpcompile.analysis.activation_stats import FIRST_IMAGES, conditional_scales, input_scales, per_weight
from mpcompile.analysis.layer_interpreter import LayerInterpreter
from mpcompile.data.images import Split
from mpcompile.data.npz import ArrayImages
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.system.progress import listening
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
    # float32 forward passes with different batch sizes.
    torch.testing.assert_close(found["hidden"], first.double().square().mean(0).sqrt(), rtol=1e-5, atol=0)
    assert found["hidden"].dtype == torch.float64
    second = F.gelu(hidden(first))
    torch.testing.assert_close(found["head"], second.double().square().mean(0).sqrt(), rtol=1e-5, atol=0)


def test_grouped_convolutions_have_a_scale_for_each_channel_of_each_group() -> None:
    model = tiny_cnn()
    found = input_scales(model, images())
    layer = model.layer("grouped")
    assert found["grouped"].shape == (16,)
    laid = per_weight(layer, found["grouped"])
    assert laid.shape == layer.weight.shape
    assert torch.equal(laid[0, :, 0, 0], found["grouped"][:8])
    assert torch.equal(laid[-1, :, 0, 0], found["grouped"][8:])


@pytest.mark.parametrize(("make", "name", "groups"), [(tiny_mlp, "hidden", 1), (tiny_cnn, "grouped", 2)])
def test_conditional_scales_are_the_residual_of_a_regression(make: Callable[[], Model], name: str, groups: int) -> None:
    model, split = make(), images()
    seen: list[torch.Tensor] = []
    LayerInterpreter(model.graph, lambda n, layer, x, y: seen.append(x.detach()) if n == name else None).run(
        split.first(40)
    )
    x = seen[0].double()
    rows = (x if x.ndim == 2 else x.movedim(1, -1).flatten(0, -2)).numpy()
    # Rows are collected in whole batches of 32 images until there are enough.
    per = rows.shape[1] // groups
    rows = rows[: len(rows) * 32 // 40] if len(rows) * 32 // 40 >= 16 * per else rows
    found = conditional_scales(model, split)[name].numpy()
    for group in range(groups):
        own = rows[:, group * per : (group + 1) * per] - rows[:, group * per : (group + 1) * per].mean(0)
        damping = 0.02 * np.square(own).mean() * len(own)
        for channel in range(per):
            others = np.delete(own, channel, axis=1)
            coefficients = np.linalg.solve(others.T @ others + damping * np.eye(per - 1), others.T @ own[:, channel])
            # The ridge residual with its damping: 1 / [(C + λI)⁻¹]_cc by block inversion.
            residual = own[:, channel] @ own[:, channel] + damping - own[:, channel] @ others @ coefficients
            assert found[group * per + channel] == pytest.approx(np.sqrt(residual / len(own)), rel=1e-4)  # float32


def test_no_image_is_run_that_adds_nothing() -> None:
    model, every = tiny_cnn(), images(40)
    rows = 0

    def watched(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    model.layer("grouped").register_forward_pre_hook(watched)
    some = conditional_scales(model, every, ["grouped"])
    # The first batch has more positions than its 8 channels a group need.
    assert rows == FIRST_IMAGES + 32
    assert torch.equal(some["grouped"], conditional_scales(model, every)["grouped"])
    assert rows == FIRST_IMAGES + 32 + FIRST_IMAGES + 40  # the last layer has one row an image, and never enough


def test_constant_channels_and_constant_inputs_have_finite_scales() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            with torch.no_grad():
                self.stem.weight[:4] = 0
                self.body.weight.zero_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.stem(x.flatten(1))))  # type: ignore[no-any-return]

    found = conditional_scales(capture(Constant().eval(), tiny_source()), images())
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert float(found["body"][:4].max()) < float(found["body"][4:].min())


def test_functional_layers_are_seen() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(64, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.linear(x.flatten(1), self.stem.weight))  # type: ignore[no-any-return]

    found = input_scales(capture(Functional(), tiny_source()), images())
    assert found["stem"].shape == (64,)


def test_progress_is_reported_to_the_listener() -> None:
    events: list[tuple[str, int, int]] = []
    with listening(lambda what, done, total: events.append((what, done, total))):
        input_scales(tiny_mlp(), images(40))
    assert events == [("image 0", 0, 40), ("image 32", 32, 40)]
    input_scales(tiny_mlp(), images(40))
    assert len(events) == 2
