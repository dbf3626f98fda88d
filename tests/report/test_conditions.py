"""Conditions of --fail-if: what they accept, which unit their numbers have, and when they fail."""

import pytest
from doc_pages import PAGES, tables
from small_reports import comparison, int8_report, latencies, small_report

from mpcompile.cli import choices
from mpcompile.errors import UsageError
from mpcompile.report.compared_metrics import METRICS
from mpcompile.report.compared_runs import compared
from mpcompile.report.compared_schema import CheckedCondition
from mpcompile.report.conditions import parse_condition
from mpcompile.report.schema import Report


def checks(text: str, report: Report | None = None) -> list[CheckedCondition]:
    """The results of a condition on one run called `out`."""
    return list(compared(["out"], [report or small_report()], [parse_condition(text)]).conditions)


def states(text: str, report: Report | None = None) -> list[str]:
    return [row.state for row in checks(text, report)]


def test_the_help_names_every_metric() -> None:
    assert list(choices.METRICS) == list(METRICS)
    for name, metric in METRICS.items():  # the help says the unit
        for unit, words in {"%": "per cent", "points": "points", "ms": "milliseconds", "MB": "MB"}.items():
            assert (metric.unit == unit) <= (words in choices.METRICS[name]), name


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("top1 < dense - 0.5", "fails"),  # 87.60 against 87.75
        ("top1 < dense - 0.7", "holds"),
        ("top1<dense-0.5", "fails"),
        ("  top1  <  dense  -  .5 points ", "fails"),
        ("top1 > dense + 1e-3", "holds"),
        ("top1 < 88", "fails"),
        ("top1 < 88%", "fails"),
        ("top1 <= 87.6", "fails"),
        ("top1 < 87.6", "holds"),
        ("top1_change < -0.5", "fails"),
        ("top1_change < -0.5 points", "fails"),
        ("agreement < 99", "holds"),
        ("agreement >= 99", "fails"),
        ("proven < agreement - 0.5", "fails"),  # 99.10 against 99.35
        ("proven < agreement - 1", "holds"),
        ("size_mb > 3", "holds"),
        ("size_mb > 2.9", "fails"),
        ("size_mb > dense", "holds"),
        ("size_ratio > 0.5", "fails"),
        ("masked_layers < 3", "fails"),
        ("sparse_layers < masked_layers", "fails"),
        ("kept > 80.1", "holds"),
        ("kept >= 80", "fails"),
        ("macs > 79", "fails"),
        ("relative_error > 0.5%", "not measured"),
    ],
)
def test_a_condition_is_judged_in_the_units_of_the_report(text: str, state: str) -> None:
    assert states(text) == [state]


def test_a_limit_that_is_reached_exactly_is_equal_in_spite_of_rounding() -> None:
    for drop in (0.1, 0.2, 0.3, 0.4, 0.5):
        near = small_report(comparison=comparison(top1=0.8825 - drop / 100, dense=0.8825))
        assert states(f"top1 < dense - {drop}", near) == ["holds"]
        assert states(f"top1 <= dense - {drop}", near) == ["fails"]


def test_a_time_is_checked_at_each_batch_size_or_at_the_one_that_is_named() -> None:
    assert states("speedup < 1.4") == ["fails", "holds"]
    assert states("speedup@8 < 1.4") == ["holds"]
    assert states("speedup_low < 1.42") == ["fails", "holds"]
    assert states("speedup@8 < speedup@1") == ["holds"]
    assert states("speedup < speedup_low") == ["holds", "holds"]
    assert states("latency_ms > dense") == ["holds", "holds"]
    assert states("latency_ms > dense", small_report(latency=latencies(((0.9, (0.8, 0.95)), (1.1, (1.0, 1.2)))))) == [
        "fails",
        "holds",
    ]
    [found] = checks("speedup@1 < 1.4")
    assert found.sentence == "out: 'speedup@1 < 1.4' is true: speedup is 1.33× at batch 1, 0.07× below 1.4×"


