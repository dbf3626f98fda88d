"""Few tokens on the native kernel against ONNX Runtime's dense one -> results/cpu_gemm_few.{json,md}.

    python benchmarks/cpu_gemm_few.py [--rounds 9]

With few tokens the weights are read for little work, so it matters where they are. Hot: one layer again and again.
Cold: a file of so many copies of the layer that its dense weights take COLD_BYTES, all computed in turn, as the layers
of a model are. The dense file has the same masked weights. One thread, process CPU time, all of a shape in turns in
one run. The ratio is the median over rounds with its 95 % interval; bold is slower.
"""

import argparse
from collections.abc import Callable

import numpy as np
import onnx
from cpu_gemm import product
from lib.common import RESULTS, markdown, write
from lib.cpu_turns import busy_device, ratio, shown, turns
from numpy.typing import NDArray
from onnx import numpy_helper

from mpcompile.ir.pattern import NM
from mpcompile.runtimes import native
from mpcompile.runtimes.native.microbenchmark import dense_node, native_node, session
from mpcompile.runtimes.native.packing import pack

QUESTION = "with few tokens, where is the native N:M kernel faster than ONNX Runtime's dense one, on one thread?"
PATTERNS = ("2:4", "8:16", "16:32", "1:4", "2:4x4")
SHAPES = [(768, 768), (3072, 768), (768, 3072), (1000, 768)]  # out, in: ViT-B's layers and its head
TOKENS = (1, 2, 4, 8, 16)
BLOCK_MS = 8.0
COLD_BYTES = 512e6


def copied(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """`count` copies of a model of x -> y with weights of their own: x -> y.0, y.1, …"""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.initializer[:], graph.output[:]
    for at in range(count):
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float32:
                array = array * np.float32(1 + at / 1024)  # not the same bytes, which a runtime might store once
            graph.initializer.append(numpy_helper.from_array(array, f"{tensor.name}.{at}"))
        for node in model.graph.node:
            made = graph.node.add()
            made.CopyFrom(node)
            made.name = ""
            made.input[:] = [name if name == "x" else f"{name}.{at}" for name in node.input]
            made.output[:] = [f"{name}.{at}" for name in node.output]
        for value in model.graph.output:
            graph.output.add().CopyFrom(value)
            graph.output[-1].name += f".{at}"
    return result


class Layers:
    """A session on copies of one layer, one thread."""

    def __init__(self, model: onnx.ModelProto, count: int, native_too: bool) -> None:
        self._session = session(copied(model, count), native.library() if native_too else None, 1)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def on(self, x: NDArray[np.float32]) -> Callable[[], object]:
        """A call that computes every copy on x."""
        binding = self._session.io_binding()
        binding.bind_cpu_input("x", x)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        return lambda: self._session.run_with_iobinding(binding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if native.library() is None:
        raise SystemExit(native.missing())
    rng = np.random.default_rng(0)
    rows, table = [], []
    for out, in_ in SHAPES:
        products = {text: product(out, in_, NM.parse(text), rng) for text in PATTERNS}
        models = {"dense": dense_node(products[PATTERNS[0]])}
        models |= {text: native_node(one, pack(one.weight, one.pattern.of)) for text, one in products.items()}
        for weights, copies in (("hot", 1), ("cold", int(COLD_BYTES / (4 * out * in_)))):
            layers = {name: Layers(model, copies, name != "dense") for name, model in models.items()}
            for tokens in TOKENS:
                x = rng.standard_normal((1, tokens, in_), dtype=np.float32)
                runs = {name: made.on(x) for name, made in layers.items()}
                samples = turns(runs, arguments.rounds, BLOCK_MS, wall=False)
                found = {text: ratio(samples["dense"], samples[text]) for text in PATTERNS}
                dense_us = float(np.median(samples["dense"])) / copies * 1e3
                row = {"tokens": tokens, "out": out, "in": in_, "weights": weights, "copies": copies}
                rows.append({**row, "dense_us": dense_us, "speedup": found})
                cells = (shown(found[text]) for text in PATTERNS)
                table.append((str(tokens), f"{in_} → {out}", weights, f"{dense_us:.0f}", *cells))
                print(" | ".join(table[-1]), flush=True)
    device = busy_device()
    write("cpu_gemm_few", QUESTION, device, ("onnxruntime", "numpy"), rows)
    text = markdown(("tokens", "in → out", "weights", "dense µs", *PATTERNS), table)
    count = (
        f"{arguments.rounds} rounds of at least {BLOCK_MS:.0f} ms each, process CPU time, one thread, on {device}. "
        "Hot: one layer again and again. Cold: copies of the layer in turn, whose dense weights take "
        f"{COLD_BYTES / 1e6:.0f} MB."
    )
    (RESULTS / "cpu_gemm_few.md").write_text(f"{QUESTION}\n\nTimes as fast as ONNX Runtime dense: {count}\n\n{text}")


if __name__ == "__main__":
    main()
