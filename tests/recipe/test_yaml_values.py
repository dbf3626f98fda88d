"""Values of a recipe's YAML that YAML 1.1 and 1.2 read differently: refused, text, or the same in both."""

import datetime
import math
from typing import Any

import pytest
import yaml

from mpcompile.driver.run_plan import plan_of
from mpcompile.errors import UsageError
from mpcompile.passes import MPBudget, NMMask, ToMe
from mpcompile.recipe.schema import Recipe
from mpcompile.recipe.strict_yaml import read_yaml, write_yaml


@pytest.mark.parametrize("text", ["010", "-010", "+07", "00", "08", "[1, 010]", "{a: 010}", "!!int 010"])
def test_a_leading_zero_is_refused(text: str) -> None:
    """YAML 1.1 reads 010 as 8, and YAML 1.2 as 10."""
    with pytest.raises(yaml.YAMLError, match="begins with a zero, so YAML 1.1 reads it as octal and YAML 1.2 as dec"):
        read_yaml(text)


@pytest.mark.parametrize("text", ["1:30", "!!int 1:30", "!!int 0x10", "!!int 1_000", "!!float 1:30.5", "!!int [1]"])
def test_a_tag_makes_no_number_of_other_text(text: str) -> None:
    """`!!int 1:30` was 90."""
    if not text.startswith("!!"):
        assert read_yaml(text) == text
        return
    with pytest.raises(yaml.YAMLError, match="is on .*, which is not a decimal number"):
        read_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0", 0), ("-0", 0), ("+5", 5), ("10", 10), ("1e3", 1000.0), ("01.5", 1.5), (".5", 0.5), ("5.", 5.0)),
        *((".inf", math.inf), ("-.inf", -math.inf), ("!!float 3", 3.0), ("!!int 3", 3)),
        *((text, text) for text in ("0o10", "0x10", "0b11", "1_000", "1:30", "12:30:45", "2:4", "1_0.5", "y", "n")),
        *(("'010'", "010"), ("yes", True), ("off", False), ("true", True), ("2024-01-01", datetime.date(2024, 1, 1))),
    ],
)
def test_other_values(text: str, value: Any) -> None:
    found = read_yaml(text)
    assert (found, type(found)) == (value, type(value))
    assert read_yaml(write_yaml(found)) == found


@pytest.mark.parametrize("value", ["010", "0", "yes", "1.5", "2:4", "1e3", "0x10", "2024-01-01", "null", ""])
def test_text_is_written_so_that_it_stays_text(value: str) -> None:
    assert read_yaml(write_yaml([value])) == [value]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{passes: [nm-mask], data: {calibration: 010}}", "recipe is not YAML: the number 010 begins with a zero"),
        ("{passes: [nm-mask], data: {calibration: yes}}", "recipe: data.calibration: found a truth value"),
        ("{passes: [nm-mask], gates: {max_drop: true}}", "recipe: gates.max_drop: found a truth value"),
        ("{passes: [nm-mask], batch: on}", "recipe: batch: found a truth value"),
        ("{passes: [nm-mask], bench: {batches: [1, yes]}}", "recipe: bench.batches.1: found a truth value"),
        ("{passes: [{tome: {r: yes}}]}", "pass tome: r: found a truth value"),
        ("{passes: [{tome: {r: [0, true]}}]}", "pass tome: r.1: found a truth value"),
        ("{passes: [{mp-budget: {seed: no}}]}", "pass mp-budget: seed: found a truth value"),
        ("{passes: [{nm-mask: {exclude: [on]}}]}", "exclude.0: .* valid string; YAML reads words .* text in quotes"),
        ("{passes: [{nm-mask: {exclude: [2024-01-01]}}]}", "exclude.0: .*put text in quotes"),
    ],
)
def test_a_truth_value_is_no_number(text: str, error: str) -> None:
    """`calibration: yes` meant 1 image."""
    with pytest.raises(UsageError, match=error):
        plan_of(Recipe.from_yaml(text))


def test_truth_values_where_they_are_meant() -> None:
    text = "passes: [{mp-budget: {null: no}}, {nm-mask: {repair: off, exclude: ['on']}}, {tome: {r: 1}}]\n"
    plan = plan_of(Recipe.from_yaml(text + "gates: {engine: yes}\ndata: {skip_broken: true}\n"))
    budget, mask, tome = plan.passes
    assert isinstance(budget, MPBudget)
    assert isinstance(mask, NMMask)
    assert isinstance(tome, ToMe)
    assert (budget.null, mask.repair, mask.exclude, tome.r) == (False, False, ("on",), 1)
    assert plan.recipe.gates.engine
    assert plan.recipe.data.skip_broken
