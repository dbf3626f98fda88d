"""Speed of whole ViTs on the N:M kernel, relative to ONNX Runtime's dense -> results/cpu_vit{,_2_threads}.{json,md}.

    python benchmarks/cpu_vit.py [--openvino PYTHON] [--threads 1] [--models vit_small_patch16_224 …]

ViTs with random weights at 224 pixels. Every Linear in the blocks is masked by magnitude and runs on the N:M kernel;
all other operators run in ONNX Runtime. The baseline is the dense file of the whole model without token merging. Also
timed, with the row's token merging:

- the dense file, if tokens are merged;
- the dense file after the fusions of onnxruntime.transformers; in this export they find LayerNorm and GELU, not
  attention;
- the dense file with dynamic int8, which changes the results;
- the same graph in torch, float32, eager;
- the dense file in OpenVINO, float32, in a process under the Python that --openvino names.

All of them run in interleaved rounds, timed in process CPU time on one thread and in wall time on more. Each speedup is
printed with its limit, the ratio of MACs. Rows of other processors are kept in the file, each processor in a table of
its own. With --add, rows of this processor for other models and batch sizes are kept too.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from lib.common import RESULTS, markdown, rows_of, write
from lib.cpu_timing import (
    by_processor,
    device,
    interleaved,
    load_range,
    median_speedup,
    provenance,
    rows_of_other_processors,
    speedup_cell,
)
from lib.openvino_process import openvino
from lib.vit_files import Engine, Run, masked, merging, torch_logits, untrained

from mpcompile.analysis.macs import cost
from mpcompile.export.mask_check import file_weights
from mpcompile.export.onnx_export import lower
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.runtimes import native
from mpcompile.runtimes.native.onnx_rewrite import find, replace
from mpcompile.runtimes.ort.int8 import quantise_dynamic, saturates
from mpcompile.runtimes.ort.session import session_on

QUESTION = "How much faster is a whole ViT on the N:M kernel than on ONNX Runtime's dense kernels?"
PATTERNS = ("2:4", "8:16", "16:32", "12:32", "1:4", "12:16", "2:4x2", "2:4x4")
BASELINES = ("merged, dense", "fused", "OpenVINO", "torch", "dynamic int8")
COLUMNS = ("model", "batch", "ToMe r", "dense ms", *PATTERNS, *BASELINES, "drift 2:4")
BLOCK_MS = 20.0  # of each engine in each round


@dataclass(frozen=True)
class Files:
    """The ONNX files of one model. All have the same weights, except for their masks.

    Attributes:
        model: the model that torch runs: dense weights, with token merging.
        whole: the file of the baseline: weights masked at 2:4, without token merging, dense kernels.
        merged: the same with token merging; equal to `whole` if no tokens are merged.
        native: the files for the N:M kernel by pattern, with token merging.
        limits: MACs of the whole dense model relative to those of the row, by pattern and for "merged, dense".
    """

    model: Model
    whole: Path
    merged: Path
    native: dict[str, Path]
    limits: dict[str, float]


def write_files(name: str, batch: int, r: int, folder: Path) -> Files:
    """Writes all ONNX files of a timm model at a batch size, with r tokens merged after each attention.

    Raises SystemExit if a masked layer cannot run on the kernel.
    """
    model = untrained(name)
    dense_macs = cost(model).macs

    def dense(source: Model, stem: str) -> tuple[onnx.ModelProto, Path]:
        file = onnx.load(lower(source, folder / f"{stem}_free.onnx", batch=batch).onnx)
        path = folder / f"{stem}.onnx"
        onnx.save_model(masked(file, NM.parse("2:4"))[0], path)
        return file, path

    file, whole = dense(model, "whole")
    merged = whole
    if r:
        model = merging(model, r)
        file, merged = dense(model, "merged")
    costs, native_files = cost(model), {}
    limits = {"merged, dense": dense_macs / costs.macs}
    for text in PATTERNS:
        sparse, proven = masked(file, NM.parse(text))
        limits[text] = dense_macs / costs.executed_macs({row.layer: NM.parse(text) for row in proven})
        gemms, refused = find(sparse, proven)
        if refused:
            raise SystemExit(f"{name}: {refused[0].reason}")
        native_files[text] = folder / f"native_{text.replace(':', '_')}.onnx"
        onnx.save_model(replace(sparse, gemms), native_files[text])
    return Files(model, whole, merged, native_files, limits)


def fused(dense: Path, folder: Path) -> Path:
    """Writes the dense file after the fusions of onnxruntime.transformers, and returns its path.

    Raises SystemExit if nothing was fused.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    width = next(w.values.shape[1] for w in file_weights(onnx.load(dense)) if any("qkv" in s for s in w.scopes))
    model = optimize_model(str(dense), model_type="vit", num_heads=width // 64, hidden_size=width, opt_level=0)
    if not any(model.get_fused_operator_statistics().values()):
        raise SystemExit("onnxruntime.transformers fused no operators of this file")
    model.save_model_to_file(str(folder / "fused.onnx"))
    return folder / "fused.onnx"


def int8(dense: Path, folder: Path) -> Path:
    """Writes the dense file with MatMul and Gemm in dynamic int8, and returns its path.

    Weights have 7 bits if ONNX Runtime's int8 products saturate on this processor, else 8.
    """
    quantise_dynamic(dense, folder / "int8.onnx", saturates())
    return folder / "int8.onnx"


def measure(name: str, batch: int, r: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one row: the dense time, and the speedup of each pattern and baseline relative to it."""
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)
    threads, wall = arguments.threads, arguments.threads > 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = write_files(name, batch, r, folder)
        engines: dict[str, Engine] = {"dense": session_on(files.whole, threads)}
        if r:
            engines["merged, dense"] = session_on(files.merged, threads)
        engines |= {text: session_on(path, threads, native.library()) for text, path in files.native.items()}
        engines["fused"] = session_on(fused(files.merged, folder), threads)
        engines["dynamic int8"] = session_on(int8(files.merged, folder), threads)
        torch.set_num_threads(threads)
        engines["torch"] = partial(torch_logits, files.model)
        expected, logits = engines["merged, dense" if r else "dense"](images), engines["2:4"](images)
        runs: dict[str, Run] = {key: partial(engine, images) for key, engine in engines.items()}
        with openvino(arguments.openvino, files.merged, images.shape, threads) as run_openvino:
            rounds = arguments.rounds if batch == 1 else max(5, arguments.rounds // 2)
            elsewhere = {} if run_openvino is None else {"OpenVINO": run_openvino.ms}
            samples = interleaved(runs, rounds, BLOCK_MS, wall, elsewhere)
        speedups = {key: median_speedup(samples["dense"], samples[key]) for key in samples if key != "dense"}
    return {
        "model": name,
        "batch": batch,
        "r": r,
        "threads": threads,
        "clock": "wall" if wall else "process CPU",
        "rounds": rounds,
        "dense_ms": float(np.median(samples["dense"])),
        "speedup": speedups,
        "limit": files.limits,
        "drift": float(np.abs(expected - logits).max() / np.abs(expected).max()),
        **provenance(),
    }


def main() -> None:
    """Measures, and writes both results files after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openvino", help="path of a Python with OpenVINO installed; default: OpenVINO is not timed")
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine")
    parser.add_argument("--rounds", type=int, default=15, help="rounds at batch 1; half as many at other batches")
    parser.add_argument(
        "--models", nargs="*", default=["vit_small_patch16_224", "vit_base_patch16_224"], help="timm's names"
    )
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8], help="batch sizes")
    parser.add_argument("--merged", nargs="*", type=int, default=[0, 8, 16], help="tokens merged after each attention")
    parser.add_argument("--add", action="store_true", help="keep the rows that an earlier run wrote on this processor")
    arguments = parser.parse_args()
    if missing := native.missing():
        raise SystemExit(missing)
    rows = (rows_of if arguments.add else rows_of_other_processors)(results_name(arguments.threads))
    for name, batch, r in product(arguments.models, arguments.batches, arguments.merged):
        started = time.perf_counter()
        row = measure(name, batch, r, arguments)
        rows = sorted([*(kept for kept in rows if row_key(kept) != row_key(row)), row], key=row_key)
        medians = {key: f"{value[0]:.2f}" for key, value in row["speedup"].items()}
        elapsed = f"{time.perf_counter() - started:.0f} s"
        print(name, batch, r, f"{row['dense_ms']:.0f} ms", medians, elapsed, flush=True)
        report(rows, arguments.threads)


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the values that identify a row in its file; rows are sorted by them."""
    return row["device"], row["model"], row["batch"], row["r"]


def results_name(threads: int) -> str:
    """Returns the name of the results file for this number of threads."""
    return "cpu_vit" if threads == 1 else f"cpu_vit_{threads}_threads"


def cell(row: dict[str, Any], key: str) -> str:
    """Returns a speedup with its interval and, if known, its limit: `1.60 (1.57–1.78) of 1.91`."""
    if key not in row["speedup"]:
        return "–"
    limit = f" of {row['limit'][key]:.2f}" if key in row["limit"] else ""
    return speedup_cell(row["speedup"][key]) + limit


def cells(row: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the row as cells of a table: model, batch, r, dense ms, then the speedups of `keys`."""
    head = (row["model"], str(row["batch"]), str(row["r"]), f"{row['dense_ms']:.0f}")
    return (*head, *(cell(row, key) for key in keys))


def report(rows: list[dict[str, Any]], threads: int) -> None:
    """Writes both results files with the rows measured so far."""
    name = results_name(threads)
    write(name, QUESTION, device(), ("onnxruntime", "timm", "torch"), rows)
    head = (
        f"{QUESTION}\n\nSpeed relative to ONNX Runtime's dense float32 without token merging: median over rounds, 95 % "
        "interval, and the limit given by the ratio of MACs. "
        f"{threads} thread(s), {rows[0]['clock']} time, {min(r['rounds'] for r in rows)} rounds or more. "
        "Fused, OpenVINO, torch and dynamic int8 run dense with the row's token merging. Drift: the largest difference "
        "of a logit from the dense file with the same weights and tokens, relative to the largest logit.\n"
    )
    text = "\n".join([head, *(table(heading, own) for heading, own in by_processor(rows))])
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def table(heading: str, rows: list[dict[str, Any]]) -> str:
    """Returns the table of one processor under its heading."""
    lines = [(*cells(row, (*PATTERNS, *BASELINES)), f"{row['drift']:.0e}") for row in rows]
    return f"{heading}, {load_range(rows)}:\n\n{markdown(COLUMNS, lines)}"


if __name__ == "__main__":
    main()
