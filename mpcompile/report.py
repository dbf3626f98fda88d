"""Report: what was done, kept, skipped and measured. JSON is the truth; Markdown and the console are views of it."""

import math
from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mpcompile.conventions import Charged
from mpcompile.evaluate import Comparison
from mpcompile.lower import Lowered
from mpcompile.model import Certificate, Epoch, Model, Source, Spectrum
from mpcompile.pipeline import PassRecord
from mpcompile.recipe import Recipe
from mpcompile.timing import Speedup, Timing
from mpcompile.tuning import Tuning
from mpcompile.verdict import LayerVerdict, tally

TEMPLATES = Path(__file__).parent / "templates"


class Value(BaseModel):
    """A frozen part of a report."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRow(Value):
    """What became of one layer. `density` is the kept share of its weights."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str | None
    density: float
    reason: str | None  # why it stays dense
    initializer: str | None  # its weight in the ONNX file
    axis: int | None  # where the groups lie in that weight
    spectrum: Spectrum | None  # its Marchenko–Pastur fit, where a budget made one
    unfitted: str | None  # why it has none
    permuted: bool  # whether its input channels were reordered
    missed: float | None  # of its dense outputs' power on calibration images, where it was refitted
    unpermuted: str | None  # why not, where a permutation looked at it


class Parity(Value):
    """Two forms of one model on the same images: max |Δ| / max |expected| over their logits."""

    what: str
    difference: float
    tolerance: float
    images: int


class Latency(Value):
    """Dense and compressed in the same run, in turns."""

    dense: Timing
    compressed: Timing
    speedup: Speedup


class FileRow(Value):
    """A file of the output folder."""

    name: str
    bytes: int
    sha256: str


class DataUsed(Value):
    """How many images were used for what, which the seed chose, and what is to be known of them."""

    calibration: int
    validation: int
    training: int
    held_out: int
    seed: int
    notes: tuple[str, ...]


class Gate(Value):
    """A limit that the recipe sets, and whether it holds."""

    name: str
    limit: float
    found: float
    holds: bool

    def __str__(self) -> str:
        return f"{self.name} is {self.found:.2f}; {self.limit:g} is allowed"


class Report(Value):
    """The whole report; `schema_version` changes when a key changes its meaning or goes."""

    schema_version: int = 1
    version: str  # of mpcompile
    created: str  # ISO 8601, UTC
    model: Source
    recipe: Recipe
    recipe_sha256: str
    environment: dict[str, str]
    data: DataUsed
    passes: tuple[PassRecord, ...]
    layers: tuple[LayerRow, ...]
    accelerated: bool  # whether masked layers run on sparse kernels, or can where no engine ran
    parity: tuple[Parity, ...]
    idle: str | None  # why no engine of the target ran here
    notes: tuple[str, ...]  # what the target made or said of the file
    commands: tuple[str, ...]  # that build and measure it where it can run
    verdicts: tuple[LayerVerdict, ...]  # what the target makes of each masked layer, where it tells
    comparison: Comparison | None
    tuning: Tuning | None = None  # the search that found the recipe, where there was one
    certificate: Certificate | None
    cost: Charged
    epochs: tuple[Epoch, ...]
    latency: tuple[Latency, ...]
    gates: tuple[Gate, ...]
    files: tuple[FileRow, ...]
    verdict: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Writes report.json and report.md."""
        (folder / "report.json").write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """The report of an output folder."""
        return cls.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))

    def markdown(self) -> str:
        """The report for people, as Markdown."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
        )
        environment.filters["yes_no"] = {True: "yes", False: "no", None: "not known"}.get
        return environment.get_template("report.md.j2").render(report=self, rows=self.summary())

    def summary(self) -> list[tuple[str, str, str, str]]:
        """The few rows that matter most: what, dense, compressed, and the difference."""
        rows: list[tuple[str, str, str, str]] = []
        c = self.comparison
        if c and c.dense and c.compressed:
            drop = 100 * (c.compressed.top1 - c.dense.top1)
            on = f"top-1, {c.count:,} held-out images"
            rows.append((on, f"{c.dense.top1:.2%}", f"{c.compressed.top1:.2%}", f"{drop:+.2f} points"))
        if c:
            rows.append((f"same answer as dense, {c.count:,} images", "", f"{c.agreement:.2%}", ""))
            rows.append(
                (
                    "logit shift, mean (largest)",
                    f"range {c.logit_range:.2f}",
                    f"{c.logit_shift_mean:.3f}",
                    f"({c.logit_shift_max:.3f})",
                )
            )
        if self.certificate:
            p = self.certificate
            rows.append((f"proven unchanged, {p.images:,} held-out images", "", f"{p.proven / p.images:.2%}", ""))
            rows.append(
                (f"same answer on unseen images, at {p.confidence:.0%}", "", f"at least {p.agreement_bound:.2%}", "")
            )
        dense, compressed = self.onnx_bytes("dense.onnx"), self.onnx_bytes("model.onnx")
        rows.append(("ONNX file", _megabytes(dense), _megabytes(compressed), f"{compressed / dense:.2f}×"))
        rows.append(
            (
                "non-zero weights",
                _count(self.weights()),
                _count(self.nonzero()),
                f"{self.nonzero() / self.weights():.2f}×",
            )
        )
        k = self.cost
        rows.append(("multiply-accumulates, zeros skipped", *_macs(k.dense, k.compressed)))
        if self.merges_tokens():
            rows.append(("the same, blocks charged as in the paper", *_macs(k.dense, k.as_published)))
        for pair in self.latency:
            low, high = pair.speedup.interval
            rows.append(
                (
                    f"median latency, batch {pair.dense.batch}, {pair.speedup.count} rounds",
                    f"{pair.dense.p50_ms:.2f} ms",
                    f"{pair.compressed.p50_ms:.2f} ms",
                    f"{pair.speedup.ratio:.2f}× as fast [{low:.2f}, {high:.2f}]",
                )
            )
        return rows

    def merges_tokens(self) -> bool:
        """Whether any tokens are merged into others."""
        return any(self.cost.merged)

    def onnx_bytes(self, name: str) -> int:
        """The size of an ONNX file, with the file of weights beside it where there is one."""
        return sum(row.bytes for row in self.files if row.name in (name, f"{name}.data"))

    def spectra(self) -> list[LayerRow]:
        """The layers that a budget looked at."""
        return [row for row in self.layers if row.spectrum or row.unfitted]

    def refitted(self) -> bool:
        """Whether any layer says what it misses."""
        return any(row.missed is not None for row in self.layers)

    def critical(self) -> bool:
        """Whether the certificate has critical amplifications."""
        return self.certificate is not None and any(row.critical is not None for row in self.certificate.layers)

    def unmoved(self) -> list[LayerRow]:
        """The layers whose channels a permutation left as they were."""
        return [row for row in self.layers if row.unpermuted]

    def weights(self) -> int:
        """How many weights the Linear and Conv2d layers have."""
        return sum(math.prod(row.shape) for row in self.layers)

    def nonzero(self) -> int:
        """How many of them are kept."""
        return sum(round(row.density * math.prod(row.shape)) for row in self.layers)


