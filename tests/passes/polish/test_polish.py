"""Polish: masks and statistics held, never worse than its start, left alone without a loss, errors."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polish_runs import MASKS, SHORT, images, run, same, weights
from torch import fx

from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.ir.results import Closeness, RateTrial
from mpcompile.passes import Distill, Polish
from mpcompile.passes.polish import polish as the_pass
from mpcompile.passes.polish.budget import FEWEST, StepPlan, affordable_steps, step_plan
from mpcompile.passes.polish.closeness import Judge
from mpcompile.passes.polish.keep_best import FEWEST_WAITED, KeepBest
from mpcompile.passes.polish.polish import KEPT, best_rate
from mpcompile.passes.polish.runs import training_source
from mpcompile.system.distributed import ProcessRank
from mpcompile.testing import Noise, tiny_cnn, tiny_mlp, tiny_vit

BUILDS = [tiny_vit, tiny_cnn, tiny_mlp]


@pytest.mark.parametrize("build", BUILDS)
def test_it_brings_the_outputs_closer_and_holds_masks_and_statistics(
    build: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(the_pass, "RATES", (1e-3, 5e-3, 2e-2))  # for 30 steps on a tiny model
    masked, _ = run(build(), MASKS)
    result, record = run(build(), MASKS, SHORT)
    polished = result.polished
    assert polished is not None
    assert polished.kept_start is None
    assert result.trained
    assert polished.after.divergence < 0.9 * polished.before.divergence
    assert polished.steps == 40
    assert sum(trial.steps for trial in polished.trials) + polished.taken <= 40
    assert {trial.rate for trial in polished.trials} == set(the_pass.RATES)
    assert not same(weights(masked), weights(result))
    assert masked.masks()
    for name, mask in masked.masks().items():
        assert torch.equal(mask, result.masks()[name])
        assert (result.layer(name).weight[~mask] == 0).all()
    before, after = weights(masked), weights(result)
    for name in before:
        if "running" in name or "num_batches" in name:
            assert torch.equal(before[name], after[name])
    assert all(parameter.requires_grad for parameter in result.graph.parameters())
    assert f"on {polished.validation} validation images" in record.notes[-1]


@settings(max_examples=12, deadline=None)
@given(rate=st.floats(1e-5, 3.0), seed=st.integers(0, 5), build=st.sampled_from(BUILDS))
def test_it_is_never_worse_than_its_start(rate: float, seed: int, build: Callable[[], Model]) -> None:
    data = images(count=32)
    masked, _ = run(build(), MASKS, data=data)
    result, _ = run(build(), MASKS, Polish(steps=10, batch=8, rate=rate, seed=seed), data=data)
    assert masked.dense is not None
    pictures = data.validation.first(32)
    dense = masked(pictures) if masked.dense is None else dataclasses.replace(masked, graph=masked.dense)(pictures)
    judge = Judge(data.validation, dense, Head())
    start, end = judge.of(masked.graph), judge.of(result.graph)
    assert end.divergence <= start.divergence
    assert end.agreement is not None
    assert start.agreement is not None
    assert end.agreement >= start.agreement
    assert result.polished is not None
    assert (result.polished.before, result.polished.after) == (start, end)
    assert same(weights(masked), weights(result)) == (result.polished.kept_start is not None)


def test_a_hopeless_rate_keeps_the_start_and_says_so() -> None:
    masked, _ = run(tiny_vit(), MASKS)
    for rate, why in ((50.0, "no check on validation images was better"), (1e38, "the loss was not finite")):
        result, record = run(tiny_vit(), MASKS, dataclasses.replace(SHORT, rate=rate))
        assert same(weights(masked), weights(result))
        assert result.polished is not None
        assert result.polished.kept_start is not None
        assert why in result.polished.kept_start
        assert record.notes[-1].startswith(f"{KEPT}: ")
        assert not result.trained


def test_a_model_that_loses_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*given: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("mpcompile.passes.polish.runs.TrainingRuns.train", train)
    model = tiny_vit()
    result, record = run(model, SHORT)
    assert same(weights(model), weights(result))
    assert record.notes[-1].startswith(f"{KEPT}: it loses nothing that a training could give back")
    assert result.polished is not None
    assert result.polished.before.divergence < the_pass.NOTHING_LOST


def test_outputs_that_are_values_have_a_squared_error() -> None:
    model = dataclasses.replace(tiny_cnn(), head=Head("values"))
    result, record = run(model, MASKS, SHORT)
    assert result.polished is not None
    assert result.polished.before.agreement is None
    assert result.polished.after.divergence < result.polished.before.divergence
    assert "relative squared error" in record.notes[-1]


def test_too_few_minutes_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcompile.passes.polish.polish.affordable_steps", lambda *given: FEWEST - 1)
    result, record = run(tiny_vit(), MASKS, Polish(minutes=0.5, batch=8))
    assert "0.5 minutes allow 7 steps of 8 images, and 8 are needed; give more minutes" in record.notes[-1]
    assert result.polished is not None
    assert result.polished.taken == 0


def test_minutes_become_steps() -> None:
    result, _ = run(tiny_mlp(), MASKS, Polish(minutes=0.02, batch=8))
    assert result.polished is not None
    assert result.polished.steps >= FEWEST


# ---- its parts


@given(st.integers(FEWEST, 20_000), st.integers(1, 4))
def test_a_plan_spends_all_steps(steps: int, rates: int) -> None:
    plan = step_plan(steps, rates)
    spent = plan.probe * (rates if rates > 1 else 0)
    assert spent + plan.training == steps
    assert spent <= steps / 5
    assert 1 <= plan.checks <= 20
    assert plan.interval * (plan.checks - 1) < plan.training <= plan.interval * plan.checks


@given(st.floats(-5, 1000), st.floats(0.01, 5), st.floats(0, 20))
def test_affordable_steps_fit_the_time(seconds: float, step: float, check: float) -> None:
    steps = affordable_steps(seconds, step, check, check / 2, 3)
    plan = step_plan(steps, 3) if steps else None
    if plan is not None:
        assert steps * step + (plan.checks + (1.5 if plan.probe else 0)) * check <= seconds * (1 + 1e-9)


class Told:
    """A judge that says what it is told."""

    def __init__(self, *pairs: tuple[float, float]) -> None:
        self.pairs = list(pairs)

    def of(self, graph: fx.GraphModule) -> Closeness:
        divergence, agreement = self.pairs.pop(0)
        return Closeness(divergence, 1.0, agreement)


def test_the_best_is_kept_only_if_no_measure_is_worse() -> None:
    graph, start = tiny_mlp().graph, Closeness(1.0, 1.0, 0.8)
    told = Told((0.9, 0.7), (0.95, 0.8), (0.97, 0.9), (0.99, 0.9), (0.99, 0.9))
    best = KeepBest(told.of, start, StepPlan(0, 16, 2))
    for step in range(1, 11):
        assert not best.ended
        best.after_step(step, graph)
    assert best.best == Closeness(0.95, 1.0, 0.8)
    assert best.ended  # the lowest divergence is FEWEST_WAITED checks ago
    other = KeepBest(told.of, start, StepPlan(0, 16, 2))
    other.restore(best.state())
    assert (other.best, other.lowest, other.waited, other.taken) == (best.best, 0.9, FEWEST_WAITED, 10)
    assert other.weights is not None
    assert best.weights is not None
    assert same(other.weights, best.weights)


def test_the_largest_rate_with_about_the_least_divergence_is_taken() -> None:
    def trial(rate: float, divergence: float | None) -> RateTrial:
        return RateTrial(rate, 1, None if divergence is None else Closeness(divergence, 1.0, 1.0))

    assert best_rate((trial(1.0, 0.5), trial(2.0, 0.4), trial(3.0, None))) == 2.0
    assert best_rate((trial(1.0, 0.4), trial(2.0, 0.405), trial(3.0, 0.41))) == 2.0
    assert best_rate((trial(1.0, None),)) is None


def test_images_are_made_smaller_only_where_the_model_takes_them() -> None:
    model = tiny_vit()
    assert training_source(model, images().training) == model.source  # 8 pixels, and no pictures


# ---- errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"minutes": 0.0}, "minutes is 0; it must be above 0 and at most 1440"),
        ({"minutes": math.nan}, "minutes is nan; it must be above 0"),
        ({"minutes": 1441.0}, "minutes is 1441; it must be above 0 and at most 1440"),
        ({"steps": 7}, "steps is 7; give 8 or more, or leave it out"),
        ({"batch": 0}, "batch is 0; give 1 or more images"),
        ({"rate": -1.0}, "rate is -1; give a number above 0, or leave it out"),
        ({"flip": 2.0}, "flip is 2; it must be between 0 and 1"),
        ({"seed": -1}, "seed is -1 and workers 0; give numbers of 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Polish(**options)  # type: ignore[arg-type]


def test_images_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PassError, match="polish trains on images; give --data"):
        run(tiny_vit(), SHORT, data=Data(validation=images().validation))
    with pytest.raises(PassError, match="64 training images do not fill a batch of 65"):
        run(tiny_vit(), dataclasses.replace(SHORT, batch=65))
    with pytest.raises(PassError, match="there are 15 validation images, on which the training is judged, and 16"):
        run(tiny_vit(), SHORT, data=images(count=15))
    monkeypatch.setattr("mpcompile.passes.polish.polish.process_rank", lambda: ProcessRank(0, 2))
    with pytest.raises(UsageError, match="polish runs in one process; start it without torchrun, or use --distill"):
        SHORT.require_inputs(tiny_vit(), images())


def test_it_comes_before_confidence_and_quantize() -> None:
    from mpcompile.driver.pass_order import require_order
    from mpcompile.passes import Confidence, Quantize

    require_order([Distill(), SHORT, Confidence(), Quantize()])
    for late in (Confidence(), Quantize()):
        with pytest.raises(UsageError, match=f"polish comes after {late.name}"):
            require_order([late, SHORT])
    quantised, _ = run(tiny_vit(), Quantize(), data=dataclasses.replace(images(), calibration=images().training))
    with pytest.raises(PassError, match="the model is already quantised; put polish before quantize"):
        SHORT(quantised, images())


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Broken(Noise):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((1, 8, 8), torch.nan), 0

    data = images()
    broken = dataclasses.replace(data.validation, images=Broken((1, 8, 8), 64))
    with pytest.raises(PassError, match="the outputs on validation images are not finite"):
        run(tiny_vit(), MASKS, SHORT, data=dataclasses.replace(data, validation=broken))
