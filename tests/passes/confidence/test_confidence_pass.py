"""The pass gives lost confidence back, changes no answer, and leaves a model alone where it cannot or need not."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from confident_models import CLASSES, Finish, faded, pooled
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.head import Head
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.structure import tensors_of
from mpcompile.measure.confidence import as_logits, divergence
from mpcompile.passes import Certify, Confidence, NMMask, Quantize
from mpcompile.passes.confidence.confidence import FEWEST, LEFT, _why_not
from mpcompile.passes.dense_comparison import outputs_of
from mpcompile.pipeline.checkpoint_file import rest_of, restored
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.testing import tiny_cnn, tiny_data, tiny_mlp, tiny_vit

FOLDED: dict[str, tuple[Finish, Head]] = {
    "linear": (lambda m, x: m.one(pooled(x)), Head()),
    "convolution, then mean": (lambda m, x: m.maps(x).mean((2, 3)), Head()),
    "convolution, then pooling": (lambda m, x: F.adaptive_avg_pool2d(m.maps(x), 1).flatten(1), Head()),
    "map": (lambda m, x: m.maps(x), Head()),
    "mean of two heads": (lambda m, x: (m.one(pooled(x)) + m.other(pooled(x))) / 2, Head()),
    "log-softmax": (lambda m, x: m.one(pooled(x)).log_softmax(1), Head()),
    "probabilities": (lambda m, x: m.one(pooled(x)).softmax(1), Head(probabilities=True)),
    "a sigmoid each, one class": (lambda m, x: m.one(pooled(x)).sigmoid(), Head(probabilities=True)),
    "labels": (lambda m, x: m.one(pooled(x)), Head("multilabel")),
    "labels with a threshold": (lambda m, x: m.one(pooled(x)), Head("multilabel", -0.8)),
    "label probabilities": (lambda m, x: m.one(pooled(x)).sigmoid(), Head("multilabel", 0.5, True)),
    "a learned scale": (lambda m, x: m.scale.exp() * m.one(pooled(x)) / m.scale, Head()),
    "ranks": (lambda m, x: m.maps(x).mean((2, 3)), Head("ordinal", 0.4)),
}  # fmt: skip


def outputs(model: Model, data: Data) -> torch.Tensor:
    with torch.no_grad():
        return outputs_of(model.graph, data.held_out)


def dense_outputs(model: Model, data: Data) -> torch.Tensor:
    assert model.dense is not None
    with torch.no_grad():
        return outputs_of(model.dense, data.held_out)


def run(model: Model, data: Data, step: Confidence | None = None) -> tuple[Model, str, float]:
    """The result, the pass's note and the factor (1 if none)."""
    result = (step or Confidence())(replace(model, graph=copy.deepcopy(model.graph)), data.for_passes())
    factors = {plan.logit_factor for plan in result.plan.values() if plan.logit_factor is not None}
    assert len(factors) <= 1
    return result, result.notes[-1], factors.pop() if factors else 1.0


@pytest.mark.parametrize("kind", FOLDED)
def test_confidence_comes_back_and_every_answer_stays(kind: str) -> None:
    finish, head = FOLDED[kind]
    model, data = faded(finish, head)
    result, note, factor = run(model, data)
    assert factor == pytest.approx(1 / 0.4, rel=0.15), note
    before, after, dense = outputs(model, data), outputs(result, data), dense_outputs(model, data)
    assert torch.equal(head.decisions(before), head.decisions(after))
    # The fold is exact to rounding.
    (z, rule), (w, _) = as_logits(before, head), as_logits(after, head)
    t = 0.0 if rule.kind == "softmax" else rule.threshold
    wanted = t + factor * (z.double() - t)
    if rule.kind == "softmax":
        wanted, w = wanted.log_softmax(1), w.double().log_softmax(1)
    torch.testing.assert_close(w.double(), wanted, rtol=1e-4, atol=1e-4)
    now, then = divergence(dense, after, head), divergence(dense, before, head)
    assert now is not None
    assert then is not None
    assert now < 0.1 * then
    assert "nats" in note


def test_one_output_is_scaled_around_its_threshold() -> None:
    head = Head("sigmoid", 0.9)
    model, data = faded(lambda m, x: m.one(pooled(x)), head, outputs=1)
    result, _, factor = run(model, data)
    assert factor == pytest.approx(2.5, rel=0.2)
    assert torch.equal(outputs(model, data) > 0.9, outputs(result, data) > 0.9)


