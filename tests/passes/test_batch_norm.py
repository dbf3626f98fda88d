"""Batch-norm correction: restores each channel's mean and variance; is not applied if the logits get worse."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mpcompile.data.images import Data
from mpcompile.errors import PassError
from mpcompile.frontend.capture import capture
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import BatchNorm, NMMask, batch_norm
from mpcompile.passes.batch_norm import match_statistics
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_data, tiny_source, tiny_vit


class Normed(nn.Module):
    """Two convolutions with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3)
        self.norm_a, self.norm_b, self.head = nn.BatchNorm2d(32), nn.BatchNorm2d(32), nn.Linear(32, 5)
        for norm in (self.norm_a, self.norm_b):
            nn.init.uniform_(norm.running_mean, -1, 1)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.2, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_a(self.a(self.stem(x).relu())).relu()
        return self.head(self.norm_b(self.b(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]


def normed() -> Model:
    return capture(Normed().eval(), tiny_source())


def normalised(model: Model, images: Tensor) -> dict[str, Tensor]:
    found = {}
    for name in ("norm_a", "norm_b"):
        model.graph.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: found.update({name: y.double()})
        )
    model(images)
    return found


def test_moved_statistics_give_mean_and_variance_back() -> None:
    model = normed()
    data = tiny_data(model)
    masked, _ = PassManager([NMMask(NM(1, 4), "magnitude", "none")]).run(model, data)
    with torch.no_grad():
        match_statistics(model.graph, masked.graph, data.calibration)
    images = data.calibration.first(64)
    before, after = normalised(model, images), normalised(masked, images)
    for name, wanted in before.items():
        # float32 outputs of some thousand positions.
        torch.testing.assert_close(after[name].mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[name].var((0, 2, 3)), wanted.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_they_are_plain_reestimation_where_the_statistics_were_those_of_the_images() -> None:
    model = normed()
    data = tiny_data(model)
    images = data.calibration.first(64)

    def reestimate(graph: nn.Module) -> None:
        for module in graph.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
                module.train()
        with torch.no_grad():
            graph(images)
        graph.eval()

    reestimate(model.graph)
    masked, _ = PassManager([NMMask(NM(1, 4), "magnitude", "none")]).run(model, data)
    plain = copy.deepcopy(masked.graph)
    reestimate(plain)
    with torch.no_grad():
        match_statistics(model.graph, masked.graph, data.calibration)
    for name, value in plain.state_dict().items():
        if "running" in name:
            # torch's running variance is unbiased, by a thousandth here.
            torch.testing.assert_close(masked.graph.state_dict()[name], value, rtol=5e-3, atol=1e-4)


def test_statistics_are_corrected_if_the_logits_improve() -> None:
    model = normed()
    data = tiny_data(model)
    masked, _ = PassManager([NMMask(NM(1, 4), "magnitude", "none")]).run(model, data)
    corrected, _ = PassManager([BatchNorm()]).run(masked, data)
    images = data.validation.first(64)
    before, after = (float((m(images) - model(images)).square().mean()) for m in (masked, corrected))
    assert after < before


def test_nothing_changes_if_the_logits_do_not_improve() -> None:
    model = normed()
    data = tiny_data(model)
    unchanged, _ = PassManager([BatchNorm()]).run(model, data)
    state = unchanged.graph.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.graph.state_dict().items())
    vit = tiny_vit()
    masked, _ = PassManager([NMMask(NM(2, 4))]).run(vit, tiny_data(vit))
    assert PassManager([BatchNorm()]).run(masked, Data())[0].dense is not None  # no norms, so no images needed


def test_at_most_256_images_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = normed()
    data = tiny_data(model)
    masked, _ = PassManager([NMMask(NM(1, 4), "magnitude", "none")]).run(model, data)
    few, capped = copy.deepcopy(masked.graph), copy.deepcopy(masked.graph)
    with torch.no_grad():
        match_statistics(model.graph, few, replace(data.calibration, order=data.calibration.order[:8]))
        monkeypatch.setattr(batch_norm, "MOST_IMAGES", 8)
        match_statistics(model.graph, capped, data.calibration)
    assert all(torch.equal(value, capped.state_dict()[name]) for name, value in few.state_dict().items())


def test_the_distance_leaves_confidence_out() -> None:
    dense = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    other = dense + 0.5 * torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    assert batch_norm.distance(0.5 * dense, dense, None) < 1e-9 < batch_norm.distance(other, dense, None)
    values = Head("values")
    assert batch_norm.distance(0.5 * dense, dense, values) == pytest.approx(float((0.5 * dense).square().mean()))
    assert batch_norm.distance(dense * float("nan"), dense, None) == float("inf")


def test_calibration_images_are_needed() -> None:
    model = normed()
    masked, _ = PassManager([NMMask(NM(2, 4), "magnitude")]).run(model, Data())
    with pytest.raises(PassError, match="batch-norm statistics are measured on calibration images; give --data"):
        PassManager([BatchNorm()]).run(replace(masked), Data())
