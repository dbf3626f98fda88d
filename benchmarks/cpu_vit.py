"""Whole ViTs on the native kernel against ONNX Runtime's dense ones -> results/cpu_vit{,_2_threads}.{json,md}.

    python benchmarks/cpu_vit.py [--openvino PYTHON] [--threads 1] [--models vit_small_patch16_224 …]

Random weights at 224 pixels. Every Linear of the blocks is masked by magnitude and runs on the kernel, the rest is
ONNX Runtime's. Baseline: the dense file of the whole model, no tokens merged; where some are, the same dense file with
them merged stands beside it. Beside both: the file after the fusions of onnxruntime.transformers (in this export they
find LayerNorm and Gelu, not attention); dynamic int8, which changes results; torch in float32, the same graph run
eagerly; and OpenVINO in float32, in a process of its own under the Python that --openvino names. All of a model take
turns in one run. On one thread the time is process CPU time, on more wall time. Each ratio has its limit beside it:
what counting multiply-accumulates promises. A run on another processor adds a table of its own; --add keeps this one's
rows of other models and batch sizes too.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from lib.common import RESULTS, markdown, rows_of, write
from lib.cpu_turns import by_processor, device, elsewhere, loads, ratio, shown, stamp, turns
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.analysis.macs import cost
from mpcompile.data.images import Data
from mpcompile.export.mask_check import ProvenMask, file_weights
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model, Source
from mpcompile.ir.pattern import NM
from mpcompile.passes import ToMe
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes import native
from mpcompile.runtimes.native.onnx_rewrite import find, replace
from mpcompile.runtimes.ort.int8 import quantise_dynamic, saturates
from mpcompile.runtimes.ort.session import session_on

QUESTION = "how much faster is a whole ViT on the native N:M kernel than on ONNX Runtime's dense kernels?"
PATTERNS = ("2:4", "8:16", "16:32", "12:32", "1:4", "12:16", "2:4x2", "2:4x4")
OTHERS = ("merged, dense", "fused", "OpenVINO", "torch", "dynamic int8")
COLUMNS = ("model", "batch", "ToMe r", "dense ms", *PATTERNS, *OTHERS, "drift 2:4")
BLOCK_MS = 20.0
Images = NDArray[np.float32]
Run = Callable[[], object]
Engine = Callable[[Images], Images]


def masked(file: onnx.ModelProto, pattern: NM) -> tuple[onnx.ModelProto, list[ProvenMask]]:
    """The file with every weight of its blocks masked by magnitude."""
    result = onnx.ModelProto()
    result.CopyFrom(file)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    proven = []
    for weight in file_weights(file):
        if weight.values.ndim != 2 or not any("blocks." in scope for scope in weight.scopes):
            continue
        kept = nm_mask(torch.from_numpy(np.abs(weight.values)), pattern).numpy()
        values = np.where(kept, weight.values, np.float32(0))
        values = values if weight.axis == 1 else np.ascontiguousarray(values.T)
        stored[weight.initializer].CopyFrom(numpy_helper.from_array(values, weight.initializer))
        zeros = int(kept.size - kept.sum())
        proven.append(
            ProvenMask(
                weight.scopes[-2],  # the layer, before the node's own name
                weight.initializer,
                (weight.node,),
                weight.op,
                weight.axis,
                str(pattern),
                pattern.of,
                zeros,
                kept.size,
            )
        )
    return result, proven


@dataclass(frozen=True)
class Files:
    """One model in ONNX: whole, with its tokens merged (the same file where none are), and on the kernel by pattern.

    All have the same weights up to their masks, the first two those of 2:4. `limits` are the ratios of
    multiply-accumulates to those of the whole model; `model` is what torch runs, tokens merged, weights as they were.
    """

    model: Model
    whole: Path
    merged: Path
    native: dict[str, Path]
    limits: dict[str, float]


def files(name: str, batch: int, r: int, folder: Path) -> Files:
    """Every file of a model at a batch size, r tokens merged after each attention."""
    torch.manual_seed(0)
    size = 3, 224, 224
    model = capture(timm.create_model(name, pretrained=False).eval(), Source(name, "", name), torch.randn(1, *size))
    dense_macs = cost(model).macs

    def dense(source: Model, stem: str) -> tuple[onnx.ModelProto, Path]:
        file = onnx.load(lower(source, folder / f"{stem}_free.onnx", batch=batch).onnx)
        path = folder / f"{stem}.onnx"
        onnx.save_model(masked(file, NM.parse("2:4"))[0], path)
        return file, path

    file, whole = dense(model, "whole")
    merged = whole
    if r:
        model, _ = PassManager([ToMe(r=r)]).run(model, Data())
        file, merged = dense(model, "merged")
    costs, made = cost(model), {}
    limits = {"merged, dense": dense_macs / costs.macs}
    for text in PATTERNS:
        sparse, proven = masked(file, NM.parse(text))
        limits[text] = dense_macs / costs.executed_macs({row.layer: NM.parse(text) for row in proven})
        products, refused = find(sparse, proven)
        if refused:
            raise SystemExit(f"{name}: {refused[0].reason}")
        made[text] = folder / f"native_{text.replace(':', '_')}.onnx"
        onnx.save_model(replace(sparse, products), made[text])
    return Files(model, whole, merged, made, limits)


def fused(dense: Path, folder: Path) -> Path:
    """The dense file after the fusions of onnxruntime.transformers."""
    from onnxruntime.transformers.optimizer import optimize_model

    width = next(w.values.shape[1] for w in file_weights(onnx.load(dense)) if any("qkv" in s for s in w.scopes))
    model = optimize_model(str(dense), model_type="vit", num_heads=width // 64, hidden_size=width, opt_level=0)
    if not any(model.get_fused_operator_statistics().values()):
        raise SystemExit("onnxruntime.transformers fuses nothing")
    model.save_model_to_file(str(folder / "fused.onnx"))
    return folder / "fused.onnx"


def int8(dense: Path, folder: Path) -> Path:
    """The dense file with dynamically quantised products, in a range that this processor computes exactly."""
    quantise_dynamic(dense, folder / "int8.onnx", saturates())
    return folder / "int8.onnx"


@contextmanager
def openvino(python: str | None, file: Path, images: Images, threads: int) -> Iterator[Callable[[bool], float] | None]:
    """Milliseconds of one call of OpenVINO in a process of its own, asked for one at a time."""
    if python is None:
        yield None
        return
    shape = ",".join(map(str, images.shape))
    worker = subprocess.Popen(
        [python, str(Path(__file__).parent / "lib" / "openvino_worker.py"), str(file), shape, str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def ask(wall: bool) -> float:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        cpu_ms, wall_ms = map(float, worker.stdout.readline().split())
        return wall_ms if wall else cpu_ms

    try:
        for _ in range(3):
            ask(True)
        yield ask
    finally:
        worker.kill()
        worker.wait()


def eagerly(model: Model, images: Images) -> Images:
    """What the graph gives in torch."""
    return model(torch.from_numpy(images)).numpy()


def measure(name: str, batch: int, r: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row: the dense time, and every ratio to it."""
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)
    threads, wall = arguments.threads, arguments.threads > 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = files(name, batch, r, folder)
        engines: dict[str, Engine] = {"dense": session_on(made.whole, threads)}
        if r:
            engines["merged, dense"] = session_on(made.merged, threads)
        engines |= {text: session_on(path, threads, native.library()) for text, path in made.native.items()}
        engines["fused"] = session_on(fused(made.merged, folder), threads)
        engines["dynamic int8"] = session_on(int8(made.merged, folder), threads)
        torch.set_num_threads(threads)
        engines["torch"] = partial(eagerly, made.model)
        expected, found = engines["merged, dense" if r else "dense"](images), engines["2:4"](images)
        runs: dict[str, Run] = {key: partial(engine, images) for key, engine in engines.items()}
        with openvino(arguments.openvino, made.merged, images, threads) as ask:
            rounds = arguments.rounds if batch == 1 else max(5, arguments.rounds // 2)
            samples = turns(runs, rounds, BLOCK_MS, wall)
            if ask is not None:  # its process cannot share a turn; call by call after a dense one
                pairs = [(turns({"dense": runs["dense"]}, 1, 0, wall)["dense"][0], ask(wall)) for _ in range(rounds)]
                beside = np.array(pairs)
        ratios = {key: ratio(samples["dense"], samples[key]) for key in engines if key != "dense"}
        if ask is not None:
            ratios["OpenVINO"] = ratio(beside[:, 0], beside[:, 1])
    return {
        "model": name,
        "batch": batch,
        "r": r,
        "threads": threads,
        "clock": "wall" if wall else "process CPU",
        "rounds": rounds,
        "dense_ms": float(np.median(samples["dense"])),
        "speedup": ratios,
        "limit": made.limits,
        "drift": float(np.abs(expected - found).max() / np.abs(expected).max()),
        **stamp(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openvino", help="a Python that has OpenVINO")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--merged", nargs="*", type=int, default=[0, 8, 16])
    parser.add_argument("--add", action="store_true", help="keep the rows that an earlier run wrote on this processor")
    arguments = parser.parse_args()
    if why := native.missing():
        raise SystemExit(why)
    rows = (rows_of if arguments.add else elsewhere)(results_name(arguments.threads))
    for name, batch, r in product(arguments.models, arguments.batches, arguments.merged):
        started = time.perf_counter()
        row = measure(name, batch, r, arguments)
        rows = sorted([*(kept for kept in rows if place(kept) != place(row)), row], key=place)
        shorts = {key: f"{value[0]:.2f}" for key, value in row["speedup"].items()}
        took = f"{time.perf_counter() - started:.0f} s"
        print(name, batch, r, f"{row['dense_ms']:.0f} ms", shorts, took, flush=True)
        report(rows, arguments.threads)


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands, which no other row shares."""
    return row["device"], row["model"], row["batch"], row["r"]


def results_name(threads: int) -> str:
    """Each number of threads has its own file."""
    return "cpu_vit" if threads == 1 else f"cpu_vit_{threads}_threads"


def cell(row: dict[str, Any], key: str) -> str:
    """A ratio, its interval and its limit."""
    if key not in row["speedup"]:
        return "–"
    limit = f" of {row['limit'][key]:.2f}" if key in row["limit"] else ""
    return shown(row["speedup"][key]) + limit


def cells(row: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    """What a row is of, and its ratios."""
    head = (row["model"], str(row["batch"]), str(row["r"]), f"{row['dense_ms']:.0f}")
    return (*head, *(cell(row, key) for key in keys))


def report(rows: list[dict[str, Any]], threads: int) -> None:
    """Writes what has been measured so far."""
    name = results_name(threads)
    write(name, QUESTION, device(), ("onnxruntime", "timm", "torch"), rows)
    head = (
        f"{QUESTION}\n\nTimes as fast as ONNX Runtime's dense float32 of the whole model (no tokens merged): median "
        "over rounds, 95 % interval, and what counting multiply-accumulates promises. "
        f"{threads} thread(s), {rows[0]['clock']} time, {min(r['rounds'] for r in rows)} rounds or more. "
        "Fused, OpenVINO, torch and dynamic int8 run the dense weights with the row's tokens merged. Drift: the "
        "largest difference of a logit from the dense file with the same weights and tokens, as a share of the largest "
        "logit.\n"
    )
    text = "\n".join([head, *(table(where, of) for where, of in by_processor(rows))])
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def table(where: str, rows: list[dict[str, Any]]) -> str:
    """One processor's rows."""
    lines = [(*cells(row, (*PATTERNS, *OTHERS)), f"{row['drift']:.0e}") for row in rows]
    return f"{where}, {loads(rows)}:\n\n{markdown(COLUMNS, lines)}"


if __name__ == "__main__":
    main()
