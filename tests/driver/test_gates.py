"""Gates on accuracy, calibration error and divergence: what holds, what fails, and what cannot be measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mpcompile.cli.parse as parse
from mpcompile.data.images import Data
from mpcompile.driver.gates import gates_of
from mpcompile.driver.preflight import require_consistent, require_inputs
from mpcompile.driver.run_plan import plan_of
from mpcompile.errors import UsageError
from mpcompile.ir.model import Model
from mpcompile.measure.accuracy import compare
from mpcompile.measure.comparison import Comparison
from mpcompile.recipe.schema import Recipe
from mpcompile.report.schema import Gate
from mpcompile.testing import tiny_data, tiny_mlp


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, Data]:
    model = tiny_mlp()
    return model, tiny_data(model)


def recipe(**gates: float) -> Recipe:
    return Recipe.checked({"passes": ["nm-mask"], "gates": gates})


def compared(tiny: tuple[Model, Data], factor: float, labelled: bool = True) -> Comparison:
    """A model whose logits are `factor` times the dense ones."""
    model, data = tiny

    def run(x: np.ndarray, scale: float) -> np.ndarray:
        return (scale * model(torch.from_numpy(x))).numpy()

    images = replace(data.held_out, labelled=labelled)
    return compare(lambda x: run(x, 1.0), lambda x: run(x, factor), images)


def found(gates: tuple[Gate, ...]) -> dict[str, bool]:
    return {gate.name: gate.holds for gate in gates}


def test_divergence_and_calibration_are_limited_beside_accuracy(tiny: tuple[Model, Data]) -> None:
    limits = recipe(max_drop=0.5, max_ece=0.02, max_kl=0.01)
    names = ["top-1 drop in points", "rise of the calibration error", "divergence from the dense model in nats"]
    gates = gates_of(limits, compared(tiny, 1.0))
    assert list(found(gates))[:1] + list(found(gates))[-2:] == names
    assert all(found(gates)[name] for name in names)
    faded = gates_of(limits, compared(tiny, 6.0))
    assert [found(faded)[name] for name in names] == [True, False, False]
    assert str(faded[-1]).endswith("; 0.01 is allowed")
    only = gates_of(recipe(max_kl=0.01), compared(tiny, 6.0, labelled=False))
    assert found(only) == {names[2]: False}


def test_the_measured_values_are_those_of_the_report(tiny: tuple[Model, Data]) -> None:
    comparison = compared(tiny, 0.5)
    one = comparison.confidence
    assert one is not None
    assert one.dense.calibration is not None
    assert one.compressed.calibration is not None
    ece, kl = gates_of(recipe(max_ece=1, max_kl=9), comparison)
    assert ece.found == one.compressed.calibration.error - one.dense.calibration.error
    assert kl.found == one.divergence
    assert ece.holds
    assert kl.holds


def test_what_was_not_measured_does_not_hold(tiny: tuple[Model, Data]) -> None:
    comparison = compared(tiny, 1.0, labelled=False)
    [ece] = gates_of(recipe(max_ece=1), comparison)
    assert not ece.holds
    assert str(ece) == "the calibration error of these outputs could not be measured"
    [kl] = gates_of(recipe(max_kl=1), replace(comparison, confidence=None))
    assert not kl.holds
    assert gates_of(recipe(max_kl=1), None) == ()


def test_small_limits_are_printed_with_their_digits() -> None:
    assert str(Gate(name="x", limit=0.02, found=0.0213, holds=False)) == "x is 0.0213; 0.02 is allowed"
    assert str(Gate(name="x", limit=1.0, found=1.56, holds=False)) == "x is 1.56; 1 is allowed"


@pytest.mark.parametrize(
    ("gates", "more", "error"),
    [
        ({"max_ece": 0.02}, {}, r"a gate on accuracy \(--max-drop\) needs labelled images \(--data\)"),
        ({"max_kl": 0.1}, {}, "a gate on the divergence .* needs held-out images; give --data"),
        ({"max_kl": 0.1}, {"submodule": "body"}, "--max-drop limits a drop of accuracy, and the outputs of a part"),
    ],
)
def test_limits_need_images_and_answers(gates: dict[str, float], more: dict[str, str], error: str) -> None:
    plan = plan_of(Recipe.checked({"passes": ["nm-mask"], "gates": gates, **more}))
    with pytest.raises(UsageError, match=error):
        require_consistent(plan, with_images=bool(more))


def test_limits_that_cannot_be_measured_are_refused(tiny: tuple[Model, Data]) -> None:
    model, data = tiny
    unlabelled = replace(data, held_out=replace(data.held_out, labelled=False), notes=("no labels",))

    def refused(error: str, images: Data, head: str = "auto", **gates: float) -> None:
        plan = plan_of(recipe(**gates).model_copy(update={"head": head}))
        with pytest.raises(UsageError, match=error):
            require_inputs(plan, model, images)

    refused("ece=…. needs labelled images; no labels", unlabelled, max_ece=0.02)
    refused("kl=…. needs held-out images; no images", Data(notes=("no images",)), max_kl=0.1)
    refused("gives ranks or maps; leave ece out", data, "ordinal", max_ece=0.02)
    refused("taken as values, which have none; leave them out", data, "values", max_kl=0.1)
    require_inputs(plan_of(recipe(max_kl=0.1)), model, unlabelled)


def test_limits_on_the_command_line() -> None:
    none = {"max_drop": None, "max_ece": None, "max_kl": None}
    assert parse.drop_limits(None) == none
    assert parse.drop_limits("0.5") == {**none, "max_drop": 0.5}
    assert parse.drop_limits("top1=0.5, ece=0.02,kl=0.1") == {"max_drop": 0.5, "max_ece": 0.02, "max_kl": 0.1}
    assert parse.drop_limits("kl=0.1") == {**none, "max_kl": 0.1}
    for text, error in (
        ("x", "is not a limit; give points of top-1, such as 0.5, or top1=0.5,ece=0.02,kl=0.1"),
        ("eec=1", "did you mean 'ece'?"),
        ("0.5,top1=1", "top1 is there twice"),
        ("kl=", "is not a limit"),
        ("", "is not a limit"),
    ):
        with pytest.raises(UsageError, match=error):
            parse.drop_limits(text)
