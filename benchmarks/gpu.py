"""Speed of TensorRT's sparse kernels on one GPU, by model -> results/DEVICE.{json,md,svg}.

    python benchmarks/gpu.py                                 # every model, fp16 and bf16, batches 1, 8, 64
    python benchmarks/gpu.py --models vit_base_patch16_224   # one model

Weights are random, since latency does not depend on their values, and masked at 2:4 by magnitude. Accuracy is not
measured. Each model is built as three engines of the same precision: dense; masked with sparse kernels off; masked with
sparse kernels on. They are checked against ONNX Runtime, and timed in interleaved rounds without transfers. The dense
baselines of papers are timed in PyTorch on the same GPU: weights in the same precision, with and without torch.compile,
and autocast over float32 weights.

The figures for transformers in arXiv 2606.02608 compare a sparse and a dense engine that both merge tokens. The rows
that repeat them have a dense engine with token merging. Each row names the published figure and its baseline; compare
it with the column "total". The files are written after each model. If a model fails, the error is added as a line. The
JSON has the seconds that each model took.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import timm
import torch
from lib.common import RESULTS, markdown, write
from matplotlib.figure import Figure

from mpcompile.data.images import Data
from mpcompile.driver.bench import COMPRESSED, DENSE, KERNELS_OFF, compared
from mpcompile.driver.compare_engines import Settings
from mpcompile.driver.run_plan import RUNTIMES
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import Precision
from mpcompile.measure.timing import sample, timing
from mpcompile.passes import NMMask, ToMe
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.runtimes import Build, Runtime

QUESTION = "How much faster are 2:4 engines of TensorRT than dense ones of the same precision, and what limits them?"
PAPER = "arXiv 2606.02608:"


@dataclass(frozen=True, slots=True)
class Case:
    """A model to measure: tokens merged per block, if the dense engine merges too, and the published figure."""

    model: str
    merged: int = 0
    dense_merged: bool = False
    published: str = "no figure of the paper"


AUTOCAST = "times dense autocast over float32 weights, A40, batch 64, both with token merging"
CASES = (
    Case("vit_base_patch16_224"),
    Case("vit_base_patch16_224", 8, False, "token merging and 2:4 together; no figure of the paper"),
    Case("vit_base_patch16_224", 8, True, f"{PAPER} 1.388 {AUTOCAST}; 1.032 times dense bf16"),
    Case("vit_large_patch16_224", 8, True, f"{PAPER} 1.394 {AUTOCAST}; 1.060 times dense bf16"),
    Case("convnextv2_base", 0, False, f"{PAPER} 1.295 times dense autocast, A40, batch 64; 0.811 times dense bf16"),
    Case("resnet50", 0, False, f"{PAPER} 1.70 times its own dense im2col, which is 0.44 of cuDNN"),
    Case("resnet152d", 0, False, f"{PAPER} 1.62 times its own dense im2col, which is 0.39 of cuDNN"),
)
COLUMNS = (
    "model", "precision", "batch", "dense ms", "graph alone", "kernels alone", "total", "sparse layers", "published",
)  # fmt: skip


def captured(name: str) -> Model:
    """Returns a captured timm model with random weights."""
    torch.manual_seed(0)
    module = timm.create_model(name).eval()
    return capture(module, source_of(module, name=name, arch=name, sha256=""))


def measure(
    case: Case, precision: Precision, target: str, batches: tuple[int, ...], seconds: float, folder: Path
) -> dict[str, Any]:
    """Builds and times the engines of one model in one precision, and returns the row with a verdict per layer."""
    started = time.perf_counter()
    dense = captured(case.model)
    merging: list[Pass] = [ToMe(r=case.merged)] if case.merged else []
    masking: list[Pass] = [NMMask(pattern=NM(2, 4), criterion="magnitude", refit="none")]
    masked, _ = PassManager([*masking, *merging]).run(dense, Data())
    if case.dense_merged:
        dense, _ = PassManager(merging).run(dense, Data())
    runtime = RUNTIMES[target]
    before = lower(dense, folder / "dense.onnx", precision=precision)
    after = lower(masked, folder / "masked.onnx", precision=precision)
    on_gpu = target in ("trt", "ort-cuda")
    settings = Settings(target=target, seconds=seconds, transfers=not on_gpu, graph=target == "trt")
    engines = folder / "engines"
    engines.mkdir(exist_ok=True)
    comparison = compared(runtime, before, after, Build(batches=batches, folder=engines), settings)
    return {
        "model": case.model,
        "merged_tokens": case.merged,
        "dense_merges_too": case.dense_merged,
        "precision": precision,
        "published": case.published,
        "target": target,
        "device": comparison.device,
        "settings": {"transfers": settings.transfers, "cuda_graph": settings.graph},
        "parity": [row.model_dump() for row in comparison.parity],
        "arms": [arm.model_dump() for arm in comparison.arms],
        "batches": [batch.model_dump(mode="json") for batch in comparison.batches],
        "verdicts": [asdict(verdict) for verdict in comparison.verdicts],
        "pytorch": {str(batch): pytorch(case, precision, batch, seconds) for batch in batches} if on_gpu else {},
        "seconds": time.perf_counter() - started,
    }


def pytorch(case: Case, precision: Precision, batch: int, seconds: float) -> dict[str, Any]:
    """Times the dense model in PyTorch on the GPU in interleaved rounds; returns median milliseconds per baseline."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    module = timm.create_model(case.model).eval().cuda()
    cast_module = timm.create_model(case.model).eval().cuda().to(dtype)
    images = torch.randn(batch, *input_size(module), device="cuda")
    cast_images = images.to(dtype)
    # Without a reset, the second batch size is compiled with dynamic shapes, and the third is not compiled.
    torch.compiler.reset()
    compiled_module: Callable[[torch.Tensor], object] = torch.compile(cast_module, dynamic=False)

    @torch.inference_mode()
    def plain() -> None:
        cast_module(cast_images)
        torch.cuda.synchronize()

    @torch.inference_mode()
    def compiled() -> None:
        compiled_module(cast_images)
        torch.cuda.synchronize()

    @torch.inference_mode()
    def autocast() -> None:
        with torch.autocast("cuda", dtype):
            module(images)
        torch.cuda.synchronize()

    calls: dict[str, Callable[[], None]] = {f"{precision} weights": plain, f"{precision} weights, compiled": compiled}
    if precision != "fp32":
        calls[f"autocast to {precision}, float32 weights"] = autocast
    samples = sample(calls, seconds)
    name = torch.cuda.get_device_name()
    return {key: timing(values, batch, name).p50_ms for key, values in samples.items()}


