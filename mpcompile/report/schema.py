"""Report: what was done, kept, skipped and measured. JSON is the truth; the other forms are its views."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mpcompile.analysis.block_macs import Charged
from mpcompile.ir.model import Source
from mpcompile.ir.results import Certificate, Epoch, Spectrum
from mpcompile.measure.accuracy import Comparison
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.measure.timing import Speedup, Timing
from mpcompile.pipeline.pass_manager import PassRecord
from mpcompile.recipe.schema import Recipe
from mpcompile.report.search_schema import Tuning


class Value(BaseModel):
    """A frozen part of a report."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRow(Value):
    """What became of one layer. `density` is the kept share of its weights.

    `macs` are its multiply-accumulates for one image in the dense model, `macs_left` those that are left where its
    zeros are skipped and merged tokens are gone; None for a module that the count does not take apart.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str | None
    density: float
    macs: float | None
    macs_left: float | None
    reason: str | None  # why it stays dense
    initializer: str | None  # its weight in the ONNX file
    axis: int | None  # where the groups lie in that weight
    spectrum: Spectrum | None  # its Marchenko–Pastur fit, where a budget made one
    unfitted: str | None  # why it has none
    permuted: bool  # whether its input channels were reordered
    missed: float | None  # of the power of what it was fitted to, on calibration images
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

    schema_version: Literal[1] = 1
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
        """Writes report.json, report.md and report.html."""
        (folder / "report.json").write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "report.html").write_text(self.html(), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """The report of an output folder."""
        return cls.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))

    def markdown(self) -> str:
        """The report for people, as Markdown."""
        from mpcompile.report.render import markdown

        return markdown(self)

    def html(self) -> str:
        """The report for people, as one HTML page that needs nothing else."""
        from mpcompile.report.render import html

        return html(self)

    def summary(self) -> list[tuple[str, ...]]:
        """The few rows that matter most: what, dense, compressed, and the difference."""
        from mpcompile.report.run_tables import summary

        return [tuple(cell.text for cell in row) for row in summary(self).rows]

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


def report_schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    schema = Report.model_json_schema(mode="serialization")
    version = schema["properties"]["schema_version"]["const"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:mpcompile:report:{version}",
        **schema,
        "title": f"mpcompile report, schema_version {version}",
    }
