"""The pass quantize: exact integers, masks, plans, the dense model as target, determinism."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from quantize_runs import MASKS, PLAIN, assert_exact, integers_of, run
from torch import Tensor

from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.quantization import quantizers
from mpcompile.ir.weight_groups import flat
from mpcompile.passes import Distill, NMMask, Quantize, ToMe
from mpcompile.passes.quantize import layer_weight, quantize
from mpcompile.passes.quantize.lane_rule import EIGHT_OF_16, LIMIT, PAIRS, LaneRule, reach
from mpcompile.passes.quantize.policy import quantizable
from mpcompile.passes.quantize.rounding import Rounded, nearest, row_scales
from mpcompile.passes.reconstruct.layerwise import LayerStep
from mpcompile.passes.reconstruct.second_moments import LeastSquares
from mpcompile.testing import check_contract, tiny_cnn, tiny_data, tiny_mlp, tiny_source, tiny_vit

MAKERS = [tiny_mlp, tiny_cnn, tiny_vit]
makers = pytest.mark.parametrize("make", MAKERS)


@makers
@pytest.mark.parametrize(
    "step",
    [PLAIN, Quantize("s8", "all", "mse"), Quantize(observer="percentile", refit=False), Quantize(lanes="blocks")],
    ids=["u8", "s8 all", "no refit", "blocks"],
)
def test_weights_are_scale_times_integer_and_masks_hold(make: Callable[[], Model], step: Quantize) -> None:
    model = make()
    data = tiny_data(model, 48)
    masked, _ = run(model, MASKS, data=data)
    result = check_contract(step, masked, data)
    assert_exact(result)
    for name, mask in result.masks().items():
        assert not result.layer(name).weight[~mask].any()
    rules = {"blocks": {EIGHT_OF_16, PAIRS}, "pairs": {PAIRS}}.get(step.lanes, set())
    for name in result.scales() if rules else ():
        kept = result.plan_of(name).mask is not None and result.layer(name).weight.ndim == 2  # not a convolution
        rule = EIGHT_OF_16 if kept and EIGHT_OF_16 in rules else PAIRS
        assert (reach(integers_of(result, name), rule) <= LIMIT).all()


@makers
def test_fp8_weights_are_scale_times_e4m3(make: Callable[[], Model]) -> None:
    result, record = run(make(), Quantize("fp8", "all"))
    assert "activations in FP8, ranges by min-max" in record.notes
    for name, scale in result.scales().items():
        weight = flat(result.layer(name).weight.detach())
        stored = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        assert torch.equal(stored.float() * scale[:, None], weight)
        assert weight.isfinite().all()


@makers
def test_every_layer_has_a_scale_or_a_reason(make: Callable[[], Model]) -> None:
    model = make()
    result, record = run(model, PLAIN)
    reasons = quantizable(model)
    assert set(result.plan) == set(reasons)
    for name, reason in reasons.items():
        plan = result.plan[name]
        assert plan.unquantized == reason
        assert (plan.scale is None) == (plan.rounding_error is None) == (reason is not None)
        if plan.scale is not None:
            assert plan.scale.shape == (len(result.layer(name).weight),)
            # The share of the output's power; 8 bits keep some 40 dB.
            assert 0 <= float(plan.rounding_error or 0) < 0.01
    assert set(record.layers_changed) == set(reasons)
    assert all(module.calibrated for module in quantizers(result.graph).values())


@makers
def test_the_given_model_is_not_changed_and_results_repeat(make: Callable[[], Model]) -> None:
    model = make()
    before, text = copy.deepcopy(model.graph.state_dict()), str(model.graph.graph)
    one, two = (run(model, MASKS, Quantize())[0] for _ in range(2))
    assert str(model.graph.graph) == text
    assert all(torch.equal(value, before[name]) for name, value in model.graph.state_dict().items())
    assert one.graph.state_dict().keys() == two.graph.state_dict().keys()
    for name, value in one.graph.state_dict().items():
        assert torch.equal(value, two.graph.state_dict()[name]), name


def test_float64_models() -> None:
    model = capture(tiny_mlp().graph.double(), tiny_source(), torch.randn(2, 1, 8, 8, dtype=torch.float64))
    result, _ = run(model, PLAIN)
    assert result.graph.get_parameter("hidden.weight").dtype == torch.float64
    assert_exact(result)
    single, _ = run(tiny_mlp(), PLAIN)
    # One integer in a thousand may be rounded the other way.
    difference = integers_of(result, "hidden") - integers_of(single, "hidden")
    assert float((difference != 0).double().mean()) < 0.02


# ---- the target


def by_nearest(
    problem: LeastSquares, mask: Tensor, start: Tensor, *, least: Tensor | float = 0.0, rule: LaneRule | None = None
) -> Rounded:
    """In place of `rounded`: the nearest integers."""
    weight = torch.where(mask, start.double(), 0.0)
    scale = row_scales(weight, least, rule)
    return Rounded(scale, nearest(weight, scale))


@makers
@pytest.mark.parametrize("pattern", [None, NM(1, 4)])
def test_joint_rounding_is_never_worse_than_nearest(
    make: Callable[[], Model], pattern: NM | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer, whose inputs are the same in both runs; of the others, in the mean."""
    passes = [] if pattern is None else [NMMask(pattern)]
    joint, _ = run(make(), *passes, PLAIN)
    monkeypatch.setattr(layer_weight, "rounded", by_nearest)
    plain, _ = run(make(), *passes, PLAIN)
    errors = {
        n: (float(joint.plan[n].rounding_error or 0), float(plain.plan[n].rounding_error or 0)) for n in joint.scales()
    }
    one, other = errors[min(errors, key=[name for name, _ in joint.layers()].index)]
    assert one <= other * (1 + 1e-6)  # the damping of the problem that rounding sees
    # Later layers have other inputs in the two runs; after masks their own error is 10⁴ times that of rounding.
    assert sum(a for a, _ in errors.values()) <= (1 + 1e-4) * sum(b for _, b in errors.values())


