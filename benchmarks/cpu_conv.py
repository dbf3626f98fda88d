"""Speed of CNNs on the N:M kernel, relative to ONNX Runtime's dense -> results/cpu_conv{,_2_threads}.{json,md}.

    python benchmarks/cpu_conv.py [--openvino PYTHON] [--threads 1] [--models resnet50 …] [--batches 1 8] [--no-layers]

Single convolutions of ResNet-50 and ConvNeXt-T, and whole CNNs, with random weights. In a whole CNN every convolution
without groups and every Linear that the pattern divides is masked by magnitude and runs on the N:M kernel; the first
layer, depthwise convolutions and all else run in ONNX Runtime. A compile would choose among them by measurement. The
baseline is the file with the same weights on ONNX Runtime's dense kernels. With --openvino, the dense file of each CNN
is timed in OpenVINO too, in a process under the Python that it names.

All run in interleaved rounds, timed in process CPU time on one thread and in wall time on more. `--library avx2.so`
times another build of the kernel beside the installed one, such as what
`mpcompile.runtimes.native.build.build(Path("avx2.so"), widest="avx2")` makes.
"""

import argparse
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from lib.common import RESULTS, markdown, rows_of, write
from lib.conv_files import LAYERS, Layer, dense_file, masked
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
from lib.untrained_cnns import CIFAR, pixels_of

from mpcompile.ir.pattern import NM
from mpcompile.runtimes import native
from mpcompile.runtimes.native.microbenchmark import dense_node, native_node, one_node
from mpcompile.runtimes.native.onnx_rewrite import find, replace
from mpcompile.runtimes.native.packing import pack
from mpcompile.runtimes.ort.session import session_on

QUESTION = "How much faster are CNNs on the N:M kernel than on ONNX Runtime's dense kernels?"
PATTERNS = ("2:4", "8:16", "4:16")
MODELS = ("resnet50", "convnext_tiny", "efficientnet_lite0", CIFAR)
OPENVINO = "OpenVINO"
BLOCK_MS = 20.0  # of each engine in each round


