"""Token merging on real ViTs, without training -> results/token_merging.{json,md,svg}.

    make bench-models; python benchmarks/token_merging.py

Accuracy, agreement and logit shift on held-out images, and latency in ONNX Runtime against the unmerged file, for the
uniform schedule at several r, and for the decreasing and the automatic one of the same cost. All files of a model take
turns in one run, on one thread. "Reached" is the measured speedup as a share of what counting multiply-accumulates
promises.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.common import RESULTS, ROOT, markdown, write
from lib.pretrained import fashion_data, on_fashion

from mpcompile.analysis.block_macs import charged, merges
from mpcompile.data.images import Data
from mpcompile.data.loading import load_data
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request, load
from mpcompile.ir.model import Model
from mpcompile.measure.accuracy import compare
from mpcompile.measure.timing import sample, speedup
from mpcompile.passes import ToMe
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes import RUNTIMES, Build

QUESTION = "what does merging tokens cost in accuracy, and how much faster is it really, without training?"
COLUMNS = (
    "model", "schedule", "tokens merged", "MACs left", "top-1", "same answer", "logit shift",
    "speed, batch 1", "speed, batch 8", "reached, batch 8",
)  # fmt: skip
EXAMPLE = ROOT / "examples" / "fashion_vit"
RATES = {"fashion_vit": (2, 4, 6), "vit_small": (2, 4, 5)}  # of 49 and of 65 tokens
PIXELS = 112
BATCHES = (1, 8)
COLOURS = {"uniform": "#1f4e79", "decreasing": "#b5372c", "auto": "#3c8d40"}


def models() -> Iterator[tuple[str, Model, Data]]:
    """The example and the full-size backbone, with their images."""
    loaded = load(Request(str(EXAMPLE / "model.safetensors")))
    source = loaded.source
    yield "fashion_vit", capture(loaded.module, source), load_data(EXAMPLE / "images.npz", source, 10)
    module, source = on_fashion("vit_small", PIXELS)
    data = fashion_data()
    yield (
        "vit_small",
        capture(module, source),
        replace(data, held_out=replace(data.held_out, order=data.held_out.order[:1000])),
    )


def variants(model: Model, data: Data, rates: tuple[int, ...]) -> dict[str, Model]:
    """Merged models by the name of their schedule."""
    found: dict[str, Model] = {}

    def merged(name: str, step: ToMe) -> Model:
        found[name], _ = PassManager([step]).run(model, data)
        return found[name]

    for r in rates:
        cost = charged(model, merged(f"uniform {r}", ToMe(r=r)))
        share = cost.compressed / cost.dense
        merged(f"decreasing {r}", ToMe(r=f"{r}:decreasing"))
        merged(f"auto {r}", ToMe(r="auto", macs=share))
    return found


def measure(name: str, model: Model, data: Data, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """A row for each schedule of a model."""
    merged = variants(model, data, RATES[name])
    runtime = RUNTIMES["ort"]
    engines = {
        label: runtime.build(lower(each, folder / f"{name}-{label.replace(' ', '-')}.onnx"), Build(threads=1))
        for label, each in {"dense": model, **merged}.items()
    }
    rows: list[dict[str, Any]] = []
    latency: dict[int, Mapping[str, Any]] = {}
    for batch in BATCHES:
        images = np.ascontiguousarray(data.held_out.first(batch).numpy())
        latency[batch] = sample({name: partial(engine, images) for name, engine in engines.items()}, seconds)
    for label, each in merged.items():
        found = compare(engines["dense"], engines[label], data.held_out)
        cost = charged(model, each)
        speeds = {batch: speedup(samples["dense"], samples[label], "dense") for batch, samples in latency.items()}
        assert found.dense is not None
        assert found.compressed is not None
        rows.append(
            {
                "model": name,
                "schedule": label,
                "merges": merges(each.graph, each.example),
                "macs": cost.compressed / cost.dense,
                "merging_macs": cost.merging / cost.dense,
                "dense_top1": found.dense.top1,
                "top1": found.compressed.top1,
                "agreement": found.agreement,
                "shift": found.logit_shift_mean,
                "range": found.logit_range,
                "images": found.count,
                "latency": {
                    str(batch): {
                        "dense_ms": float(np.median(latency[batch]["dense"])),
                        "merged_ms": float(np.median(latency[batch][label])),
                        "ratio": speed.ratio,
                        "interval": speed.interval,
                        "rounds": speed.count,
                    }
                    for batch, speed in speeds.items()
                },
                "reached": speeds[8].ratio * cost.compressed / cost.dense,
            }
        )
        print(cells(rows[-1]), flush=True)
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""

    def speed(batch: str) -> str:
        pair = row["latency"][batch]
        return f"{pair['ratio']:.2f} [{pair['interval'][0]:.2f}, {pair['interval'][1]:.2f}]"

    return (
        row["model"],
        row["schedule"],
        ", ".join(map(str, row["merges"])),
        f"{row['macs']:.1%}",
        f"{row['top1']:.2%} of {row['dense_top1']:.2%}",
        f"{row['agreement']:.2%}",
        f"{row['shift']:.3f} of {row['range']:.2f}",
        speed("1"),
        speed("8"),
        f"{row['reached']:.0%}",
    )


def plot(rows: list[dict[str, Any]]) -> None:
    """Logit shift and measured speedup against the cost that is left, a column a model."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5 * len(names), 7), layout="constrained")
    axes = figure.subplots(2, len(names), sharex="col", squeeze=False)
    for column, name in enumerate(names):
        for kind, colour in COLOURS.items():
            chosen = [row for row in rows if row["model"] == name and row["schedule"].startswith(kind)]
            left = [row["macs"] for row in chosen]
            top, bottom = axes[0][column], axes[1][column]
            top.plot(left, [row["shift"] / row["range"] for row in chosen], "o-", color=colour, label=kind)
            speeds = [row["latency"]["8"] for row in chosen]
            low = [pair["ratio"] - pair["interval"][0] for pair in speeds]
            high = [pair["interval"][1] - pair["ratio"] for pair in speeds]
            bottom.errorbar(left, [pair["ratio"] for pair in speeds], (low, high), fmt="o", color=colour, label=kind)
        limit = np.linspace(min(row["macs"] for row in rows if row["model"] == name), 1, 50)
        bottom.plot(limit, 1 / limit, color="#6b6b6b", linewidth=1, label="by counting")
        top.set_title(name)
        top.set_ylabel("logit shift, share of the range")
        bottom.set_ylabel("times as fast, batch 8")
        bottom.set_xlabel("multiply-accumulates left")
        top.legend()
        bottom.legend()
    figure.savefig(RESULTS / "token_merging.svg", metadata={"Date": None})


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, for each model and batch")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model, data in models():
            rows += measure(name, model, data, Path(folder), args.seconds)
    write("token_merging", QUESTION, "CPUExecutionProvider, one thread", ("torch", "timm", "onnxruntime"), rows)
    table = markdown(COLUMNS, [cells(row) for row in rows])
    (RESULTS / "token_merging.md").write_text(f"# Token merging\n\n{QUESTION}\n\n{table}", encoding="utf-8")
    plot(rows)


if __name__ == "__main__":
    main()
