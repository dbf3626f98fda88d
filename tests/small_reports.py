"""Small reports made by hand, for tests that read reports and need no compiled model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mpcompile.analysis.charged import Charged
from mpcompile.ir.head import Head
from mpcompile.ir.results import Certificate, LayerCertificate, Spectrum
from mpcompile.ir.source import Source
from mpcompile.measure.changed_answers import ChangedAnswers
from mpcompile.measure.comparison import Accuracy, Comparison
from mpcompile.measure.layer_verdict import LayerVerdict
from mpcompile.measure.quantized_layer import QuantizedLayer
from mpcompile.measure.timing import Speedup, Timing
from mpcompile.recipe.schema import Recipe
from mpcompile.report.quantized_schema import Quantized, Variant
from mpcompile.report.schema import DataUsed, FileRow, Latency, LayerRow, Report

BATCHES = (1, 8)
SPEEDS = ((1.33, (1.31, 1.35)), (1.44, (1.42, 1.47)))
ENVIRONMENT = {
    "processor": "AMD EPYC",
    "cores": "2",
    "system": "Linux x86_64",
    "python": "3.12.1",
    "device": "CPUExecutionProvider",
    "torch": "2.14.1",
    "onnxruntime": "1.32.0",
    "N:M kernel": "avx512",
}


def layer(name: str, **changes: Any) -> LayerRow:
    """A row of a Linear layer with 64 × 64 weights, masked to 2:4 unless `changes` say otherwise."""
    values: dict[str, Any] = {
        "name": name,
        "kind": "Linear",
        "shape": (64, 64),
        "pattern": "2:4",
        "density": 0.5,
        "macs": 4096.0,
        "macs_left": 2048.0,
        "reason": None,
        "initializer": f"{name}.weight",
        "axis": 0,
        "spectrum": Spectrum(1.0, 0.02, 0.33, 5, 0.9, 0.041, 0.012),
        "unfitted": None,
        "permuted": True,
        "missed": 0.0123,
        "unpermuted": None,
    }
    return LayerRow(**{**values, **changes})


def dense_layer(name: str, reason: str, **changes: Any) -> LayerRow:
    """A row of a layer that stays dense for this reason."""
    values = {"pattern": None, "density": 1.0, "macs_left": 4096.0, "initializer": None, "axis": None, "missed": None}
    return layer(name, **{**values, "reason": reason, "spectrum": None, "permuted": False, **changes})


LAYERS = (
    dense_layer("stem", "it is the first layer", unpermuted="it reads the image", unfitted="it is the first layer"),
    layer("blocks.0.attn.qkv"),
    layer("blocks.0.mlp.fc1", missed=0.0456, permuted=False, unpermuted="another layer reads its channels too"),
    dense_layer("blocks.0.mlp.fc2", "the budget keeps it dense", spectrum=Spectrum(1.0, 0.03, 0.5, 9, 0.8, 0.2, 0.01)),
    dense_layer("head", "it is the last layer"),
)
VERDICTS = (
    LayerVerdict(
        "blocks.0.attn.qkv", "qkv", "MatMul", "2:4", True, "pattern", "the sparse kernel is faster", True, "NMGemm",
        0.4, 0.25,
    ),
    LayerVerdict(
        "blocks.0.mlp.fc1", "fc1", "MatMul", "2:4", True, "pattern", "the sparse kernel is slower", False, None, 0.3,
        0.35,
    ),
)  # fmt: skip
CERTIFICATE = Certificate(
    images=2000,
    agreeing=1997,
    proven=1982,
    agreement_bound=0.996,
    confidence=0.95,
    shift_mean=0.1,
    shift_max=0.5,
    margin_median=4.0,
    explained=0.9,
    layers=(
        LayerCertificate("blocks.0.attn.qkv", 0.2, 0.4, 0.3, None),
        LayerCertificate("blocks.0.mlp.fc1", 0.1, 0.3, 0.6, None),
    ),
)


def small_report(**changes: Any) -> Report:
    """The report of a model of five layers at 2:4 in fp32, with every key that `changes` do not replace."""
    values: dict[str, Any] = {
        "version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "command_line": ("mpcompile", "model.safetensors", "--pattern", "2:4"),
        "model": Source("model.safetensors", "a" * 64, "vit_tiny", (1, 28, 28)),
        "recipe": Recipe.checked({"passes": [{"mp-budget": {"patterns": ["2:4"]}}, "permute", "nm-mask", "certify"]}),
        "recipe_sha256": "b" * 64,
        "environment": dict(ENVIRONMENT),
        "data": DataUsed(calibration=256, validation=256, training=0, held_out=2000, seed=0, notes=()),
        "passes": (),
        "layers": LAYERS,
        "accelerated": True,
        "parity": (),
        "idle": None,
        "notes": (),
        "commands": (),
        "verdicts": VERDICTS,
        "comparison": comparison(),
        "certificate": CERTIFICATE,
        "cost": Charged(20480.0, 16384.0, 16384.0, 0.0, (), ()),
        "epochs": (),
        "latency": latencies(),
        "gates": (),
        "files": tuple(
            FileRow(name=name, bytes=size, sha256="c" * 64)
            for name, size in (("dense.onnx", 4_850_000), ("model.onnx", 4_850_000), ("model.native.onnx", 2_910_000))
        ),
        "verdict": ("No sentence.",),
    }
    return Report(**{**values, **changes})


def comparison(top1: float = 0.876, dense: float = 0.8825, images: str | None = "d" * 64) -> Comparison:
    """A comparison on 2,000 labelled images with these accuracies."""
    turned = ChangedAnswers(3, 16, 0.004, (top1 - dense - 0.003, top1 - dense + 0.003))
    return Comparison(
        Accuracy(dense, 0.998, 2000), Accuracy(top1, 0.997, 2000), 0.9985, 0.1, 0.3, 0.5, 12.0, 2000, turned, Head(),
        images_sha256=images,
    )  # fmt: skip


def latencies(
    speeds: tuple[tuple[float, tuple[float, float]], ...] = SPEEDS, dense_ms: tuple[float, ...] = (1.64, 12.16)
) -> tuple[Latency, ...]:
    """Latencies at the batch sizes, by the speedups over dense and the medians of dense."""
    rows = []
    for batch, ms, (ratio, interval) in zip(BATCHES, dense_ms, speeds, strict=True):
        dense, own = _timing(ms, batch), _timing(ms / ratio, batch)
        rows.append(Latency(dense=dense, compressed=own, speedup=Speedup(ratio, interval, 40, "dense")))
    return tuple(rows)


def _timing(ms: float, batch: int) -> Timing:
    return Timing(ms, 1.1 * ms, 1.2 * ms, 40, batch, (0.99 * ms, 1.01 * ms), "CPU")


def int8_report(**changes: Any) -> Report:
    """The same model in int8, with a dense int8 model beside it and one layer that stays in floating point."""
    over = tuple(Speedup(ratio, (ratio - 0.02, ratio + 0.02), 40, "int8, mpcompile") for ratio in (1.04, 1.09))
    rows = (Variant("int8, mpcompile", "static", timings=tuple(pair.dense for pair in latencies())),)
    kernels = (
        QuantizedLayer("blocks.0.attn.qkv", "qkv", "MatMul", True, "NMGemmInt8", None, 0.1),
        QuantizedLayer("blocks.0.mlp.fc1", "fc1", "MatMul", False, None, "its inputs are not quantised", 0.2),
    )
    layers = [
        row.model_copy(
            update={"precision": "int8", "rounding_error": 0.0007}
            if row.pattern
            else {"unquantized": f"{row.name} is sensitive"}
        )
        for row in LAYERS
    ]
    values: dict[str, Any] = {
        "layers": tuple(layers),
        "quantized": Quantized("int8", None, rows, over, kernels),
        "recipe": small_report().recipe.model_copy(update={"precision": "int8"}),
    }
    return small_report(**{**values, **changes})


def of_model(name: str, sha256: str) -> Source:
    """The source of another dense model."""
    return replace(small_report().model, name=name, sha256=sha256)


def write(report: Report, folder: Path) -> Path:
    """The folder with report.json alone in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    return folder
