"""Speed of a masked GEMM with 1 to 16 tokens, relative to ONNX Runtime's dense GEMM -> results/cpu_gemm_few.{json,md}.

    python benchmarks/cpu_gemm_few.py [--rounds 9]

With few tokens a GEMM is limited by reading its weights, so two cases are measured. Hot: one layer is run repeatedly,
with its weights in the cache. Cold: so many copies of the layer that the dense weights take COLD_BYTES are run one
after another, like the layers of a model. The dense file has the masked weights of 2:4. All patterns of one shape are
timed in interleaved rounds on one thread, in process CPU time. The speedup is the median over rounds with its 95 %
interval; bold means slower.
"""

import argparse
from collections.abc import Callable

import numpy as np
import onnx
from cpu_gemm import random_gemm
from lib.common import RESULTS, markdown, write
from lib.cpu_timing import device_with_load, interleaved, median_speedup, speedup_cell
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.ir.pattern import NM
from mpcompile.runtimes import native
from mpcompile.runtimes.native.microbenchmark import dense_node, native_node, session
from mpcompile.runtimes.native.packing import pack

QUESTION = "With 1 to 16 tokens, where is the N:M kernel faster than ONNX Runtime's dense GEMM, on one thread?"
PATTERNS = ("2:4", "8:16", "16:32", "1:4", "2:4x4")
SHAPES = [(768, 768), (3072, 768), (768, 3072), (1000, 768)]  # out, in: ViT-B's layers and its head
TOKENS = (1, 2, 4, 8, 16)
BLOCK_MS = 8.0  # of each GEMM in each round
COLD_BYTES = 512e6


def copied(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """Returns `count` copies of a model x -> y in one graph, x -> y.0, y.1, …, each with different weights."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.initializer[:], graph.output[:]
    for index in range(count):
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32:
                array = array * np.float32(1 + index / 1024)  # a runtime might store equal weights only once
            graph.initializer.append(numpy_helper.from_array(array, f"{tensor.name}.{index}"))
        for node in model.graph.node:
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.name = ""
            copy.input[:] = [name if name == "x" else f"{name}.{index}" for name in node.input]
            copy.output[:] = [f"{name}.{index}" for name in node.output]
        for value in model.graph.output:
            graph.output.add().CopyFrom(value)
            graph.output[-1].name += f".{index}"
    return result


class LayerCopies:
    """A session of one thread on `count` copies of one layer; with `on_kernel`, it loads the N:M kernel."""

    def __init__(self, model: onnx.ModelProto, count: int, on_kernel: bool) -> None:
        self._session = session(copied(model, count), native.library() if on_kernel else None, 1)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def bound(self, x: NDArray[np.float32]) -> Callable[[], object]:
        """Returns a function that computes every copy on x."""
        binding = self._session.io_binding()
        binding.bind_cpu_input("x", x)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        return lambda: self._session.run_with_iobinding(binding)


def main() -> None:
    """Measures, and writes both results files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each shape and number of tokens")
    arguments = parser.parse_args()
    if native.library() is None:
        raise SystemExit(native.missing())
    rng = np.random.default_rng(0)
    rows, table = [], []
    for out, in_ in SHAPES:
        gemms = {text: random_gemm(out, in_, NM.parse(text), rng) for text in PATTERNS}
        models = {"dense": dense_node(gemms[PATTERNS[0]])}
        models |= {text: native_node(gemm, pack(gemm.weight, gemm.pattern.of)) for text, gemm in gemms.items()}
        for weights, copies in (("hot", 1), ("cold", int(COLD_BYTES / (4 * out * in_)))):
            layers = {name: LayerCopies(model, copies, name != "dense") for name, model in models.items()}
            for tokens in TOKENS:
                x = rng.standard_normal((1, tokens, in_), dtype=np.float32)
                runs = {name: layer.bound(x) for name, layer in layers.items()}
                samples = interleaved(runs, arguments.rounds, BLOCK_MS, wall=False)
                speedups = {text: median_speedup(samples["dense"], samples[text]) for text in PATTERNS}
                dense_us = float(np.median(samples["dense"])) / copies * 1e3
                row = {"tokens": tokens, "out": out, "in": in_, "weights": weights, "copies": copies}
                rows.append({**row, "dense_us": dense_us, "speedup": speedups})
                cells = (speedup_cell(speedups[text]) for text in PATTERNS)
                table.append((str(tokens), f"{in_} → {out}", weights, f"{dense_us:.0f}", *cells))
                print(" | ".join(table[-1]), flush=True)
    device = device_with_load()
    write("cpu_gemm_few", QUESTION, device, ("onnxruntime", "numpy"), rows)
    text = markdown(("tokens", "in → out", "weights", "dense µs", *PATTERNS), table)
    count = (
        f"{arguments.rounds} rounds of at least {BLOCK_MS:.0f} ms each, process CPU time, one thread, on {device}. "
        "Hot: one layer repeatedly. Cold: copies of the layer one after another, with "
        f"{COLD_BYTES / 1e6:.0f} MB of dense weights."
    )
    head = f"{QUESTION}\n\nSpeed relative to ONNX Runtime's dense GEMM: {count}\n\n"
    (RESULTS / "cpu_gemm_few.md").write_text(head + text, encoding="utf-8")


if __name__ == "__main__":
    main()
