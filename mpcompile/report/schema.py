"""Report: the values of report.json. report.md and report.html are rendered from them (render.py)."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mpcompile.analysis.charged import Charged
from mpcompile.ir.graph_node import GraphNode
from mpcompile.ir.results import Certificate, Epoch, Polished, Spectrum
from mpcompile.ir.source import Source
from mpcompile.measure.comparison import Comparison
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.measure.timing import Speedup, Timing
from mpcompile.pipeline.pass_record import PassRecord
from mpcompile.recipe.schema import Recipe
from mpcompile.report.layer_counts import LayerCounts, count_layers
from mpcompile.report.part_schema import Part
from mpcompile.report.quantized_schema import Quantized
from mpcompile.report.search_schema import Tuning

NATIVE = "model.native.onnx"  # the file with kernels of mpcompile, if the run wrote one


class Value(BaseModel):
    """Base class of the parts of a report: frozen, and unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRow(Value):
    """One layer with weights. `density` is the share of its weights that are kept.

    `macs` are the layer's multiply-accumulates for one image in the dense model. `macs_left` are those that remain if
    zeros are skipped and tokens are merged. Both are None for a module whose MACs are not counted one by one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str | None
    density: float
    macs: float | None
    macs_left: float | None
    reason: str | None  # why the layer stays dense
    initializer: str | None  # name of its weight in the ONNX file
    axis: int | None  # axis of that weight along which the groups of M lie
    spectrum: Spectrum | None  # Marchenko–Pastur fit, if a budget pass made one
    unfitted: str | None  # why there is no fit
    permuted: bool  # whether its input channels were reordered
    missed: float | None  # relative squared error of the refit on calibration images
    unpermuted: str | None  # why its channels were not reordered, if `permute` examined it
    shares_weight_with: str | None = None  # the first layer with the same weight, if that is an earlier one
    precision: str | None = None  # int8 or fp8 if the layer is quantised; None for floating point
    unquantized: str | None = None  # why the layer stays in floating point, if the pass quantize examined it
    rounding_error: float | None = None  # relative squared error of the rounded weights on calibration images
    kept_energy: tuple[float, ...] = ()  # shares of the dense weight's squares, by runs of groups of input channels


class Parity(Value):
    """Largest difference between two forms of one model on the same images: max |Δ| / max |expected| of the outputs."""

    what: str
    difference: float
    tolerance: float
    images: int


class Latency(Value):
    """Latency of the dense and the compressed model, timed in interleaved rounds of one run."""

    dense: Timing
    compressed: Timing
    speedup: Speedup


class FileRow(Value):
    """A file of the output folder."""

    name: str
    bytes: int
    sha256: str


class DataUsed(Value):
    """The number of images in each split, the seed that selected them, and notes about the data."""

    calibration: int
    validation: int
    training: int
    held_out: int
    seed: int
    notes: tuple[str, ...]


class InputRow(Value):
    """An input of the model, as the ONNX file names it; `shape` is that of one image."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class OutputRow(InputRow):
    """An output of the model, and how far the compressed model's is from the dense one's, both in PyTorch.

    The largest relative error over images, ‖Δ‖₂ / ‖y‖₂, and the smallest cosine; None if the values are not
    floating-point.
    """

    relative_error: float | None = None
    cosine: float | None = None


class Captured(Value):
    """How the model was captured, and what it takes and returns: the images and the primary output come first.

    `images` is the number of images on which the outputs of both models were compared.
    """

    by: str  # recorder: one run was recorded; export: torch.export
    inputs: tuple[InputRow, ...]
    outputs: tuple[OutputRow, ...]
    images: int


class Gate(Value):
    """A limit of the recipe, the measured value, and whether the limit holds."""

    name: str
    limit: float
    found: float
    holds: bool
    reason: str | None = None  # why it does not hold, if the two numbers do not say it

    def __str__(self) -> str:
        digits = 4 if 0 < self.limit < 0.1 else 2
        return self.reason or f"{self.name} is {self.found:.{digits}f}; {self.limit:g} is allowed"