def whole(name: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one CNN at a batch size: the dense time, and the speedup of each pattern and library."""
    size = pixels_of(name)
    images = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dense, runs, on_kernel = dense_file(name, batch, folder), {}, {}
        for text in PATTERNS:
            sparse, proven = masked(dense, NM.parse(text))
            products, refused = find(sparse, proven)
            if refused:
                raise SystemExit(f"{name}: {refused[0].reason}")
            on_kernel[text] = len(products)
            path = folder / f"{text.replace(':', '_')}.onnx"
            if text == PATTERNS[0]:
                onnx.save_model(sparse, folder / "dense.onnx")
                runs["dense"] = partial(session_on(folder / "dense.onnx", arguments.threads), images)
            onnx.save_model(replace(sparse, products), path)
            for key, library in libraries(arguments).items():
                runs[text + key] = partial(session_on(path, arguments.threads, library), images)
        expected, found = runs["dense"](), runs[PATTERNS[0]]()
        with openvino(arguments.openvino, folder / "dense.onnx", images.shape, arguments.threads) as theirs:
            elsewhere = {} if theirs is None else {OPENVINO: theirs.ms}
            samples = interleaved(runs, arguments.rounds, BLOCK_MS, arguments.threads > 1, elsewhere)
    drift = float(np.abs(expected - found).max() / np.abs(expected).max())
    return {"model": name, "on_kernel": on_kernel, "drift": drift, **measured(batch, samples, arguments)}


def single(layer: Layer, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one convolution with a rectifier."""
    runs, x = {}, layer.x(batch)
    for text in PATTERNS:
        made = layer.product(NM.parse(text))
        packed = pack(made.weight, made.pattern.of)
        if text == PATTERNS[0]:
            runs["dense"] = one_node(dense_node(made), made, x, None, arguments.threads)
        for key, library in libraries(arguments).items():
            runs[text + key] = one_node(native_node(made, packed), made, x, library, arguments.threads)
    samples = interleaved(runs, arguments.rounds, BLOCK_MS / 4, arguments.threads > 1)
    return {"model": str(layer), "layer": True, **measured(batch, samples, arguments)}


def libraries(arguments: argparse.Namespace) -> dict[str, Path | None]:
    """Returns the builds of the kernel by the end of the names of their rows."""
    also = {f" {path.stem}": path for path in map(Path, arguments.library)}
    return {"": native.library(), **also}


def measured(batch: int, samples: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the keys that the rows of layers and models share."""
    return {
        "batch": batch,
        "threads": arguments.threads,
        "clock": "wall" if arguments.threads > 1 else "process CPU",
        "rounds": arguments.rounds,
        "dense_ms": float(np.median(samples["dense"])),
        "speedup": {key: median_speedup(samples["dense"], samples[key]) for key in samples if key != "dense"},
        **provenance(),
    }


def main() -> None:
    """Measures, and writes both results files after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openvino", help="path of a Python with OpenVINO installed; default: OpenVINO is not timed")
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each row")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="timm's names, or cifar_resnet20")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8], help="batch sizes")
    parser.add_argument("--no-layers", action="store_true", help="leave out the single convolutions")
    parser.add_argument("--library", nargs="*", default=[], help="other builds of the kernel to time too")
    parser.add_argument("--add", action="store_true", help="keep the rows that an earlier run wrote on this processor")
    arguments = parser.parse_args()
    if missing := native.missing():
        raise SystemExit(missing)
    rows = (rows_of if arguments.add else rows_of_other_processors)(results_name(arguments.threads))
    layers = [] if arguments.no_layers else [(partial(single, layer), 1) for layer in LAYERS]
    models = [(partial(whole, name), batch) for name, batch in product(arguments.models, arguments.batches)]
    for measure, batch in [*layers, *models]:
        started = time.perf_counter()
        row = measure(batch, arguments)
        rows = [*(kept for kept in rows if row_key(kept) != row_key(row)), row]
        medians = {key: f"{value[0]:.2f}" for key, value in row["speedup"].items()}
        elapsed = f"{time.perf_counter() - started:.0f} s"
        print(row["model"], batch, f"{row['dense_ms']:.2f} ms", medians, elapsed, flush=True)
        report(rows, arguments.threads)


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the values that identify a row in its file."""
    return row["device"], row["model"], row["batch"]


def results_name(threads: int) -> str:
    """Returns the name of the results file for this number of threads."""
    return "cpu_conv" if threads == 1 else f"cpu_conv_{threads}_threads"


def report(rows: list[dict[str, Any]], threads: int) -> None:
    """Writes both results files with the rows measured so far."""
    name = results_name(threads)
    write(name, QUESTION, device(), ("onnxruntime", "timm", "torch"), rows)
    head = (
        f"{QUESTION}\n\nSpeed relative to ONNX Runtime's dense float32 with the same weights: median over rounds, and "
        f"95 % interval. {threads} thread(s), {rows[0]['clock']} time, "
        f"{min(row['rounds'] for row in rows)} rounds or more. "
        "Every convolution without groups that the pattern divides is on the kernel. A pattern with a name after it "
        "ran on the kernel of that instruction set only; dense ran on the widest.\n"
    )
    text = [head]
    for heading, own in by_processor(rows):
        text.append(f"## {heading}, {load_range(own)}\n")
        for title, part in (
            ("Single convolutions", [row for row in own if row.get("layer")]),
            ("Whole models", [row for row in own if not row.get("layer")]),
        ):
            if part:
                text.append(f"### {title}\n\n{table(part)}")
    (RESULTS / f"{name}.md").write_text("\n".join(text), encoding="utf-8")


def cell(row: dict[str, Any], key: str) -> str:
    """Returns a speedup with its interval, or a dash."""
    return speedup_cell(row["speedup"][key]) if key in row["speedup"] else "–"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as a table, with a column for everything that any of them was timed with."""
    keys = list(dict.fromkeys(key for row in rows for key in row["speedup"]))
    lines = [
        (row["model"], str(row["batch"]), f"{row['dense_ms']:.2f}", *(cell(row, key) for key in keys)) for row in rows
    ]
    return markdown(("model", "batch", "dense ms", *keys), lines)


if __name__ == "__main__":
    main()