def test_the_target_is_the_dense_model() -> None:
    """The refit after masks brings the outputs nearer to those of the dense model, from which the manager keeps it."""
    model = tiny_vit()
    data = tiny_data(model)
    masks = NMMask(NM(2, 4), "magnitude", "none")
    images = data.calibration.first(64)

    def error(*passes: object) -> float:
        return float((run(model, *passes, data=data)[0](images) - model(images)).square().mean())

    assert error(masks, PLAIN) < 0.5 * error(masks, replace(PLAIN, refit=False))


def test_weights_that_the_masks_refitted_are_not_refitted_again() -> None:
    def weight(refit: bool | None, masks: NMMask) -> Tensor:
        return run(tiny_mlp(), masks, replace(PLAIN, refit=refit))[0].layer("hidden").weight.detach()

    refitted, masked = NMMask(NM(2, 4)), NMMask(NM(2, 4), "magnitude", "none")
    assert torch.equal(weight(None, refitted), weight(False, refitted))
    assert not torch.equal(weight(None, refitted), weight(True, refitted))
    assert torch.equal(weight(None, masked), weight(True, masked))
    assert not torch.equal(weight(None, masked), weight(False, masked))


def test_a_dense_model_is_its_own_target() -> None:
    model = tiny_mlp()
    result, record = run(model, PLAIN)
    assert result.dense is not None  # set by the manager, as quantize is the first lossy pass
    assert [note for note in record.notes if "8 bits shift the outputs by" in note]
    assert not any("before 8 bits" in note for note in record.notes)


def test_notes_split_the_shift() -> None:
    _, record = run(tiny_mlp(), MASKS, PLAIN)
    assert any(
        "the outputs shift by" in note and "before 8 bits" in note and "from 8 bits alone" in note and "in all" in note
        for note in record.notes
    )


def test_after_token_merging_the_merged_model_is_the_target() -> None:
    result, record = run(tiny_vit(), MASKS, ToMe(r=2), PLAIN)
    assert_exact(result)
    assert "weights are rounded towards the outputs before 8 bits, since the model got other operations" in " ".join(
        record.notes
    )


def test_after_training_the_trained_model_is_the_target() -> None:
    model = tiny_mlp()
    data = tiny_data(model, 64)
    data = replace(data, training=data.calibration)
    train = Distill(epochs=1, batch=32, warmup=1, rate=1e-2)
    trained, _ = run(model, MASKS, train, data=data)
    result, record = run(model, MASKS, train, PLAIN, data=data)
    assert "since the model was trained after masking" in " ".join(record.notes)
    images = data.validation.first(64)
    near, far = (float((result(images) - other(images)).abs().mean()) for other in (trained, model))
    assert near < 0.2 * far


def test_moments_see_quantised_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}
    original = layer_weight.quantised_weight

    def keep(model: Model, step: LayerStep, *arguments: object, **options: object) -> dict[str, Tensor]:
        assert step.moments is not None
        seen[step.weight.names[0]] = step.moments.problem(centred=False).gram[0]
        return original(model, step, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(quantize, "quantised_weight", keep)
    model = tiny_mlp()
    data = tiny_data(model, 48)
    result, _ = run(model, PLAIN, data=data)
    with torch.no_grad():
        graph = result.graph
        x = F.gelu(graph.get_submodule("stem")(data.calibration.first(48).flatten(1)))
        [quantizer] = quantizers(graph).values()
        x = quantizer(x).double()
    wanted = x.T @ x / len(x)
    # Products of one batch are float32.
    torch.testing.assert_close(seen["hidden"], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
