"""Accuracy and speed of token merging on two ViTs, without training -> results/token_merging.{json,md,svg}.

    make bench-models; python benchmarks/token_merging.py

Accuracy, agreement and logit shift are measured on held-out images, and speed in ONNX Runtime relative to the file
without merging. The uniform schedule is measured at several r; the decreasing and the automatic schedule at the same
cost. All files of a model are timed in interleaved rounds on one thread. "Reached" is the measured speedup divided by
the ratio of MACs.
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

QUESTION = "How much accuracy does token merging cost without training, and how much faster is it when measured?"
COLUMNS = (
    "model", "schedule", "tokens merged", "MACs left", "top-1", "same answer", "logit shift",
    "speed, batch 1", "speed, batch 8", "reached, batch 8",
)  # fmt: skip
EXAMPLE = ROOT / "examples" / "fashion_vit"
RATES = {"fashion_vit": (2, 4, 6), "vit_small": (2, 4, 5)}  # r per model, of 49 and 65 tokens
PIXELS = 112  # image size of vit_small
BATCHES = (1, 8)
COLOURS = {"uniform": "#1f4e79", "decreasing": "#b5372c", "auto": "#3c8d40"}


def models() -> Iterator[tuple[str, Model, Data]]:
    """Yields the name, captured model and images of the example and of the ViT-S/14."""
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
    """Returns the models with merged tokens, by the name of their schedule."""
    by_schedule: dict[str, Model] = {}

    def add(schedule: str, step: ToMe) -> Model:
        by_schedule[schedule], _ = PassManager([step]).run(model, data)
        return by_schedule[schedule]

    for r in rates:
        cost = charged(model, add(f"uniform {r}", ToMe(r=r)))
        add(f"decreasing {r}", ToMe(r=f"{r}:decreasing"))
        add(f"auto {r}", ToMe(r="auto", macs=cost.compressed / cost.dense))
    return by_schedule


def measure(name: str, model: Model, data: Data, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Measures one model, and returns a row for each schedule."""
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
        accuracy = compare(engines["dense"], engines[label], data.held_out)
        cost = charged(model, each)
        speeds = {batch: speedup(samples["dense"], samples[label], "dense") for batch, samples in latency.items()}
        assert accuracy.dense is not None
        assert accuracy.compressed is not None
        rows.append(
            {
                "model": name,
                "schedule": label,
                "merges": merges(each.graph, each.example),
                "macs": cost.compressed / cost.dense,
                "merging_macs": cost.merging / cost.dense,
                "dense_top1": accuracy.dense.top1,
                "top1": accuracy.compressed.top1,
                "agreement": accuracy.agreement,
                "shift": accuracy.logit_shift_mean,
                "range": accuracy.logit_range,
                "images": accuracy.count,
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
    """Returns the row as cells of the table."""

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
    """Draws logit shift and measured speedup against the remaining MACs, one column per model, into an SVG file."""
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
        bottom.plot(limit, 1 / limit, color="#6b6b6b", linewidth=1, label="ratio of MACs")
        top.set_title(name)
        top.set_ylabel("mean logit shift / logit range")
        bottom.set_ylabel("speedup over dense, batch 8")
        bottom.set_xlabel("remaining share of MACs")
        top.legend()
        bottom.legend()
    figure.savefig(RESULTS / "token_merging.svg", metadata={"Date": None})


def main() -> None:
    """Measures, and writes the three results files."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of timing for each model and batch size")
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