def input_size(module: torch.nn.Module) -> tuple[int, ...]:
    """Returns channels, height and width of a timm model's images."""
    size: tuple[int, ...] = timm.data.resolve_model_data_config(module)["input_size"]
    return size


def lines(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the lines of the table for one model, one per batch size."""
    chosen = Counter(verdict["chosen"] for verdict in row["verdicts"])
    # Not every runtime reports the kernel of each layer.
    sparse_layers = f"{chosen[True]} of {len(row['verdicts'])}" if chosen[True] + chosen[False] else "unknown"
    merged = f", {row['merged_tokens']} tokens merged per block" if row["merged_tokens"] else ""
    merged += ", in the dense engine too" if row["dense_merges_too"] else ""

    def ratio(batch: dict[str, Any], key: str) -> str:
        speedup = batch["comparisons"].get(key)
        if speedup is None:
            return "–"
        low, high = speedup["interval"]
        return f"{speedup['ratio']:.3f} [{low:.3f}, {high:.3f}]"

    return [
        (
            row["model"] + merged,
            row["precision"],
            str(batch["batch"]),
            f"{batch['timings'][DENSE]['p50_ms']:.3f}",
            ratio(batch, f"{KERNELS_OFF}/{DENSE}"),
            ratio(batch, f"{COMPRESSED}/{KERNELS_OFF}"),
            ratio(batch, f"{COMPRESSED}/{DENSE}"),
            sparse_layers,
            row["published"],
        )
        for batch in row["batches"]
    ]


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Returns a figure of the speedup over the dense engine by batch size, one line per model and precision."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        sizes = [batch["batch"] for batch in row["batches"]]
        speedups = [batch["comparisons"][f"{COMPRESSED}/{DENSE}"] for batch in row["batches"]]
        medians = np.array([speedup["ratio"] for speedup in speedups])
        errors = np.abs(np.array([speedup["interval"] for speedup in speedups]).T - medians)
        label = f"{row['model']}{' + token merging' if row['merged_tokens'] else ''}, {row['precision']}"
        axes.errorbar(sizes, medians, yerr=errors, marker="o", capsize=3, linewidth=1.2, label=label)
    axes.axhline(1, color="#2b2b2b", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("batch size")
    axes.set_ylabel("speedup over the dense engine")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measures the models of the arguments, writes the files after each, and returns the path of the JSON file.

    Raises SystemExit if the target cannot run on this machine or no model could be measured.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = list(dict.fromkeys(case.model for case in CASES))
    targets = [name for name in RUNTIMES if name not in ("rtx", "eager")]
    precisions = get_args(Precision)
    parser.add_argument("--models", nargs="+", default=models, help="timm's names")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16"], choices=precisions)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], help="batch sizes")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of timing for each model and batch size")
    parser.add_argument("--target", default="trt", choices=targets, help="runtime to measure")
    options = parser.parse_args(arguments)
    runtime = RUNTIMES[options.target]
    if missing := runtime.missing():
        raise SystemExit(f"target {options.target}: {missing}")
    listed = [case for case in CASES if case.model in options.models]
    cases = listed + [Case(name) for name in options.models if name not in {case.model for case in listed}]
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    path = RESULTS
    for case in cases:
        for precision in options.precisions:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    batches = tuple(options.batches)
                    rows.append(measure(case, precision, options.target, batches, options.seconds, Path(folder)))
                except Exception as error:  # from any library: one failure must not lose the rows of other models
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    failures.append({"model": case.model, "precision": precision, "failed": reason})
                    print(f"{case.model}, {precision} failed: {reason}", flush=True)
                else:
                    print(markdown(COLUMNS, lines(rows[-1])), flush=True)
            if rows:
                path = write_files(rows, failures, runtime)
    if not rows:
        raise SystemExit("no model could be measured; the errors are printed above")
    return path


def write_files(rows: list[dict[str, Any]], failures: list[dict[str, Any]], runtime: Runtime) -> Path:
    """Writes the three files with the rows measured so far, and returns the path of the JSON file."""
    device = rows[0]["device"]
    name = re.sub(r"[^a-z0-9]+", "_", f"{device}_{runtime.name}".lower()).strip("_")
    path = write(name, QUESTION, device, ("torch", "timm", "onnx"), [*rows, *failures], runtime.versions())
    table = markdown(COLUMNS, [line for row in rows for line in lines(row)])
    failed = "".join(f"\n{row['model']} in {row['precision']} failed: {row['failed']}\n" for row in failures)
    (RESULTS / f"{name}.md").write_text(f"# 2:4 on {device}\n\n{QUESTION}\n\n{table}{failed}", encoding="utf-8")
    plot(rows).savefig(RESULTS / f"{name}.svg", format="svg", metadata={"Date": None})
    return path


if __name__ == "__main__":
    main()
