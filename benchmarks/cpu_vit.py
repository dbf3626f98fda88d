"""Whole ViTs on the native kernel against ONNX Runtime's dense ones -> results/cpu_vit.{json,md}.

    python benchmarks/cpu_vit.py [--openvino PYTHON] [--threads 1] [--models vit_small_patch16_224 …]

Random weights at 224 pixels. Every Linear of the blocks is masked by magnitude and runs on the kernel, the rest is
ONNX Runtime's. Baseline: the dense file with the same masked weights. Beside it: the same file after the fusions of
onnxruntime.transformers (in this export they find LayerNorm and Gelu, not attention); dynamic int8 of the same file,
which changes results; and OpenVINO in float32, in a process of its own under the Python that --openvino names. All of a
model take turns in one run. On one thread the time is process CPU time, on more wall time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from common import RESULTS, markdown, write
from cpu_turns import processor, ratio, shown, turns
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.capture import capture
from mpcompile.data import Data
from mpcompile.lower import lower
from mpcompile.model import NM, Source
from mpcompile.passes import ToMe
from mpcompile.passes.nm_mask import nm_mask
from mpcompile.pipeline import PassManager
from mpcompile.proof import ProvenMask, file_weights
from mpcompile.runtimes import native
from mpcompile.runtimes.native.graph import find, replace
from mpcompile.runtimes.ort import session_on

QUESTION = "how much faster is a whole ViT on the native N:M kernel than on ONNX Runtime's dense kernels?"
PATTERNS = ("2:4", "8:16", "16:32", "12:32", "1:4", "12:16", "2:4x2", "2:4x4")
COLUMNS = (
    "model",
    "batch",
    "ToMe r",
    "dense ms",
    *PATTERNS,
    "fused",
    "OpenVINO",
    "dynamic int8",
    "drift 2:4",
)
BLOCK_MS = 20.0
Images = NDArray[np.float32]
Run = Callable[[], object]


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
                weight.scopes[-1],
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


def files(name: str, batch: int, r: int, folder: Path) -> tuple[Path, dict[str, Path]]:
    """The dense file, masked at 2:4, and one with native operators for each pattern."""
    torch.manual_seed(0)
    size = 3, 224, 224
    model = capture(timm.create_model(name, pretrained=False).eval(), Source(name, "", name), torch.randn(1, *size))
    if r:
        model, _ = PassManager([ToMe(r=r)]).run(model, Data())
    whole = onnx.load(lower(model, folder / "whole.onnx", batch=batch).onnx)
    dense, made = folder / "dense.onnx", {}
    for text in PATTERNS:
        file, proven = masked(whole, NM.parse(text))
        if text == "2:4":
            onnx.save_model(file, dense)
        products, refused = find(file, proven)
        if refused:
            raise SystemExit(f"{name}: {refused[0].reason}")
        made[text] = folder / f"native_{text.replace(':', '_')}.onnx"
        onnx.save_model(replace(file, products), made[text])
    return dense, made


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
    """The dense file with dynamically quantised products."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(dense, folder / "int8.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    return folder / "int8.onnx"


@contextmanager
def openvino(python: str | None, file: Path, images: Images, threads: int) -> Iterator[Callable[[bool], float] | None]:
    """Milliseconds of one call of OpenVINO in a process of its own, asked for one at a time."""
    if python is None:
        yield None
        return
    shape = ",".join(map(str, images.shape))
    worker = subprocess.Popen(
        [python, str(Path(__file__).with_name("openvino_worker.py")), str(file), shape, str(threads)],
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


def measure(name: str, batch: int, r: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row: the dense time, and every ratio to it."""
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)
    threads, wall = arguments.threads, arguments.threads > 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dense, made = files(name, batch, r, folder)
        engines = {"dense": session_on(dense, threads)}
        engines |= {text: session_on(path, threads, native.library()) for text, path in made.items()}
        engines["fused"] = session_on(fused(dense, folder), threads)
        engines["dynamic int8"] = session_on(int8(dense, folder), threads)
        expected, found = engines["dense"](images), engines["2:4"](images)
        runs: dict[str, Run] = {key: partial(engine, images) for key, engine in engines.items()}
        with openvino(arguments.openvino, dense, images, threads) as ask:
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
        "drift": float(np.abs(expected - found).max() / np.abs(expected).max()),
        "load": processor(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openvino", help="a Python that has OpenVINO")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--merged", nargs="*", type=int, default=[0, 8, 16])
    parser.add_argument("--add", action="store_true", help="keep the rows that an earlier run wrote")
    arguments = parser.parse_args()
    if why := native.missing():
        raise SystemExit(why)
    rows = earlier(arguments.threads) if arguments.add else []
    for name in arguments.models:
        for batch in arguments.batches:
            for r in arguments.merged:
                started = time.perf_counter()
                rows.append(measure(name, batch, r, arguments))
                row = rows[-1]
                shorts = {key: f"{value[0]:.2f}" for key, value in row["speedup"].items()}
                print(
                    name,
                    batch,
                    r,
                    f"{row['dense_ms']:.0f} ms",
                    shorts,
                    f"{time.perf_counter() - started:.0f} s",
                    flush=True,
                )
                report(rows, arguments.threads)
    sys.exit(0)


def earlier(threads: int) -> list[dict[str, Any]]:
    """The rows of the results file, if there is one."""
    path = RESULTS / f"{results_name(threads)}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return rows


def results_name(threads: int) -> str:
    """Each number of threads has its own file."""
    return "cpu_vit" if threads == 1 else f"cpu_vit_{threads}_threads"


def report(rows: list[dict[str, Any]], threads: int) -> None:
    """Writes what has been measured so far."""
    name = results_name(threads)
    device = f"{processor()}, kernel {native.instruction_set()}"
    write(name, QUESTION, device, ("onnxruntime", "timm", "torch"), rows)
    others = COLUMNS[4 + len(PATTERNS) : -1]
    table = [
        (
            row["model"], str(row["batch"]), str(row["r"]), f"{row['dense_ms']:.0f}",
            *(shown(row["speedup"][key]) if key in row["speedup"] else "–" for key in (*PATTERNS, *others)),
            f"{row['drift']:.0e}",
        )
        for row in rows
    ]  # fmt: skip
    head = (
        f"{QUESTION}\n\nTimes as fast as ONNX Runtime's dense float32, median over rounds and 95 % interval, "
        f"{threads} thread(s), {rows[0]['clock']} time, {min(r['rounds'] for r in rows)} rounds or more, on {device}. "
        "Drift: the largest difference of a logit from the dense file with the same weights, as a share of the largest "
        "logit.\n"
    )
    (RESULTS / f"{name}.md").write_text(f"{head}\n{markdown(COLUMNS, table)}", encoding="utf-8")


if __name__ == "__main__":
    main()