def test_a_failure_says_by_how_much() -> None:
    [found] = checks("top1 < dense - 0.5")
    assert found.sentence == (
        "out: 'top1 < dense - 0.5' is true: top1 is 87.6 %, 0.15 percentage points below dense - 0.5, which is 87.75 %"
    )
    assert found.found == pytest.approx(87.6)
    assert found.limit == pytest.approx(87.75)
    [found] = checks("size_mb >= 2.91")
    assert found.sentence == "out: 'size_mb >= 2.91' is true: size_mb is 2.91 MB, equal to 2.91 MB"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("speedup_int8 < 1", "speedup_int8 was not measured; compile with --precision int8"),
        ("speedup@16 < 1", "speedup@16 was not measured; the batch sizes are 1, 8"),
        ("top1@8 < 50", "top1 has no batch size; leave @8 out"),
        ("metric < dense - 1", "metric was not measured; compile with --data and --metric"),
        ("agreement < dense - 1", "agreement has no value of the dense model; compare it with a number"),
    ],
)
def test_what_was_not_measured_is_no_pass(text: str, reason: str) -> None:
    [found] = checks(text)
    assert (found.state, found.found) == ("not measured", None)
    assert found.sentence == f"out: {text!r} cannot be checked: {reason}"


def test_a_run_without_images_or_times_passes_no_condition() -> None:
    bare = small_report(comparison=None, certificate=None, latency=(), verdicts=())
    for name in ("top1", "agreement", "proven", "speedup", "latency_ms", "sparse_layers"):
        assert states(f"{name} < 5", bare) == ["not measured"], name


def test_int8_is_judged_beside_the_fastest_dense_int8() -> None:
    assert states("speedup_int8 < 1.05", int8_report()) == ["fails", "holds"]
    assert states("speedup_int8_low > 1", int8_report()) == ["fails", "fails"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tp1 < 3", "names no metric; the metrics are top1, "),
        ("tp1 < 3", "; did you mean 'top1'?"),
        ("top1 < dens - 3", "; did you mean 'dense'?"),
        ("dense < top1", "names no metric"),
        ("top1 < nan", "names no metric"),
        ("top1 < dense@8", "names no metric"),
        ("top1 < 0.85", "top1 is in per cent, and 0.85 may be meant as a share; write 85, or 0.85% for"),
        ("top1_change < -0.5%", "top1_change is in points; leave % out"),
        ("latency_ms > 5%", "latency_ms is in ms; leave % out"),
        ("ece > 2 points", "ece is in no unit; leave points out"),
        ("top1 < latency_ms", "compares top1 in % with latency_ms in ms; give two metrics of one unit"),
        *(
            (text, "is not METRIC < VALUE; give for example 'top1 < dense - 0.5'")
            for text in (
                "", "top1", "top1 <", "< 3", "top1 = 3", "top1 == 3", "top1 != 3", "top1 < 3 or 1", "top1 < 1 < 2",
                "top1 < dense - 0.5%", "top1 < dense * 0.99", "top1 < (3)", "top1 < __import__('os')", "top1 < 1e999",
                "top1 < 1_0", "top1 < dense - -1", "top1 < dense - 1e999", "top1 < 3; speedup < 1",
                "speedup@ < 1", "top1 < ３",
            )
        ),
    ],
)  # fmt: skip
def test_a_condition_that_is_not_understood_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_condition(text)
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"--fail-if {text!r}")


def test_every_metric_can_be_named_and_read() -> None:
    for name in METRICS:
        for report in (small_report(), int8_report()):
            assert len(checks(f"{name} < 5", report)) >= 1


def test_the_page_on_comparing_lists_every_metric_with_its_unit() -> None:
    [table] = [table for table in tables(PAGES["comparing"]) if "metric" in table[0]]
    assert [(row["metric"], row["unit"]) for row in table] == [(f"`{m.name}`", m.unit) for m in METRICS.values()]