class Report(Value):
    """The content of report.json. `schema_version` is raised if a key is removed or changes its meaning."""

    schema_version: Literal[1] = 1
    version: str  # of mpcompile
    created: str  # ISO 8601, UTC
    command_line: tuple[str, ...] | None = None  # that started the run, word by word; None for a run from Python
    model: Source
    captured: Captured | None = None  # None in reports of earlier versions
    recipe: Recipe
    recipe_sha256: str
    environment: dict[str, str]
    data: DataUsed
    passes: tuple[PassRecord, ...]
    layers: tuple[LayerRow, ...]
    accelerated: bool  # whether masked layers run on sparse kernels; if no engine ran: whether the target has them
    parity: tuple[Parity, ...]
    idle: str | None  # why no engine of the target ran on this machine
    notes: tuple[str, ...]  # what capture says about the model, and the target about the ONNX file
    commands: tuple[str, ...]  # commands that build and time the engine on a machine that has the target
    verdicts: tuple[LayerVerdict, ...]  # kernel choice for each masked layer, if the target reports it
    comparison: Comparison | None
    quantized: Quantized | None = None  # dense models in 8 bits beside this one, if it is in 8 bits
    part: Part | None = None  # the part that was compressed (--submodule); None for the whole model
    logit_factor: float | None = None  # of the pass confidence, in the last layers; None if it changed nothing
    graph: tuple[GraphNode, ...] = ()  # the operations of the captured graph, in order
    tuning: Tuning | None = None  # the search that found the recipe, if there was one
    certificate: Certificate | None
    cost: Charged
    epochs: tuple[Epoch, ...]
    polished: Polished | None = None  # of the pass polish, also if it left the model as it was
    latency: tuple[Latency, ...]
    gates: tuple[Gate, ...]
    files: tuple[FileRow, ...]
    verdict: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """The report of an output folder."""
        return cls.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))

    def _repr_html_(self) -> str:
        """The report in a Jupyter notebook: verdict, tiles and warnings."""
        from mpcompile.report.render import fragment  # imports this module

        return fragment(self)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of the first input of the ONNX files, without the batch: (channels, height, width) of an image."""
        return self.part.inputs[0].shape if self.part else self.model.size

    def merges_tokens(self) -> bool:
        """Whether any tokens are merged."""
        return any(self.cost.merged)

    def of_values(self) -> bool:
        """Whether the outputs are values without a decision, as far as images were compared."""
        return self.comparison is not None and self.comparison.values is not None

    def certifiable(self) -> bool:
        """Whether the outputs have one decision for each image, as far as images were compared."""
        return not self.of_values() and (self.comparison is None or self.comparison.positions == 1)

    def onnx_bytes(self, name: str) -> int:
        """The size of an ONNX file in bytes, including its external weight file NAME.data."""
        return sum(row.bytes for row in self.files if row.name in (name, f"{name}.data"))

    def spectra(self) -> list[LayerRow]:
        """The layers that a budget pass examined, fitted or not."""
        return [row for row in self.layers if row.spectrum or row.unfitted]

    def refitted(self) -> bool:
        """Whether any layer has the error of a refit."""
        return any(row.missed is not None for row in self.layers)

    def critical(self) -> bool:
        """Whether the certificate has critical amplifications."""
        return self.certificate is not None and any(row.critical is not None for row in self.certificate.layers)

    def unmoved(self) -> list[LayerRow]:
        """The layers that a permutation examined and did not reorder."""
        return [row for row in self.layers if row.unpermuted]

    def counts(self) -> LayerCounts:
        """The numbers of layers and weights; a weight that several layers share counts once."""
        return count_layers(self.layers)

    def in_float(self) -> dict[str, str]:
        """Why a layer of a model in 8 bits runs in floating point, by layer name; empty for other models.

        The pass `quantize` left it out, or the target has no 8-bit kernel for it.
        """
        kernels = self.quantized.kernels if self.quantized else ()
        reasons = {row.name: row.unquantized for row in self.layers} | {row.layer: row.reason for row in kernels}
        return {name: reason for name, reason in reasons.items() if reason}

    def weights(self) -> int:
        """The number of weights of all layers."""
        return self.counts().weights

    def nonzero(self) -> int:
        """The number of weights of all layers that are kept."""
        return self.counts().nonzero


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
