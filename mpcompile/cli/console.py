"""What a person sees: progress, tables, log lines. With cli.py alone in printing and in configuring logging."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from mpcompile.driver.analyze import ModelAnalysis
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.doctor import Finding
from mpcompile.recipe.schema import Recipe
from mpcompile.report.bench_report import BenchReport
from mpcompile.report.run_tables import summary
from mpcompile.report.schema import Report
from mpcompile.system.progress import Progress


def show_artifact(artifact: Artifact) -> None:
    """Prints the summary, the verdict, the notes and where the files are."""
    console = _console()
    console.print(report_table(artifact.report))
    for sentence in artifact.report.verdict:
        console.print(sentence)
    for note in (*artifact.report.notes, *artifact.report.data.notes):
        console.print(f"Note: {note}.")
    if artifact.report.commands:
        console.print("Where there is a GPU:")
    for command in artifact.report.commands:
        console.print(f"  {command}", soft_wrap=True)
    files = ", ".join(row.name for row in artifact.report.files)
    console.print(f"Written to {artifact.folder}: {files}, report.json, report.md, report.html", soft_wrap=True)


def show_bench(found: BenchReport, folder: Path) -> None:
    """Prints a row a batch and build, what that says, and where the files are."""
    console = _console()
    table = Table(title=f"{found.model} on {found.target}, {found.precision}", title_justify="left")
    for name in ("batch", "build", "p50 ms", "p90 ms", "p99 ms", "images/s", "times as fast as dense"):
        table.add_column(name, justify="left" if name == "build" else "right", overflow="fold")
    for row in found.rows():
        table.add_row(*row)
    console.print(table)
    for sentence in found.sentences():
        console.print(sentence)
    console.print(f"Written to {folder}: bench.json, bench.md, bench.svg", soft_wrap=True)


def show_analysis(found: ModelAnalysis) -> None:
    """Prints a row a layer, what the plan comes to, and what each target would make of it."""
    console = _console()
    table = Table(title=f"{found.model.arch}, budget by {found.signal}", title_justify="left")
    for name in ("layer", "shape", "MACs", "σ₊", "spikes", "bulk", "distance", "shuffled", "plan"):
        table.add_column(name, justify="left" if name in ("layer", "plan") else "right", overflow="fold")
    for row in found.layers:
        shown = ("×".join(map(str, row.shape)), f"{row.macs_share:.1%}")
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
        table.add_row(row.name, *shown, *spectrum, plan)
    console.print(table)
    for row in found.layers:
        if row.unfitted:
            console.print(f"No fit for {row.name}: {row.unfitted}.")
    console.print(
        f"{found.dense_macs / 1e9:.3f} G multiply-accumulates an image, {found.planned_macs / 1e9:.3f} G "
        f"({found.planned_macs / found.dense_macs:.1%}) with a kernel for every pattern planned; weights "
        f"{found.dense_weight_bytes / 1e6:.1f} MB, {found.planned_weight_bytes / 1e6:.1f} MB packed."
    )
    for forecast in found.forecasts:
        if forecast.accelerated:
            patterns = ", ".join(map(str, forecast.accelerated))
            told = f"has kernels for {patterns}: at most {forecast.speedup_bound:.2f} times as fast, by counting"
            if forecast.speedup is not None:
                ratios = forecast.layers.values()
                unsure = sum(not found.faster for found in forecast.measured.values())
                told += (
                    f"; products like its {len(ratios)} Linear layers, tried here, are {min(ratios):.2f} to "
                    f"{max(ratios):.2f} times as fast, which comes to {forecast.speedup:.2f}"
                )
                told += f"; {unsure} of them are not surely faster and count as dense" if unsure else ""
        else:
            told = "has kernels for none of these patterns, and would run every layer as dense: no speedup"
        console.print(f"Target {forecast.target} {told}.")


def report_table(report: Report) -> Table:
    """The summary of a report as a table."""
    title = f"{report.model.arch} on {report.recipe.target}, {report.recipe.precision}"
    table = Table(title=title, title_justify="left")
    for name in ("", "dense", "compressed", "difference"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for row in summary(report).texts():
        table.add_row(*row)
    return table


def show_findings(findings: Sequence[Finding]) -> None:
    """Prints what `doctor` found."""
    table = Table("", "what", "found", "what to do", box=None)
    for finding in findings:
        table.add_row("ok" if finding.works else "--", finding.what, finding.found, finding.remedy)
    _console().print(table)


def show_preview(plan: dict[str, Any], recipe: Recipe, as_json: bool) -> None:
    """Prints what `--dry-run` found."""
    if as_json:
        typer.echo(json.dumps(plan, indent=2))
        return
    typer.echo(recipe.to_yaml().rstrip())
    typer.echo(f"\nstages: {', '.join(plan['stages'])}\n")
    for row in plan["layers"]:
        typer.echo(f"{row['layer']}: {row['pattern'] or 'dense, ' + row['reason']}")
    masked = sum(row["pattern"] is not None for row in plan["layers"])
    typer.echo(f"\n{masked} of {len(plan['layers'])} layers would be masked; no model was written")


def _console() -> Console:
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """An observer that tells each stage as it begins: bars on a terminal, a line elsewhere, both on standard error."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield lambda at: typer.echo(str(at), err=True) if at.step is None else None
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        with Bars(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            within = bar.add_task("", total=None, visible=False)

            def show(at: Progress) -> None:
                bar.update(task, description=at.stage, completed=at.number - 1, total=at.stages)
                named, shown = f"  {at.step}", at.step is not None
                bar.update(within, description=named, completed=at.done, total=at.total, visible=shown)

            yield show


def configure_logging(verbose: int, quiet: bool) -> None:
    """Sends what the package logs to standard error, from warnings on or as asked."""
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("torch").setLevel(logging.ERROR)  # its exporter warns of operators that nobody asked about
    logger = logging.getLogger("mpcompile")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
