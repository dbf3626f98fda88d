"""Builds ComparedRuns from reports: metrics, dense groups, differences, layers and conditions."""

from collections.abc import Sequence
from importlib.metadata import version

from mpcompile.report.comparability import IMAGES, dense_identity, differences, remarks
from mpcompile.report.compared_metrics import METRICS, metrics_of
from mpcompile.report.compared_schema import ComparedLayer, ComparedRun, ComparedRuns, Difference, LayerInRun
from mpcompile.report.conditions import Condition, checked
from mpcompile.report.head_words import accuracy_name
from mpcompile.report.headline import headline, warnings
from mpcompile.report.schema import Report
from mpcompile.report.tile import plain


def compared(names: Sequence[str], reports: Sequence[Report], conditions: Sequence[Condition] = ()) -> ComparedRuns:
    """The comparison of one or more runs; `names` are shown for them, and conditions are checked on each."""
    runs = tuple(_run(name, report) for name, report in zip(names, reports, strict=True))
    measured = {name for run in runs for name in run.metrics}
    found = differences(names, reports)
    return ComparedRuns(
        version=version("mpcompile"),
        runs=runs,
        dense=_dense_groups(reports, found),
        units={name: metric.unit for name, metric in METRICS.items() if name in measured},
        differences=found,
        remarks=remarks(names, reports),
        layers=_layers(reports),
        conditions=tuple(row for condition in conditions for run in runs for row in checked(condition, run)),
    )


def _run(name: str, report: Report) -> ComparedRun:
    c = report.comparison
    return ComparedRun(
        name=name,
        created=report.created,
        version=report.version,
        model=report.model.name,
        arch=report.model.arch,
        target=report.recipe.target,
        precision=report.recipe.precision,
        patterns=tuple(report.counts().patterns),
        environment=report.environment,
        accuracy_name=c.metric.name if c and c.metric else accuracy_name(c.head if c else None),
        headline=plain(headline(report)),
        warnings=warnings(report),
        metrics=metrics_of(report),
    )


def _dense_groups(reports: Sequence[Report], differing: Sequence[Difference]) -> tuple[tuple[int, ...], ...]:
    """The runs, by index, whose dense models are the same and were evaluated on the same images."""
    images = next((row.values for row in differing if row.fact == IMAGES), (None,) * len(reports))
    groups: dict[tuple[str, str | None], list[int]] = {}
    for n, report in enumerate(reports):
        groups.setdefault((dense_identity(report), images[n]), []).append(n)
    return tuple(map(tuple, groups.values()))


def _layers(reports: Sequence[Report]) -> tuple[ComparedLayer, ...]:
    """All layers of all runs in network order; a layer that only later runs have comes last."""
    rows = [_layers_of(report) for report in reports]
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(ComparedLayer(name=name, runs=tuple(row.get(name) for row in rows)) for name in names)


def _layers_of(report: Report) -> dict[str, LayerInRun]:
    """The layers of one run by name."""
    shares = {row.name: row.share for row in report.certificate.layers} if report.certificate else {}
    verdicts = {row.layer: row for row in report.verdicts}
    found = {}
    for row in report.layers:
        verdict = verdicts.get(row.shares_weight_with or row.name)
        ratio = verdict.times_as_fast if verdict else None
        found[row.name] = LayerInRun(
            pattern=row.pattern,
            precision=row.precision,
            density=row.density,
            missed=row.missed,
            share=shares.get(row.name),
            sparse_kernel=verdict.chosen if verdict else None,
            speedup=ratio if ratio is None or (verdict and verdict.chosen) else 1.0,
        )
    return found
