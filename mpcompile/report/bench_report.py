"""BenchReport: the content of bench.json, with all latency samples; bench.md and bench.svg are rendered from it."""

from pathlib import Path
from typing import TYPE_CHECKING

from mpcompile.measure.layer_verdict import LayerVerdict, tally
from mpcompile.measure.timing import Speedup, Timing
from mpcompile.report.schema import Parity, Value
from mpcompile.report.table import verdict_table
from mpcompile.system.hardware import MachineState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#6b6b6b", "#7fa8d1", "#1f4e79", "#b07d2b", "#4d7c57")


class TimedEngine(Value):
    """One engine that was timed in interleaved rounds with the others."""

    name: str
    what: str  # which file it runs, with which kernels
    file: str


class BatchTimings(Value):
    """One batch size: the timing and all samples of each engine (ms), and the speedups between engines."""

    batch: int
    timings: dict[str, Timing]
    samples_ms: dict[str, tuple[float, ...]]
    comparisons: dict[str, Speedup]
    disturbances: tuple[str, ...]
    before: MachineState
    after: MachineState


class BenchReport(Value):
    """The content of bench.json. `meanings` has a description for each key of `comparisons`."""

    schema_version: int = 1
    version: str  # of mpcompile
    created: str  # ISO 8601, UTC
    model: str
    target: str
    precision: str
    settings: dict[str, str]
    environment: dict[str, str]
    baseline: str
    arms: tuple[TimedEngine, ...]
    meanings: dict[str, str]
    parity: tuple[Parity, ...]  # each engine against ONNX Runtime on the CPU
    batches: tuple[BatchTimings, ...]
    verdicts: tuple[LayerVerdict, ...]
    command: str

    def write(self, folder: Path) -> None:
        """Writes bench.json, bench.md and bench.svg."""
        from matplotlib import rc_context

        (folder / "bench.json").write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / "bench.md").write_text(self.markdown(), encoding="utf-8")
        with rc_context({"svg.hashsalt": "mpcompile", "svg.fonttype": "none"}):  # equal plots, equal bytes
            self.plot().savefig(folder / "bench.svg", format="svg", metadata={"Date": None})

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each batch size and engine: batch, engine, p50, p90 and p99 in ms, images/s, speedup."""
        rows = []
        for each in self.batches:
            for arm in self.arms:
                timing = each.timings[arm.name]
                against = each.comparisons.get(f"{arm.name}/{self.arms[0].name}")
                speed = "baseline"
                if against is not None:
                    speed = f"{against.ratio:.2f} [{against.interval[0]:.2f}, {against.interval[1]:.2f}]"
                    speed += against.remark()
                milliseconds = (f"{ms:.3f}" for ms in (timing.p50_ms, timing.p90_ms, timing.p99_ms))
                rows.append((str(each.batch), arm.name, *milliseconds, f"{timing.images_per_second:,.0f}", speed))
        return rows

    def sentences(self) -> list[str]:
        """One sentence for each comparison and each possible disturbance of it, then the count of sparse kernels."""
        sentences = []
        all_dense = bool(self.verdicts) and all(row.chosen is False for row in self.verdicts)
        for each in self.batches:
            for key, comparison in each.comparisons.items():
                baseline = key.partition("/")[2]
                text = f"Batch {each.batch}, {self.meanings[key]}: {comparison.describe(baseline)}."
                if all_dense and comparison.significant and baseline != self.arms[0].name:  # two masked builds
                    text += " No sparse kernel was chosen, so the cause is another choice of dense kernels, or noise."
                sentences.append(text)
            sentences += [f"Batch {each.batch}: {disturbance}." for disturbance in each.disturbances]
        if self.verdicts:
            sentences.append(tally(self.verdicts))
        return sentences

    def markdown(self) -> str:
        """The benchmark as Markdown."""
        table = [
            "| batch | engine | p50 ms | p90 ms | p99 ms | images/s | speedup over the baseline |",
            "|---|---|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in self.rows()),
        ]
        parts = [
            f"# {self.model} on {self.target}, {self.precision}",
            "\n".join(self.sentences()),
            "\n".join(table),
            "Engines, timed in interleaved rounds in one process:\n\n"
            + "\n".join(f"- {arm.name}: {arm.what}" for arm in self.arms),
            f"Baseline: {self.baseline}.",
            ", ".join(f"{key} {value}" for key, value in {**self.settings, **self.environment}.items()) + ".",
        ]
        parity = (f"{row.what} {row.difference:.1e}, {row.tolerance:.0e} allowed" for row in self.parity)
        parts.append(f"Largest difference of the outputs, relative to the largest output: {'; '.join(parity)}.")
        if self.verdicts:
            parts.append(verdict_table(self.verdicts).markdown())
        parts.append(f"Made by `{self.command}`; bench.json has all samples. ![Latency by batch size](bench.svg)")
        return "\n\n".join(parts) + "\n"

    def plot(self) -> "Figure":
        """Bars of the median latency of each engine with its 95 % interval, one panel for each batch size."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2 * len(self.batches) + 0.8, 3.4), layout="constrained")
        panels = figure.subplots(1, len(self.batches), squeeze=False)[0]
        for axes, each in zip(panels, self.batches, strict=True):
            for n, arm in enumerate(self.arms):
                timing = each.timings[arm.name]
                low, high = timing.interval_ms
                error = [[timing.p50_ms - low], [high - timing.p50_ms]]
                axes.bar(n, timing.p50_ms, color=COLORS[n], yerr=error, capsize=5, width=0.65)
                axes.annotate(
                    f"{timing.p50_ms:.3g}", (n, high), xytext=(0, 3), textcoords="offset points", ha="center",
                    fontsize=8,
                )  # fmt: skip
            axes.set_xticks(range(len(self.arms)), [arm.name.replace(", ", "\n") for arm in self.arms], fontsize=8)
            axes.set_title(f"batch {each.batch}", fontsize=9)
            axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("ms, median and 95 % interval")
        figure.suptitle(f"{self.model}, {self.target}, {self.precision}, {self.environment['device']}", fontsize=10)
        return figure
