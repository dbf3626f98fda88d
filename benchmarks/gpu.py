"""TensorRT's sparse kernels on one GPU, model by model -> results/DEVICE.{json,md,svg}.

    python benchmarks/gpu.py                                 # every model, fp16 and bf16, batches 1, 8, 64
    python benchmarks/gpu.py --models vit_base_patch16_224   # one of them

Latency does not depend on what the weights are, so they are random: the largest two of four are kept, and nothing is
said of accuracy. Each model is built three times in the same precision (dense; masked, sparse kernels off; masked, on),
checked against ONNX Runtime, and timed in turns without transfers. Beside them, in PyTorch on the same GPU, the dense
baselines that papers use: the weights in the same precision, compiled and not, and autocast over float32 weights.

The paper's figures for transformers are of graphs that merge tokens, sparse against dense on the same graph; those rows
have a dense engine that merges too. Every line names the figure of arXiv 2606.02608 that it stands for ("in all" is the
column to compare) and what that was measured against. Files are written after every model, a failure is a line of its
own, and the seconds that each took stand in the JSON.
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
from mpcompile.export.onnx_export import Precision, lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.measure.timing import sample, timing
from mpcompile.passes import NMMask, ToMe
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.runtimes import Build, Runtime

QUESTION = "how much faster are 2:4 engines of TensorRT than the dense engine in the same precision, and why not more?"
SAYS = "arXiv 2606.02608 says"


@dataclass(frozen=True, slots=True)
class Case:
    """A model, how many tokens it merges in each block, whether the dense engine merges them too, and the published
    figure that it stands for.
    """

    model: str
    merged: int = 0
    dense_merged: bool = False
    published: str = "no figure of the paper"


AUTOCAST = "times dense autocast over float32 weights, A40, batch 64, both merging"
CASES = (
    Case("vit_base_patch16_224"),
    Case("vit_base_patch16_224", 8, False, "what merging and 2:4 give together; no figure of the paper"),
    Case("vit_base_patch16_224", 8, True, f"{SAYS} 1.388 {AUTOCAST}; 1.032 times dense bf16"),
    Case("vit_large_patch16_224", 8, True, f"{SAYS} 1.394 {AUTOCAST}; 1.060 times dense bf16"),
    Case("convnextv2_base", 0, False, f"{SAYS} 1.295 times dense autocast, A40, batch 64; 0.811 times dense bf16"),
    Case("resnet50", 0, False, f"{SAYS} 1.70 times its own dense im2col, which is 0.44 of cuDNN"),
    Case("resnet152d", 0, False, f"{SAYS} 1.62 times its own dense im2col, which is 0.39 of cuDNN"),
)
COLUMNS = (
    "model", "precision", "batch", "dense ms", "graph alone", "kernels alone", "in all", "sparse layers", "stands for",
)  # fmt: skip


def captured(name: str) -> Model:
    """A timm model with random weights."""
    torch.manual_seed(0)
    module = timm.create_model(name).eval()
    return capture(module, source_of(module, name=name, arch=name, sha256=""))


def measure(
    case: Case, precision: Precision, target: str, batches: tuple[int, ...], seconds: float, folder: Path
) -> dict[str, Any]:
    """One model in one precision: its engines, timed, with a verdict a layer."""
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
    found = compared(runtime, before, after, Build(batches=batches, folder=engines), settings)
    return {
        "model": case.model,
        "merged_tokens": case.merged,
        "dense_merges_too": case.dense_merged,
        "precision": precision,
        "published": case.published,
        "target": target,
        "device": found.device,
        "settings": {"transfers": settings.transfers, "cuda_graph": settings.graph},
        "parity": [row.model_dump() for row in found.parity],
        "arms": [arm.model_dump() for arm in found.arms],
        "batches": [batch.model_dump(mode="json") for batch in found.batches],
        "verdicts": [asdict(verdict) for verdict in found.verdicts],
        "pytorch": {str(batch): pytorch(case, precision, batch, seconds) for batch in batches} if on_gpu else {},
        "seconds": time.perf_counter() - started,
    }


def pytorch(case: Case, precision: Precision, batch: int, seconds: float) -> dict[str, Any]:
    """The dense model in PyTorch on the GPU: milliseconds of each usual baseline, in turns."""
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    module = timm.create_model(case.model).eval().cuda()
    typed = timm.create_model(case.model).eval().cuda().to(kind)
    images = torch.randn(batch, *input_size(module), device="cuda")
    in_kind = images.to(kind)
    torch.compiler.reset()  # else the next batch size is compiled as a dynamic shape, and the one after not at all
    fast: Callable[[torch.Tensor], object] = torch.compile(typed, dynamic=False)

    @torch.inference_mode()
    def plain() -> None:
        typed(in_kind)
        torch.cuda.synchronize()

    @torch.inference_mode()
    def compiled() -> None:
        fast(in_kind)
        torch.cuda.synchronize()

    @torch.inference_mode()
    def autocast() -> None:
        with torch.autocast("cuda", kind):
            module(images)
        torch.cuda.synchronize()

    calls: dict[str, Callable[[], None]] = {f"{precision} weights": plain, f"{precision} weights, compiled": compiled}
    if precision != "fp32":
        calls[f"autocast to {precision}, float32 weights"] = autocast
    samples = sample(calls, seconds)
    name = torch.cuda.get_device_name()
    return {key: timing(values, batch, name).p50_ms for key, values in samples.items()}


def input_size(module: torch.nn.Module) -> tuple[int, ...]:
    """Channels, height and width of what a timm model takes."""
    size: tuple[int, ...] = timm.data.resolve_model_data_config(module)["input_size"]
    return size


def lines(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table for one model: one a batch."""
    chosen = Counter(verdict["chosen"] for verdict in row["verdicts"])
    told = f"{chosen[True]} of {len(row['verdicts'])}" if chosen[True] + chosen[False] else "not told"
    merged = f", {row['merged_tokens']} tokens merged a block" if row["merged_tokens"] else ""
    merged += ", in the dense one too" if row["dense_merges_too"] else ""

    def ratio(batch: dict[str, Any], key: str) -> str:
        found = batch["comparisons"].get(key)
        if found is None:
            return "–"
        low, high = found["interval"]
        return f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]"

    return [
        (
            row["model"] + merged,
            row["precision"],
            str(batch["batch"]),
            f"{batch['timings'][DENSE]['p50_ms']:.3f}",
            ratio(batch, f"{KERNELS_OFF}/{DENSE}"),
            ratio(batch, f"{COMPRESSED}/{KERNELS_OFF}"),
            ratio(batch, f"{COMPRESSED}/{DENSE}"),
            told,
            row["published"],
        )
        for batch in row["batches"]
    ]


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Speedup over the dense engine by batch, a line a model and precision."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        sizes = [batch["batch"] for batch in row["batches"]]
        ratios = [batch["comparisons"][f"{COMPRESSED}/{DENSE}"] for batch in row["batches"]]
        middle = np.array([found["ratio"] for found in ratios])
        spread = np.abs(np.array([found["interval"] for found in ratios]).T - middle)
        label = f"{row['model']}{' + merging' if row['merged_tokens'] else ''}, {row['precision']}"
        axes.errorbar(sizes, middle, yerr=spread, marker="o", capsize=3, linewidth=1.2, label=label)
    axes.axhline(1, color="#2b2b2b", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("batch")
    axes.set_ylabel("times as fast as the dense engine")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measures what is asked and writes the files; returns the JSON's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(dict.fromkeys(case.model for case in CASES)))
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16"], choices=get_args(Precision))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each batch")
    parser.add_argument("--target", default="trt", choices=[name for name in RUNTIMES if name not in ("rtx", "eager")])
    given = parser.parse_args(arguments)
    runtime = RUNTIMES[given.target]
    if missing := runtime.missing():
        raise SystemExit(f"target {given.target}: {missing}")
    known = [case for case in CASES if case.model in given.models]
    cases = known + [Case(name) for name in given.models if name not in {case.model for case in known}]
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    path = RESULTS
    for case in cases:
        for precision in given.precisions:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    batches = tuple(given.batches)
                    rows.append(measure(case, precision, given.target, batches, given.seconds, Path(folder)))
                except Exception as error:  # of any library below: what was measured so far is worth having
                    told = " ".join(f"{type(error).__name__}: {error}".split())
                    failures.append({"model": case.model, "precision": precision, "failed": told})
                    print(f"{case.model}, {precision} failed: {told}", flush=True)
                else:
                    print(markdown(COLUMNS, lines(rows[-1])), flush=True)
            if rows:
                path = written(rows, failures, runtime)
    if not rows:
        raise SystemExit("nothing could be measured")
    return path


def written(rows: list[dict[str, Any]], failures: list[dict[str, Any]], runtime: Runtime) -> Path:
    """The three files for what was measured so far; returns the JSON's path."""
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