def layer_rows(model: Model, lowered: Lowered) -> tuple[LayerRow, ...]:
    """A row for each layer that multiplies by weights: its pattern and where the file holds it, or why it is dense."""
    proven = {row.layer: row for row in lowered.masks}
    names = dict.fromkeys([*(name for name, _ in model.layers()), *model.plan])
    rows = []
    for name in names:
        plan, found, module = model.plan_of(name), proven.get(name), model.graph.get_submodule(name)
        # The weight proper; MultiheadAttention, which has none of that name, is known by its first matrix.
        weight = next(p for n, p in module.named_parameters() if n == "weight" or p.ndim > 1)
        rows.append(
            LayerRow(
                name=name,
                kind=type(module).__name__,
                shape=tuple(weight.shape),
                pattern=str(plan.pattern) if plan.mask is not None and plan.pattern else None,
                density=1.0 if plan.mask is None else float(plan.mask.float().mean()),
                reason=None if plan.mask is not None else plan.skipped or "no pass planned anything for it",
                initializer=found.initializer if found else None,
                axis=found.axis if found else None,
                spectrum=plan.spectrum,
                unfitted=plan.unfitted,
                missed=plan.missed,
                permuted=plan.permutation is not None,
                unpermuted=plan.unpermuted,
            )
        )
    return tuple(rows)


def verdict_on(
    layers: tuple[LayerRow, ...],
    target: str,
    accelerated: bool,
    cost: Charged,
    comparison: Comparison | None,
    latency: tuple[Latency, ...],
    verdicts: tuple[LayerVerdict, ...] = (),
    idle: str | None = None,
) -> tuple[str, ...]:
    """What was gained, against what, and what was lost, in sentences that claim only what was measured."""
    masked = [row for row in layers if row.pattern]
    sentences = []
    if masked:
        patterns = ", ".join(
            f"{count} at {pattern}" for pattern, count in Counter(row.pattern for row in masked).most_common()
        )
        sentences.append(
            f"{len(masked)} of {len(layers)} layers are masked ({patterns}), and each mask was found again in the ONNX "
            "file, on the axis that is summed over."
        )
    else:
        sentences.append(f"None of the {len(layers)} layers is masked.")
    if verdicts:
        sentences.append(tally(verdicts))
    unknown = bool(idle) or any(row.chosen is None for row in verdicts)
    if masked and not accelerated and not unknown:
        why = "no sparse kernel was chosen" if verdicts else f"the target {target} has no kernels for them"
        sentences.append(f"Masked layers run as dense and save no time here: {why}.")
    if any(cost.merged):
        sentences.append(
            f"Tokens are merged, from {cost.tokens[0]} to {cost.tokens[-1]} over {len(cost.merged)} attentions, "
            "which is less work for any target."
        )
    if comparison and comparison.dense and comparison.compressed:
        lost = 100 * (comparison.dense.top1 - comparison.compressed.top1)
        sentences.append(
            f"On {comparison.count:,} held-out images top-1 is {comparison.compressed.top1:.2%}, and "
            f"{comparison.dense.top1:.2%} dense: {abs(lost):.2f} points {'lost' if lost >= 0 else 'gained'}."
        )
    elif comparison:
        sentences.append(
            f"On {comparison.count:,} images {comparison.agreement:.2%} of the answers are the dense model's."
        )
    else:
        sentences.append("No images were given (--data), so accuracy was not measured.")
    if idle:
        sentences.append(f"No engine of the target {target} ran here, and no speed was measured: {idle}.")
        if comparison:
            sentences.append("What is said of accuracy was measured with ONNX Runtime on the CPU, on these weights.")
    for pair in latency:
        baseline = f"the dense model in the same precision on the same target, {pair.dense.device}"
        told = pair.speedup.spelt(baseline)
        sentences.append(f"At batch {pair.dense.batch} {'it is ' if pair.speedup.told else ''}{told}.")
    return tuple(sentences)


def _macs(dense: float, compressed: float) -> tuple[str, str, str]:
    """The cells of two counts."""
    return f"{dense / 1e9:.4g} G", f"{compressed / 1e9:.4g} G", f"{compressed / dense - 1:+.2%}"


def _count(value: int) -> str:
    return f"{value / 1e6:.2f} M"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:.2f} MB"
