"""Runs that cannot be compared are said to be so: other dense models, images, machines or versions."""

from dataclasses import replace
from typing import Any

import pytest
from small_reports import ENVIRONMENT, comparison, int8_report, latencies, of_model, small_report

from mpcompile.measure.comparison import Comparison
from mpcompile.report.comparability import differences, remarks
from mpcompile.report.compared_runs import compared
from mpcompile.report.compared_tables import NOT_MEASURED, runs_table
from mpcompile.report.schema import Report

OTHERS = [
    ({"model": of_model("other.pt", "e" * 64)}, "the dense models", ("accuracy", "speed", "size")),
    ({"comparison": comparison(images="f" * 64)}, "the evaluation images", ("accuracy",)),
    ({"environment": {**ENVIRONMENT, "processor": "Xeon"}}, "the machines", ("speed",)),
    ({"environment": {**ENVIRONMENT, "cores": "64"}}, "the machines", ("speed",)),
    ({"environment": {**ENVIRONMENT, "onnxruntime": "1.31.0"}}, "the versions of the runtime", ("speed",)),
    ({"environment": {**ENVIRONMENT, "N:M kernel": "avx2"}}, "the versions of the runtime", ("speed",)),
]


def with_recipe(**changes: Any) -> Report:
    report = small_report()
    return report.model_copy(update={"recipe": report.recipe.model_copy(update=changes)})


def test_equal_runs_and_runs_of_two_precisions_are_comparable() -> None:
    """A model in int8 is compared with the same dense model in fp32."""
    assert differences(["a", "b"], [small_report(), small_report()]) == ()
    assert differences(["a", "b"], [small_report(), int8_report()]) == ()
    assert remarks(["a", "b"], [small_report(), small_report()]) == ()
    assert not differences(["a"], [small_report()])
    assert not remarks(["a"], [small_report()])


@pytest.mark.parametrize(("changes", "fact", "spoils"), OTHERS)
def test_what_differs_is_told(changes: dict[str, Any], fact: str, spoils: tuple[str, ...]) -> None:
    [found] = differences(["a", "b", "c"], [small_report(), small_report(**changes), small_report()])
    assert (found.fact, found.spoils) == (fact, spoils)
    words = f"{', '.join(spoils[:-1])} and {spoils[-1]}" if len(spoils) > 1 else spoils[0]
    assert found.sentence.startswith(f"Not comparable in {words}: {fact} differ. a, c: ")
    assert "; b: " in found.sentence
    assert found.values[0] == found.values[2] != found.values[1]


def test_targets_threads_and_the_precision_of_dense_are_told() -> None:
    for changes, fact in (
        ({"target": "eager"}, "the targets"),
        ({"batch": 8}, "the targets"),
        ({"bench": small_report().recipe.bench.model_copy(update={"threads": 1})}, "the threads of the runtime"),
        ({"precision": "fp16"}, "the dense models"),
    ):
        assert [row.fact for row in differences(["a", "b"], [small_report(), with_recipe(**changes)])] == [fact]


def test_other_rules_of_right_decisions_are_told() -> None:
    c = comparison()
    assert c.head is not None
    other = replace(c, head=replace(c.head, kind="sigmoid", threshold=0.2))
    [found] = differences(["a", "b"], [small_report(), small_report(comparison=other)])
    assert found.fact == "the decisions that count as right"


def test_the_columns_of_what_is_not_comparable_are_marked() -> None:
    other = small_report(environment={**ENVIRONMENT, "processor": "Xeon"})
    names = [column.name for column in runs_table(compared(["a", "b"], [small_report(), other])).columns]
    assert "speed, batch 1 †" in names
    assert "top-1" in names
    plain = [column.name for column in runs_table(compared(["a", "b"], [small_report(), small_report()])).columns]
    assert not any("†" in name for name in plain)


def test_each_dense_model_has_a_row_with_the_runs_that_were_compared_with_it() -> None:
    reports = [small_report(), int8_report(), small_report(model=of_model("x.pt", "e" * 64))]
    rows = runs_table(compared(["a", "b", "c"], reports)).texts()
    assert [row[0] for row in rows] == ["dense of a, b", "dense of c", "a", "b", "c"]
    images = [small_report(), small_report(comparison=comparison(images="f" * 64)), small_report()]
    rows = runs_table(compared(["a", "b", "c"], images)).texts()
    assert [row[0] for row in rows][:2] == ["dense of a, c", "dense of b"]


def old(c: Comparison) -> Report:
    """A report of a version that wrote no hash of the images."""
    return small_report(comparison=replace(c, images_sha256=None))


def test_without_a_hash_the_known_facts_of_the_images_are_compared() -> None:
    c = comparison()
    pair = [small_report(), old(c)]
    assert differences(["new", "old"], pair) == ()
    [remark] = remarks(["new", "old"], pair)
    assert remark.startswith("old: an earlier version wrote the report, without a hash of the evaluation images.")
    assert c.dense is not None
    for other in (replace(c, count=100), replace(c, dense=replace(c.dense, top1=0.7))):
        [found] = differences(["new", "old"], [small_report(), old(other)])
        assert found.fact == "the evaluation images"
    seeded = small_report().data.model_copy(update={"seed": 1})
    assert differences(["new", "old"], [old(c).model_copy(update={"data": seeded}), old(c)])[0].fact == (
        "the evaluation images"
    )


def test_a_run_without_images_is_not_measured_and_no_difference() -> None:
    pair = [small_report(), small_report(comparison=None, certificate=None)]
    assert differences(["a", "b"], pair) == ()
    [_, _, row] = runs_table(compared(["a", "b"], pair)).texts()
    assert row.count(NOT_MEASURED) == 4  # top-1, change, agreement, proven


def test_a_machine_in_another_state_is_told() -> None:
    slow = small_report(latency=latencies(dense_ms=(2.4, 12.2)))
    [remark] = remarks(["a", "b"], [small_report(), slow])
    assert remark.startswith("The same dense model took 1.64 ms at batch 1 in a and 2.4 ms in b: the machine was in")
    nearly = small_report(latency=latencies(dense_ms=(1.7, 12.2)))
    assert remarks(["a", "b"], [small_report(), nearly]) == ()
    elsewhere = slow.model_copy(update={"environment": {**ENVIRONMENT, "processor": "Xeon"}})
    assert remarks(["a", "b"], [small_report(), elsewhere]) == ()  # told as a difference


def test_other_versions_of_what_prepares_the_model_are_a_remark() -> None:
    pair = [small_report(), small_report(environment={**ENVIRONMENT, "torch": "2.9.1"})]
    assert differences(["a", "b"], pair) == ()
    [remark] = remarks(["a", "b"], pair)
    assert "a: mpcompile 0.1.0, torch 2.14.1; b: mpcompile 0.1.0, torch 2.9.1." in remark
