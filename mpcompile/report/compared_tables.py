"""The tables of `mpcompile compare`: one row for each run below the dense model, and one row for each layer.

The key of a cell is the jq expression that reads its number from the comparison's JSON (compared_schema.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

from mpcompile.report.compared_schema import Aspect, ComparedRuns, LayerInRun, Measured
from mpcompile.report.table import YES_NO, Cell, Column, Table, columns, number

MARK = " †"  # behind the name of a column whose values cannot be compared between the runs
NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class _Shown:
    """A column of the main table: the metric at one batch size, and how it is written."""

    title: str
    metric: str
    form: str
    aspect: Aspect
    batch: int | None = None
    dense: bool = True  # whether the dense model's own value is written in its row

    def index(self, found: ComparedRuns, run: int) -> int | None:
        """The index of the value in the metric of a run; None if it was not measured."""
        values = found.runs[run].metrics.get(self.metric, ())
        return next((n for n, value in enumerate(values) if self.batch in (None, value.batch)), None)


def runs_table(found: ComparedRuns) -> Table:
    """One row for each dense model and each run. Columns that no run has are left out."""
    shown = _columns(found)
    rows = [_dense_row(found, group, shown) for group in found.dense]
    rows += [_run_row(found, run, shown) for run in range(len(found.runs))]
    titles = tuple(f"{each.title}{MARK if found.spoiled(each.aspect) else ''}" for each in shown)
    return Table(columns("run", "recipe", *titles, numbers=titles), tuple(rows), "")


def _columns(found: ComparedRuns) -> tuple[_Shown, ...]:
    """The columns in their order: accuracy, agreement, speed, size, proof."""
    accuracy = next((run.accuracy_name for run in found.runs if "top1" in run.metrics), "top-1")
    metric = next((run.accuracy_name for run in found.runs if "metric" in run.metrics), "metric")
    candidates = [
        _Shown(accuracy, "top1", "{:.2f} %", "accuracy"),
        _Shown("change in points", "top1_change", "{:+.2f}", "accuracy", dense=False),
        _Shown(metric, "metric", "{:.4g}", "accuracy"),
        _Shown(f"change of {metric}", "metric_change", "{:+.4g}", "accuracy", dense=False),
        _Shown("same answer", "agreement", "{:.2f} %", "accuracy"),
        _Shown("relative error", "relative_error", "{:.2f} %", "accuracy"),
        *(_Shown(f"speed, batch {n}", "speedup", "{:.2f}×", "speed", n, dense=False) for n in _batches(found)),
        *(
            _Shown(f"beside dense {kind}, batch {n}", f"speedup_{kind}", "{:.2f}×", "speed", n)
            for kind in ("int8", "fp8")
            for n in _batches(found)
        ),
        _Shown("ONNX file", "size_mb", "{:.2f} MB", "size"),
        _Shown("proven", "proven", "{:.2f} %", "accuracy"),
    ]
    runs = range(len(found.runs))
    return tuple(each for each in candidates if any(each.index(found, run) is not None for run in runs))


def _batches(found: ComparedRuns) -> list[int]:
    values = (value for run in found.runs for value in run.metrics.get("speedup", ()))
    return sorted({value.batch for value in values if value.batch is not None})


def _dense_row(found: ComparedRuns, group: tuple[int, ...], shown: tuple[_Shown, ...]) -> tuple[Cell, ...]:
    """The row of a dense model: its values as the first run of the group measured them."""
    name = "dense" if len(found.dense) == 1 else f"dense of {', '.join(found.runs[n].name for n in group)}"
    cells = []
    for each in shown:
        if each.metric == "speedup":
            timed = any(each.index(found, run) is not None for run in group)
            cells.append(Cell("baseline" if timed else ""))
            continue
        run, n = next(((run, n) for run in group if (n := each.index(found, run)) is not None), (0, None))
        value = None if n is None or not each.dense else found.runs[run].metrics[each.metric][n].dense
        cells.append(number(value, each.form, f".runs[{run}].metrics.{each.metric}[{n}].dense"))
    return Cell(name), Cell(), *cells


def _run_row(found: ComparedRuns, run: int, shown: tuple[_Shown, ...]) -> tuple[Cell, ...]:
    """The row of a run. Intervals stand on a second line in a terminal."""
    it = found.runs[run]
    cells = []
    for each in shown:
        n = each.index(found, run)
        if n is None:
            cells.append(Cell(NOT_MEASURED))
            continue
        value, key = it.metrics[each.metric][n], f".runs[{run}].metrics.{each.metric}[{n}]"
        text = each.form.format(value.value) + _interval(value, each.form)
        if each.metric == "size_mb":
            ratio = it.metrics["size_ratio"][0].value
            text += f"\n{ratio:.2f}× of dense"
        cells.append(Cell(text, value.value, f"{key}.value"))
    what = ", ".join((it.target, it.precision, *it.patterns))
    return Cell(it.name), Cell(what), *cells


def _interval(value: Measured, form: str) -> str:
    """The interval as `[1.32, 1.34]` on a line of its own; empty if there is none."""
    if value.interval is None:
        return ""
    low, high = (form.removesuffix("×").format(end) for end in value.interval)
    return f"\n[{low}, {high}]"


LayerColumn = tuple[str, bool, Callable[[LayerInRun, str], Cell]]
LAYER_COLUMNS: tuple[LayerColumn, ...] = (
    ("pattern", False, lambda layer, key: Cell(_pattern(layer))),
    ("refit error", True, lambda layer, key: number(layer.missed, "{:.3f} %", f"100 * {key}.missed", 100)),
    ("shift", True, lambda layer, key: number(layer.share, "{:.1f} %", f"100 * {key}.share", 100)),
    ("kernel", False, lambda layer, key: Cell("" if layer.pattern is None else _kernel(layer))),
    ("speed", True, lambda layer, key: number(layer.speedup, "{:.2f}×", f"{key}.speedup")),
)


def layers_table(found: ComparedRuns) -> Table:
    """One row for each layer: for each run its pattern, refit error, share of the logit shift, kernel and speed."""
    headers = [Column("layer")]
    for run in found.runs:
        suffix = f", {run.name}" if len(found.runs) > 1 else ""
        headers += [Column(f"{name}{suffix}", numeric) for name, numeric, _ in LAYER_COLUMNS]
    rows = []
    for i, layer in enumerate(found.layers):
        cells = [Cell(layer.name)]
        for n, it in enumerate(layer.runs):
            key = f".layers[{i}].runs[{n}]"
            if it is None:
                cells += [Cell("no such layer"), *[Cell()] * (len(LAYER_COLUMNS) - 1)]
                continue
            cells += [cell(it, key) for _, _, cell in LAYER_COLUMNS]
        rows.append(tuple(cells))
    used = [i for i in range(len(headers)) if i == 0 or any(row[i].text for row in rows)]
    return Table(tuple(headers[i] for i in used), tuple(tuple(row[i] for i in used) for row in rows), "")


def _pattern(layer: LayerInRun) -> str:
    pattern = layer.pattern or "dense"
    return pattern if layer.precision is None else f"{pattern}, {layer.precision}"


def _kernel(layer: LayerInRun) -> str:
    return {"yes": "sparse", "no": "dense"}.get(YES_NO[layer.sparse_kernel], "")


def environment_table(found: ComparedRuns) -> Table:
    """One row for each property of the machine and each version, one column for each run."""
    names = dict.fromkeys(name for run in found.runs for name in run.environment)
    rows = [(Cell("mpcompile"), *(Cell(run.version) for run in found.runs))]
    rows += [(Cell(name), *(Cell(run.environment.get(name, "")) for run in found.runs)) for name in names]
    return Table(columns("", *(run.name for run in found.runs)), tuple(rows), "")


def latency_table(found: ComparedRuns) -> Table:
    """One row for each run and batch size: the medians of the dense and of the compressed model in milliseconds."""
    rows = []
    for n, run in enumerate(found.runs):
        for i, value in enumerate(run.metrics.get("latency_ms", ())):
            key = f".runs[{n}].metrics.latency_ms[{i}]"
            batch = Cell() if value.batch is None else number(value.batch, "{:.0f}", f"{key}.batch")
            dense = number(value.dense, "{:.3f}", f"{key}.dense")
            rows.append((Cell(run.name), batch, dense, number(value.value, "{:.3f}", f"{key}.value")))
    return Table(
        columns("run", "batch", "dense ms", "compressed ms", numbers=("batch", "dense ms", "compressed ms")),
        tuple(rows),
        "",
    )


def conditions_table(found: ComparedRuns) -> Table:
    """One row for each condition, run and batch size."""
    rows = []
    for n, row in enumerate(found.conditions):
        key = f".conditions[{n}]"
        values = number(row.found, "{:.6g}", f"{key}.found"), number(row.limit, "{:.6g}", f"{key}.limit")
        rows.append((Cell(row.condition), Cell(row.run), *values, Cell(row.state)))
    names = ("fails if", "run", "found", "limit", "state")
    return Table(columns(*names, numbers=names[2:4]), tuple(rows), "")
