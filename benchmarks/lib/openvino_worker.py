"""Runs a model in OpenVINO, as often as each line on stdin says, and prints the CPU and wall milliseconds per run.

    python lib/openvino_worker.py MODEL SHAPE THREADS

SHAPE is the input's shape, separated by commas. The first line on stdout is a JSON object: OpenVINO's version, and how
often each kernel runs a product (`brgemm_avx512_core_vnni_I8`). Benchmarks run this as a process, because OpenVINO need
not be installed in the environment of mpcompile.
"""

import json
import sys
import time
from collections import Counter

import numpy as np
import openvino

PRODUCTS = ("FullyConnected", "MatMul")  # layer types in OpenVINO's plan of execution


def kernels(compiled: openvino.CompiledModel) -> Counter[str]:
    """Returns how often each kernel runs a product."""
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) in PRODUCTS:
            found[info["primitiveType"].astype(str)] += 1
    return found


def main(model: str, shape: str, threads: str) -> None:
    """Answers each line on stdin, a number of runs, with a line `CPU_MS WALL_MS` on stdout."""
    options = {"INFERENCE_NUM_THREADS": int(threads), "INFERENCE_PRECISION_HINT": "f32"}
    sizes = [int(size) for size in shape.split(",")]
    source = openvino.Core().read_model(model)
    source.reshape(sizes)
    compiled = openvino.Core().compile_model(source, "CPU", options)
    request, rng = compiled.create_infer_request(), np.random.default_rng(0)
    if compiled.input(0).element_type == openvino.Type.u8:
        given = rng.integers(0, 256, sizes, np.uint8)
    else:
        given = rng.standard_normal(sizes, dtype=np.float32)
    request.set_input_tensor(openvino.Tensor(given))
    print(json.dumps({"version": openvino.__version__, "kernels": kernels(compiled)}), flush=True)
    for line in sys.stdin:
        count = int(line)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(count):
            request.infer(share_outputs=True)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(cpu * 1e3 / count, wall * 1e3 / count, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
