"""Refits of dense layers after masked ones: which layers, how accurate, and when they are undone."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpcompile.data.images import Data
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask, Restore
from mpcompile.passes.reconstruct import cross_validation
from mpcompile.passes.reconstruct.cross_validation import Strength
from mpcompile.passes.reconstruct.dense_layers import layers_downstream, layers_to_repair
from mpcompile.passes.reconstruct.layer_rows import columns, rows_of
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_cnn, tiny_data, tiny_vit

MASK = NMMask(NM(2, 4), exclude=("grouped", "odd"))  # masks `body` alone; depthwise, grouped … come after it


def run(step: NMMask, model: Model, data: Data) -> Model:
    result, _ = PassManager([step]).run(model, data)
    return result


def inputs_and_outputs(model: Model, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.layer(name)
    handle = layer.register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
    with torch.no_grad():
        model.graph(images)
    handle.remove()
    return seen[0]


def test_dense_layers_after_masked_ones_are_refitted() -> None:
    model = tiny_cnn()
    reasons = dict.fromkeys(("stem", "depthwise", "grouped", "odd", "widen", "head"), "it stays dense")
    assert layers_downstream(model, ["body"]) == {"depthwise", "grouped", "odd", "widen", "head"}
    assert layers_to_repair(model, ["body"], reasons) == [
        "depthwise",
        "grouped",
        "odd",
        "widen",
    ]  # the head is an output
    assert layers_to_repair(model, ["odd"], reasons | {"widen": "excluded by 'w*'"}) == []
    assert layers_to_repair(model, ["head"], reasons) == []


@pytest.mark.parametrize("step", [NMMask(NM(2, 4)), MASK])
def test_no_other_layer_changes(step: NMMask) -> None:
    model = tiny_cnn()
    data, dense = tiny_data(model), copy.deepcopy(model.graph.state_dict())
    result = run(step, model, data)
    fitted = {name for name, plan in result.plan.items() if plan.relative_error is not None}
    masked = set(result.patterns())
    assert fitted - masked == {"depthwise", "widen"}  # not the layers excluded by name
    for name, value in result.graph.state_dict().items():
        layer = name.rpartition(".")[0]
        assert torch.equal(value, dense[name]) is (layer not in fitted), name
    without, _ = PassManager([NMMask(NM(2, 4), exclude=step.exclude, repair=False)]).run(model, data)
    assert {name for name, plan in without.plan.items() if plan.relative_error is not None} == masked


@pytest.mark.parametrize(("damping", "share"), [(0.02, 1.0), (0.3, 0.6)])
def test_the_fit_is_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch, damping: float, share: float) -> None:
    monkeypatch.setattr(cross_validation, "chosen_strength", lambda *_: Strength(damping, share))
    model = tiny_cnn()
    data = tiny_data(model)
    result = run(replace(MASK, gain=False), model, data)
    images = data.calibration.first(len(data.calibration))
    x, _ = inputs_and_outputs(result, "depthwise", images)
    _, wanted = inputs_and_outputs(model, "depthwise", images)
    layer, own = result.layer("depthwise"), model.layer("depthwise").weight.detach().double().flatten(1).numpy()
    assert isinstance(layer, nn.Conv2d)
    rows, y = columns(layer, x).double().numpy(), rows_of(layer, wanted).double().numpy()
    power = [np.var(channel, axis=0).mean() for channel in rows]
    for channel in range(16):
        # Ridge regression towards the layer's own weights, as extra rows of the system; about the means.
        a = rows[channel] - rows[channel].mean(0)
        b = share * (y[:, channel] - y[:, channel].mean()) + (1 - share) * a @ own[channel]
        pull = np.sqrt(damping * power[channel] * len(a))
        system = np.concatenate([a, pull * np.eye(9)])
        weight = np.linalg.lstsq(system, np.concatenate([b, pull * own[channel]]), rcond=None)[0]
        # Weights are stored in float32; sums of products of inputs are too.
        np.testing.assert_allclose(layer.weight[channel].detach().flatten().numpy(), weight, rtol=1e-3, atol=1e-5)
        bias = y[:, channel].mean() - rows[channel].mean(0) @ weight
        assert layer.bias is not None
        assert float(layer.bias[channel].detach()) == pytest.approx(bias, abs=1e-4)


def test_the_refit_lowers_the_error_of_the_layer() -> None:
    model = tiny_cnn()
    data = tiny_data(model)
    images = data.calibration.first(len(data.calibration))
    _, wanted = inputs_and_outputs(model, "depthwise", images)

    def lost(repair: bool) -> float:
        step = NMMask(NM(1, 4), exclude=MASK.exclude, repair=repair)
        _, found = inputs_and_outputs(run(step, model, data), "depthwise", images)
        return float((found - wanted).double().square().sum())

    # The refit minimizes this error plus the ridge term, which is 0 at the original weights: the error cannot grow.
    assert lost(True) < lost(False)


def test_repair_changes_nothing_in_a_transformer_whose_layers_are_all_masked() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    with_it, without = (run(NMMask(NM(2, 4), repair=repair), model, data) for repair in (True, False))
    for (name, one), other in zip(with_it.graph.state_dict().items(), without.graph.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_restore_undoes_refits_without_a_masked_layer_before_them() -> None:
    model = tiny_cnn()
    data = tiny_data(model)
    result, _ = PassManager([NMMask(NM(2, 4), include=("odd",)), Restore(max_shift=0.0)]).run(model, data)
    assert not result.patterns()
    assert all(plan.relative_error is None for plan in result.plan.values())
    for name, value in result.graph.state_dict().items():
        assert torch.equal(value, model.graph.state_dict()[name]), name
