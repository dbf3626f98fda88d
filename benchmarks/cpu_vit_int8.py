"""Speed of whole ViTs in int8 on our kernel, relative to dense float32 and int8 -> results/cpu_vit_int8.{json,md}.

    python benchmarks/cpu_vit_int8.py [--openvino PYTHON] [--threads 1 2] [--models vit_base_patch16_224] [--add]

ViTs with random weights at 224 pixels. Every Linear in the blocks is masked by magnitude and quantised to the nearest
integers: u8 activations with a fixed scale, s8 weights. It runs on our kernel, together with the LayerNorms, GELUs,
residuals and attentions between the products. All other operators run in ONNX Runtime. Each model is timed without and
with token merging. The baselines are dense and merge no tokens:

- ONNX Runtime in float32;
- four int8 files in ONNX Runtime, dynamic and static, each also with attention as MultiHeadAttention. The fastest one
  is the baseline "its best int8";
- OpenVINO in float32 and in int8, in a process under the Python that --openvino names;
- torch in float32, eager.

All of them run in interleaved rounds, timed in process CPU time on one thread and in wall time on more. Rows of other
processors are kept in the file. With --add, other rows of this processor are kept too.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
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
    int8_device,
    interleaved,
    load_range,
    median_speedup,
    provenance,
    rows_of_other_processors,
    speedup_cell,
)
from lib.int8_files import int8_stages, onnx_runtime_files
from lib.openvino_process import openvino
from lib.vit_files import IMAGE, Engine, Images, masked, merging, torch_logits, untrained, with_batch

from mpcompile.analysis.macs import cost
from mpcompile.export.onnx_export import lower
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import DropUnreadTokens
from mpcompile.pipeline.pass_manager import Pass
from mpcompile.runtimes import native
from mpcompile.runtimes.ort.int8 import saturates
from mpcompile.runtimes.ort.session import session_on

QUESTION = "How much faster is a whole ViT in int8 on our kernel than dense float32 and the best dense int8 file?"
DENSE = "dense"
PATTERNS = (DENSE, "8:16", "2:4", "2:4x4", "4:16")
STAGED = "8:16"  # the pattern whose file is also timed with fewer operators on our kernel
# Exact passes that our files get before masking. The baselines do not get them.
EXACT: tuple[Pass, ...] = (DropUnreadTokens(),)
FP32, TORCH = "ONNX Runtime, fp32", "torch, fp32"
INT8 = "ONNX Runtime, int8, "
OPENVINO_FP32, OPENVINO_INT8 = "OpenVINO, fp32", "OpenVINO, int8"
OVER = {"over_fp32": "over ONNX Runtime fp32", "over_int8": "over its best int8", "over_openvino": "over OpenVINO int8"}
COLUMNS = ("", "ms", *OVER.values(), "MACs saved, ×", "attentions", "drift")
BLOCK_MS = 20.0  # of each engine in each round
DRIFT_LIMIT = 0.1  # of our logits from the quantised file in float32 arithmetic: roundings differ, by 0.01 to 0.03


@dataclass(frozen=True)
class Files:
    """The ONNX files of one model, in one folder. All take any batch size.

    Attributes:
        model: the dense model, for torch.
        whole: the dense float32 file.
        quantised: the dense file with QuantizeLinear and DequantizeLinear, for OpenVINO.
        theirs: dense int8 files for ONNX Runtime, by name.
        ours: files for our kernel, by name.
        standard: the same file as one of `ours`, in standard operators.
        macs: MACs of the whole dense model relative to those that a file of `ours` executes.
        attentions: how many attentions each of `ours` runs as one operator.
    """

    model: Model
    whole: Path
    quantised: Path
    theirs: dict[str, Path]
    ours: dict[str, Path]
    standard: dict[str, Path]
    macs: dict[str, float]
    attentions: dict[str, int]


def write_files(name: str, merged: list[int], patterns: list[str], folder: Path) -> Files:
    """Writes all files of a timm model."""
    two = np.random.default_rng(0).standard_normal((2, *IMAGE), dtype=np.float32)
    model, limited = untrained(name), saturates()
    whole = lower(model, folder / "whole.onnx").onnx
    float_file, dense_macs = onnx.load(whole), cost(model).macs
    layers = {row.layer for row in masked(float_file, NM.parse("2:4"))[1]}
    dense = int8_stages(float_file, two, layers, limited)
    files = Files(model, whole, folder / "quantised.onnx", {}, {}, {}, {}, {})
    onnx.save_model(dense.standard, files.quantised)
    files.theirs.update(onnx_runtime_files(whole, dense.standard, two, folder, limited))

    def save(key: str, made: onnx.ModelProto, macs: float, attentions: int) -> None:
        files.ours[key] = folder / f"{key.replace(':', '_').replace(' ', '_')}.native.onnx"
        onnx.save_model(made, files.ours[key])
        files.macs[key], files.attentions[key] = dense_macs / macs, attentions

    for r in (0, *merged):
        changed = merging(model, r, EXACT)
        source = float_file if changed is model else onnx.load(lower(changed, folder / f"source_{r}.onnx").onnx)
        costs = cost(changed)
        for text in patterns:
            pattern = None if text == DENSE else NM.parse(text)
            sparse = source if pattern is None else masked(source, pattern)[0]
            stages = dense if sparse is float_file else int8_stages(sparse, two, layers, limited)
            macs = costs.executed_macs({} if pattern is None else dict.fromkeys(layers, pattern))
            key = f"ours, int8, {text}" + (f", r = {r}" if r else "")
            if text == STAGED and not r:
                save(f"{key}, Linear only", stages.linear, macs, 0)
                save(f"{key}, LayerNorm too", stages.norms, macs, 0)
            save(key, stages.whole, macs, stages.attentions)
            files.standard[key] = folder / f"{files.ours[key].stem}_standard.onnx"
            onnx.save_model(stages.standard, files.standard[key])
    return files


def drifts(files: Files, images: Images) -> dict[str, float]:
    """Returns the distance of our logits from the same quantised file in float32 arithmetic, relative to their norm.

    Raises SystemExit if it is above DRIFT_LIMIT: our results would be wrong.
    """
    found = {}
    for key, path in files.standard.items():
        expected = session_on(path, 1, kernels_8_bit=False)(images)
        logits = session_on(files.ours[key], 1, native.library())(images)
        found[key] = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        if not found[key] <= DRIFT_LIMIT:
            raise SystemExit(f"{key}: logits are {found[key]:.3f} off; at most {DRIFT_LIMIT} is right")
    return found


def measure(files: Files, batch: int, threads: int, python: str | None, rounds: int) -> dict[str, Any]:
    """Returns the measured values of one row."""
    images = np.random.default_rng(0).standard_normal((batch, *IMAGE), dtype=np.float32)
    wall = threads > 1
    torch.set_num_threads(threads)
    fixed = files.whole.with_name(f"whole_{batch}.onnx")
    onnx.save_model(with_batch(onnx.load(files.whole), batch), fixed)
    engines: dict[str, Engine] = {FP32: session_on(fixed, threads)}
    engines |= {f"{INT8}{name}": session_on(path, threads) for name, path in files.theirs.items()}
    engines[TORCH] = partial(torch_logits, files.model)
    engines |= {key: session_on(path, threads, native.library()) for key, path in files.ours.items()}
    with ExitStack() as stack:
        other = {
            name: stack.enter_context(openvino(python, file, images.shape, threads))
            for name, file in ((OPENVINO_FP32, files.whole), (OPENVINO_INT8, files.quantised))
        }
        elsewhere = {name: engine.ms for name, engine in other.items() if engine is not None}
        runs = {key: partial(engine, images) for key, engine in engines.items()}
        samples = interleaved(runs, rounds, BLOCK_MS, wall, elsewhere)
        used = {name: {"version": e.version, "kernels": e.kernels} for name, e in other.items() if e is not None}
    ms = {key: float(np.median(values)) for key, values in samples.items()}
    best = min((key for key in ms if key.startswith(INT8)), key=lambda key: ms[key])

    def over(baseline: str) -> dict[str, tuple[float, float, float]]:
        if baseline not in samples:
            return {}
        return {key: median_speedup(samples[baseline], values) for key, values in samples.items() if key != baseline}

    return {
        "batch": batch,
        "threads": threads,
        "clock": "wall" if wall else "process CPU",
        "rounds": rounds,
        "ms": ms,
        "best_int8": best,
        **{name: over(key) for name, key in zip(OVER, (FP32, best, OPENVINO_INT8), strict=True)},
        "macs": files.macs,
        "attentions": files.attentions,
        "openvino": used,
        "drift": drifts(files, images[:2]),
        **provenance(int8_device()),
    }


def main() -> None:
    """Measures, and writes both results files after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openvino", help="path of a Python with OpenVINO installed; default: OpenVINO is not timed")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="threads of each engine")
    parser.add_argument("--rounds", type=int, default=15, help="rounds at batch 1; half as many at other batches")
    parser.add_argument("--models", nargs="*", default=["vit_base_patch16_224"], help="timm's names")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8], help="batch sizes")
    parser.add_argument("--merged", nargs="*", type=int, default=[8], help="tokens merged after each attention")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS), help="patterns of our files, or 'dense'")
    parser.add_argument("--add", action="store_true", help="keep the rows that an earlier run wrote on this processor")
    arguments = parser.parse_args()
    if missing := native.missing():
        raise SystemExit(missing)
    rows = rows_of("cpu_vit_int8") if arguments.add else rows_of_other_processors("cpu_vit_int8", int8_device())
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(name, arguments.merged, arguments.patterns, Path(folder))
            for batch, threads in product(arguments.batches, arguments.threads):
                started, rounds = time.perf_counter(), arguments.rounds if batch == 1 else max(5, arguments.rounds // 2)
                row = {"model": name, **measure(files, batch, threads, arguments.openvino, rounds)}
                rows = sorted([*(kept for kept in rows if row_key(kept) != row_key(row)), row], key=row_key)
                print(f"{title(row)}, {time.perf_counter() - started:.0f} s\n\n{table(row)}", flush=True)
                report(rows)


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the values that identify a row in its file; rows are sorted by them."""
    return row["device"], row["model"], row["batch"], row["threads"]


def report(rows: list[dict[str, Any]]) -> None:
    """Writes both results files with the rows measured so far."""
    write("cpu_vit_int8", QUESTION, int8_device(), ("onnxruntime", "timm", "torch"), rows)
    head = (
        f"{QUESTION}\n\nSpeed relative to dense models without token merging: median over "
        f"{min(row['rounds'] for row in rows)} rounds or more, 95 % interval; bold means slower. Its best int8 "
        "is the fastest of ONNX Runtime's int8 files. MACs saved: multiply-accumulates of the dense model relative "
        "to those that the file executes; it limits the speed over a dense model on an equally good kernel of the same "
        "precision. r: tokens merged after each attention. Attentions: how many run as one operator of our kernel. "
        "Drift: distance of the logits from the same quantised file in float32 arithmetic, relative to their norm.\n"
    )
    parts = [head]
    for heading, own in by_processor(rows):
        parts.append(f"## {heading}, {load_range(own)}\n")
        parts += [f"{title(row)}:\n\n{table(row)}" for row in sorted(own, key=row_key)]
    (RESULTS / "cpu_vit_int8.md").write_text("\n".join(parts), encoding="utf-8")


def title(row: dict[str, Any]) -> str:
    """Returns what was measured in a row, with OpenVINO's version and kernels."""
    used = [f"{name} {e['version']} ran {', '.join(e['kernels'])}" for name, e in row["openvino"].items()]
    clock = f"{row['threads']} thread(s), {row['clock']} time, {row['rounds']} rounds"
    return "; ".join([f"{row['model']}, batch {row['batch']}, {clock}", *used])


def table(row: dict[str, Any]) -> str:
    """Returns the table of one row: a line for each engine."""

    def speed(key: str, name: str) -> str:
        return speedup_cell(tuple(row[key][name])) if name in row[key] else "1" if row[key] else "–"

    lines = [
        (
            name,
            f"{ms:.1f}",
            *(speed(key, name) for key in OVER),
            f"{row['macs'].get(name, 1):.2f}",
            str(row["attentions"].get(name, "–")),
            f"{row['drift'][name]:.1e}" if name in row["drift"] else "–",
        )
        for name, ms in row["ms"].items()
    ]
    return markdown(COLUMNS, lines)


if __name__ == "__main__":
    main()
