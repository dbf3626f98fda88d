"""The results of the commands as tables and sentences on standard output.

The commands import this module when they run, not at start-up: it imports torch and rich.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

import mpcompile.report.run_tables as run_tables
import mpcompile.report.search_chart as search_chart
from mpcompile.cli.chart_text import drawn_for
from mpcompile.driver.analyze import ModelAnalysis
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.doctor import Finding
from mpcompile.driver.forecast import Forecast, OverFp32
from mpcompile.driver.preprocessing_trials import PreprocessingTrials
from mpcompile.ir.precision import QUANTIZED
from mpcompile.recipe.schema import Recipe
from mpcompile.report.bench_report import BenchReport
from mpcompile.report.quantized_table import versions
from mpcompile.report.schema import Report
from mpcompile.report.sentences import which_recipe
from mpcompile.report.table import Table as Found
from mpcompile.system.resource_errors import format_bytes


def show_artifact(artifact: Artifact) -> None:
    """Prints the summary table, the verdict, the notes and the paths of the files."""
    console = _console()
    if artifact.report.tuning:
        _show_search(console, artifact.report)
    console.print(report_table(artifact.report))
    if artifact.report.quantized:
        console.print(versions_table(artifact.report))
    for sentence in artifact.report.verdict:
        console.print(sentence)
    for note in (*artifact.report.notes, *artifact.report.data.notes):
        console.print(f"Note: {note}.")
    if artifact.report.commands:
        console.print("To run on a machine with a GPU:")
    for command in artifact.report.commands:
        console.print(f"  {command}", soft_wrap=True)
    files = ", ".join(row.name for row in artifact.report.files)
    console.print(
        f"Written to {artifact.folder}: {files}, report.json, report.md, report.html, report.sha256", soft_wrap=True
    )


def _show_search(console: Console, report: Report) -> None:
    """Prints the picture of a search, its table, and which recipe to take for which need."""
    assert report.tuning is not None
    console.print(drawn_for(console, search_chart.tuning(report.tuning)))
    console.print(_table(run_tables.tuning(report), "recipes tried"))
    for sentence in which_recipe(report.tuning):
        console.print(sentence)
    console.print()


def show_bench(found: BenchReport, folder: Path) -> None:
    """Prints one row for each batch size and engine, the conclusions, and the paths of the files."""
    console = _console()
    table = Table(title=f"{found.model} on {found.target}, {found.precision}", title_justify="left")
    for name in ("batch", "engine", "p50 ms", "p90 ms", "p99 ms", "images/s", "times as fast as dense"):
        table.add_column(name, justify="left" if name == "engine" else "right", overflow="fold")
    for row in found.rows():
        table.add_row(*row)
    console.print(table)
    for sentence in found.sentences():
        console.print(sentence)
    console.print(f"Written to {folder}: bench.json, bench.md, bench.svg", soft_wrap=True)


def show_analysis(found: ModelAnalysis) -> None:
    """Prints one row for each layer, the total cost of the plan, and the speedup forecast for each target."""
    console = _console()
    table = Table(title=f"{found.model.arch}, budget by {found.signal}", title_justify="left")
    for name in ("layer", "shape", "MACs", "σ₊", "spikes", "bulk", "distance", "shuffled", "plan"):
        table.add_column(name, justify="left" if name in ("layer", "plan") else "right", overflow="fold")
    for row in found.layers:
        size = ("×".join(map(str, row.shape)), f"{row.macs_share:.1%}")
        fit = row.fit
        spectrum = ["–"] * 5
        if fit:
            null = f"{row.null.central_error:.3f}" if row.null else ""
            spectrum = [
                f"{fit.bulk_edge:.3g}",
                str(fit.spikes),
                f"{fit.bulk_share:.0%}",
                f"{fit.central_error:.3f}",
                null,
            ]
        plan = str(row.pattern) if row.pattern else f"dense: {row.reason}"
        table.add_row(row.name, *size, *spectrum, plan)
    console.print(table)
    for row in found.layers:
        if row.unfitted:
            console.print(f"No fit for {row.name}: {row.unfitted}.")
    console.print(
        f"{found.dense_macs / 1e9:.3f} G multiply-accumulates per image; {found.planned_macs / 1e9:.3f} G "
        f"({found.planned_macs / found.dense_macs:.1%}) if every planned pattern has a kernel. Weights: "
        f"{found.dense_weight_bytes / 1e6:.1f} MB; {found.planned_weight_bytes / 1e6:.1f} MB packed."
    )
    console.print(_int8_text(found))
    for note in found.notes:
        console.print(f"Note: {note}.")
    for forecast in found.forecasts:
        if forecast.over_fp32:
            console.print(forecast_table(forecast, forecast.over_fp32, found.precision))
        console.print(f"Target {forecast.target} {_forecast_text(forecast, found.precision)}.")


def _int8_text(found: ModelAnalysis) -> str:
    """A sentence on the layers that --precision int8 quantises, and the reasons for the others."""
    reasons = dict.fromkeys(row.unquantized for row in found.layers if row.unquantized)
    others = (
        f"{', '.join(row.name for row in found.layers if row.unquantized == reason)}: {reason}" for reason in reasons
    )
    count = sum(row.unquantized is None for row in found.layers)
    text = f"--precision int8 quantises {count} of {len(found.layers)} layers"
    return f"{text}; {'; '.join(others)}." if reasons else f"{text}."


def forecast_table(forecast: Forecast, over_fp32: OverFp32, precision: str) -> Table:
    """The measured speedups of the layers in 8 bits, beside the same layers dense in fp32 and dense in 8 bits."""
    table = Table(title=f"{forecast.target}, times as fast, measured on this machine", title_justify="left")
    names = (f"dense {precision}, over dense fp32", f"masked, over dense {precision}", "expected, over dense fp32")
    for name in ("layer", *names):
        table.add_column(name, justify="left" if name == "layer" else "right", overflow="fold")
    for name, planned in over_fp32.layers.items():
        masked = forecast.measured.get(name)
        dense = over_fp32.dense[name].with_interval()
        table.add_row(name, dense, masked.with_interval() if masked else "–", f"{planned:.2f}")
    return table


def _forecast_text(forecast: Forecast, precision: str) -> str:
    """The speedup forecast for one target, as the end of a sentence."""
    if forecast.refused:
        return f"does not run {precision}: {forecast.refused}"
    over_fp32 = forecast.over_fp32
    baseline, kind = ("", "") if precision == "fp32" else (f" as dense {precision}", f"{precision} ")
    text = f"has {kind}kernels for none of these patterns and would run every layer as dense: no speedup"
    text += f" beside dense {precision}" if baseline else ""
    if forecast.accelerated:
        patterns = ", ".join(map(str, forecast.accelerated))
        bound = f"at most {forecast.speedup_bound:.2f} times as fast{baseline}, from the count of MACs"
        text = f"has {kind}kernels for {patterns}: {bound}"
    if forecast.speedup is not None:
        ratios = forecast.layers.values()
        text += (
            f"; matrix products of the shapes of its {len(ratios)} {'masked ' if baseline else ''}Linear layers, "
            f"measured on this machine, are {min(ratios):.2f} to {max(ratios):.2f} times as fast{baseline}: "
            f"{forecast.speedup:.2f} for the whole model"
        )
        slower = sum(not measured.faster for measured in forecast.measured.values())
        text += f"; {slower} of them are not significantly faster and count as dense" if slower else ""
    if forecast.accelerated and forecast.untimed:
        text += (
            f"; {forecast.untimed} masked convolutions are timed only when the file is built, alone and in the whole "
            f"file{', and count as dense here' if forecast.speedup is not None else ''}"
        )
    if over_fp32 is not None:
        text += (
            f". Beside dense fp32 the whole model is {over_fp32.speedup:.2f} times as fast, and dense {precision} "
            f"{over_fp32.dense_speedup:.2f}, by the products of {len(over_fp32.layers)} quantised Linear layers"
        )
    return text


def report_table(report: Report) -> Table:
    """The summary of a report as a table: dense, compressed, difference."""
    return _table(
        run_tables.summary(report), f"{report.model.arch} on {report.recipe.target}, {report.recipe.precision}"
    )


def _table(found: Found, title: str) -> Table:
    """A table of the report for the terminal."""
    table = Table(title=title, title_justify="left")
    for column in found.columns:
        table.add_column(column.name, justify="right" if column.numeric else "left", overflow="fold")
    for row in found.texts():
        table.add_row(*row)
    return table


def versions_table(report: Report) -> Table:
    """The versions of a model in 8 bits: dense in fp32, dense in 8 bits, and compressed, with their speed."""
    assert report.quantized is not None
    found = versions(report)
    table = Table(title=f"beside dense {report.quantized.precision}", title_justify="left")
    for column in found.columns:
        table.add_column(column.name, justify="right" if column.numeric else "left", no_wrap=column is found.columns[0])
    for row in found.texts():
        table.add_row(*row)
    return table


def show_findings(findings: Sequence[Finding]) -> None:
    """Prints the findings of `mpcompile doctor` as a table."""
    table = Table("", "what", "found", "what to do", box=None)
    for finding in findings:
        table.add_row("ok" if finding.works else "--", finding.what, finding.found, finding.remedy)
    _console().print(table)


def show_trials(found: PreprocessingTrials) -> None:
    """Prints the accuracy of each preprocessing, best first, the options for it, and the conclusion."""
    console = _console()
    table = Table(
        title=f"{found.measure.capitalize()} of the dense model on {found.images} images", title_justify="left"
    )
    table.add_column(found.measure, justify="right")
    for name in ("preprocessing", "options"):
        table.add_column(name, overflow="fold")
    for row in found.trials:
        table.add_row(f"{row.top1:.1%}", row.name, row.options)
    console.print(table)
    for note in found.notes:
        console.print(f"Note: {note}.", soft_wrap=True)
    console.print(f"{found.conclusion[0].upper()}{found.conclusion[1:]}.", soft_wrap=True)


def show_preview(plan: dict[str, Any], recipe: Recipe, as_json: bool) -> None:
    """Prints the recipe, the stages and the plan of each layer: the result of `--dry-run`."""
    if as_json:
        typer.echo(json.dumps(plan, indent=2))
        return
    typer.echo(recipe.to_yaml().rstrip())
    typer.echo(f"\nstages: {', '.join(plan['stages'])}\n")
    in_8_bits = recipe.precision in QUANTIZED
    for row in plan["layers"]:
        precision = f"; {row['precision'] or 'floating point, ' + row['unquantized']}" if in_8_bits else ""
        typer.echo(f"{row['layer']}: {row['pattern'] or 'dense, ' + row['reason']}{precision}")
    for note in plan["notes"]:
        typer.echo(f"Note: {note}.")
    memory = plan["memory"]
    if memory["peak_bytes"] is not None:
        files = f", and {format_bytes(memory['file_bytes'])} of activations go to files" if memory["file_bytes"] else ""
        typer.echo(f"\nmemory: about {format_bytes(memory['peak_bytes'])} at the peak{files}")
    layers = [row for row in plan["layers"] if row["shares_weight_with"] is None]  # each weight once
    masked = sum(row["pattern"] is not None for row in layers)
    quantized = sum(row["precision"] is not None for row in layers)
    also = f" and {quantized} quantised to {recipe.precision}" if in_8_bits else ""
    typer.echo(f"\n{masked} of {len(layers)} layers would be masked{also}; no model was written")


def _console() -> Console:
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
