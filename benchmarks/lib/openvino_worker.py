"""One model in OpenVINO, run once for every line on stdin: prints CPU and wall milliseconds. For cpu_vit.py.

    python lib/openvino_worker.py MODEL SHAPE THREADS

A program of its own, because OpenVINO need not be in the environment of mpcompile.
"""

import sys
import time

import numpy as np
import openvino


def main(model: str, shape: str, threads: str) -> None:
    options = {"INFERENCE_NUM_THREADS": int(threads), "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    images = np.random.default_rng(0).standard_normal([int(size) for size in shape.split(",")], dtype=np.float32)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        request.infer([images])
        print((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