REFUSED: dict[str, tuple[Finish, Head, str]] = {
    "rectifier": (lambda m, x: m.one(pooled(x)).relu(), Head(), "relu"),
    "product of two values": (lambda m, x: m.one(pooled(x)) * m.other(pooled(x)), Head(), "product of two values"),
    "quotient": (lambda m, x: m.one(pooled(x)) / m.other(pooled(x)), Head(), "divided by a value that depends"),
    "reciprocal": (lambda m, x: 1.0 / m.one(pooled(x)), Head(), "divided by a value that depends"),
    "parameter added": (lambda m, x: m.one(pooled(x)) + m.scale * m.one.bias, Head(), "a constant is added"),
    "times zero": (lambda m, x: m.one(pooled(x)) * 0.0, Head(), "times 0"),
    "no layer": (lambda m, x: pooled(x) @ m.one.weight.T, Head(), "whose weights belong to no layer"),
    "learned scale, threshold": (lambda m, x: m.one(pooled(x)) * m.scale, Head("multilabel", 1.0), "cannot pass"),
    "constant added": (lambda m, x: m.one(pooled(x)) + 1.0, Head(), "a constant is added"),
    "values used elsewhere": (lambda m, x: (m.one(pooled(x)), m.one(pooled(x)).relu()), Head(), "applied elsewhere"),
    "another output": (lambda m, x: (lambda z: (z, z.relu()))(m.one(pooled(x))), Head(), "beside the logits"),
    "threshold through a sum": (lambda m, x: m.maps(x).sum((2, 3)), Head("multilabel", 1.0), "cannot pass"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_folded_is_left_alone_and_told(kind: str) -> None:
    finish, head, why = REFUSED[kind]
    model, data = faded(finish, head)
    result, note, factor = run(model, data)
    assert factor == 1
    assert torch.equal(outputs(model, data), outputs(result, data))
    assert note.startswith(f"{LEFT}: a factor on the logits cannot be folded into weights, since ")
    assert why in note


def test_a_threshold_needs_a_bias() -> None:
    model, data = faded(lambda m, x: m.one(pooled(x)), Head("multilabel", 0.5), bias=False)
    assert "one has no bias" in run(model, data)[1]
    assert run(*faded(lambda m, x: m.one(pooled(x)), Head("multilabel"), bias=False))[2] > 2


def test_shared_weights_are_not_scaled() -> None:
    model, data = faded(lambda m, x: m.one(pooled(x)) + m.other(pooled(x)))
    assert run(model, data)[2] > 2
    model.graph.get_submodule("other").weight = model.graph.get_submodule("one").weight
    assert "one shares its weight or bias with other" in run(model, data)[1]


def test_values_have_no_confidence() -> None:
    model, data = faded(lambda m, x: m.one(pooled(x)), Head("values"))
    assert run(model, data)[1] == f"{LEFT}: the outputs are values, which have none"


def test_a_model_that_lost_nothing_is_left_alone() -> None:
    model, data = faded(lambda m, x: m.one(pooled(x)))
    assert model.dense is not None
    model = replace(model, graph=copy.deepcopy(model.dense))
    assert run(model, data)[1].startswith(f"{LEFT}: the outputs are those of the dense model")
    result, records = PassManager([Confidence()]).run(replace(model, dense=None), data)
    assert "the outputs are those of the dense model" in records[0].notes[-1]
    assert records[0].drift == 0
    assert not any(plan.logit_factor for plan in result.plan.values())


def test_a_factor_near_one_is_not_worth_a_change() -> None:
    model, data = faded(lambda m, x: m.one(pooled(x)))
    with torch.no_grad():
        assert model.dense is not None
        for name in ("one.weight", "one.bias"):
            model.graph.get_parameter(name).copy_(0.996 * model.dense.get_parameter(name))
    result, note, factor = run(model, data)
    assert factor == 1
    assert torch.equal(outputs(model, data), outputs(result, data))
    assert "which is too close to 1 to matter" in note


def noisy(factor: float, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense logits, and compressed ones that are `factor` times them but for an error of each image of its own."""
    rng = torch.Generator().manual_seed(0)
    dense = 2 * torch.randn(200, 4, generator=rng)
    return dense, factor * dense + noise * torch.randn(200, 4, generator=rng)


def test_noise_is_left_alone() -> None:
    for factor, why in ((0.95, "which is 1 within its noise"), (0.98, "on unseen images (standard error")):
        dense, now = noisy(factor, 0.3)
        fit, gain = Confidence()._chosen(dense, now, Head())
        assert (fit.factor, fit.bias) == (1.0, None)
        assert why in _why_not(dense, now, Head(), gain)
    assert Confidence()._chosen(*noisy(0.6, 0.3), Head())[0].factor > 1.3


def test_few_images_are_told() -> None:
    model, data = faded(lambda m, x: m.one(pooled(x)))
    few = replace(data, validation=replace(data.validation, order=tuple(range(FEWEST - 1))))
    assert f"{FEWEST - 1} validation images are too few" in run(model, few)[1]


def test_calibration_images_are_used_without_validation_images_and_this_is_told() -> None:
    model, data = faded(lambda m, x: m.one(pooled(x)))
    _, note, factor = run(model, Data(calibration=data.calibration))
    assert factor > 2
    assert "on 64 calibration images" in note
    assert "the factor is too small" in note
    with pytest.raises(PassError, match="fitted on validation images; give --data"):
        Confidence().require_inputs(model, Data())


def test_biases_are_fitted_where_they_pay() -> None:
    model, data = faded(lambda m, x: m.one(pooled(x)))
    with torch.no_grad():
        model.graph.get_parameter("one.bias").add_(torch.arange(CLASSES) / 2)
    dense = dense_outputs(model, data)
    plain, biased = (run(model, data, Confidence(bias=bias)) for bias in (False, True))
    assert "a bias of each output" in biased[1]
    losses = [divergence(dense, outputs(one[0], data)) for one in (plain, biased)]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[1] < 0.3 * losses[0]


def test_biases_are_not_fitted_to_noise() -> None:
    fit, _ = Confidence(bias=True)._chosen(*noisy(0.5, 0.3), Head())
    assert fit.factor > 1.5
    assert fit.bias is None


def test_masks_certificates_and_quantisation_come_after_it() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    steps: list[Pass] = [NMMask(NM(1, 4)), Confidence(), Quantize(), Certify(attribute=16)]
    result, records = PassManager(steps).run(model, data)
    without, _ = PassManager([NMMask(NM(1, 4))]).run(model, data)
    assert all(torch.equal(result.plan_of(name).mask, mask) for name, mask in without.masks().items())  # type: ignore[arg-type]
    assert records[1].notes
    assert result.certificate is not None
    with pytest.raises(PassError, match="put confidence before quantize"):
        PassManager([NMMask(NM(1, 4)), Quantize(), Confidence()]).run(model, data)


def test_8_bits_keep_the_factor_of_a_quantised_head() -> None:
    """A refit to the dense model's logits would take it back."""
    model, data = faded(lambda m, x: m.one(pooled(x)), keep=1.0)
    with torch.no_grad():
        for value in model.layer("one").parameters():
            value.mul_(3)
    scaled = model.with_plan({"one": LayerPlan(logit_factor=3.0)})
    result = Quantize(include=("one",))(replace(scaled, graph=copy.deepcopy(scaled.graph)), data.for_passes())
    assert result.plan_of("one").scale is not None
    wanted, found = outputs(scaled, data), outputs(result, data)
    assert float((wanted * found).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("make", [tiny_mlp, tiny_cnn, tiny_vit])
def test_it_never_loses_on_the_images_it_is_fitted_on(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    data = tiny_data(model)
    masked, _ = PassManager([NMMask(NM(1, 4))]).run(model, data)
    result, _, _ = run(masked, data)
    assert masked.dense is not None
    with torch.no_grad():
        dense, before, after = (outputs_of(g, data.validation) for g in (masked.dense, masked.graph, result.graph))
    losses = [divergence(dense, side) for side in (before, after)]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[1] <= losses[0]
    assert torch.equal(before.argmax(1), after.argmax(1))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 3), st.integers(0, 1000))
def test_no_answer_changes_whatever_was_lost(keep: float, seed: int) -> None:
    """Up to ties: the largest output before is the largest after, to rounding."""
    model, data = faded(lambda m, x: m.one(pooled(x)), keep=keep)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(seed)
        for name in ("one.weight", "one.bias"):
            value = model.graph.get_parameter(name)
            value.add_(0.3 * keep * torch.randn(value.shape, generator=rng))
    result, _, factor = run(model, data)
    assert factor > 0
    before, after = outputs(model, data), outputs(result, data)
    chosen = after.gather(1, before.argmax(1, keepdim=True))
    assert bool((after.amax(1, keepdim=True) - chosen <= 1e-5 * after.abs().max()).all())


def test_a_checkpoint_keeps_the_factor() -> None:
    result, _, factor = run(*faded(lambda m, x: m.one(pooled(x))))
    assert factor > 2
    back = restored(result, rest_of(result), tensors_of(result))
    assert back.plan_of("one").logit_factor == factor


def test_parts_are_at_least_two() -> None:
    with pytest.raises(UsageError, match="parts is 1; give 2 or more"):
        Confidence(parts=1)
