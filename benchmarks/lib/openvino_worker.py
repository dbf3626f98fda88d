"""Runs a model in OpenVINO once per line on stdin, and prints the CPU and wall milliseconds of each run.

    python lib/openvino_worker.py MODEL SHAPE THREADS

SHAPE is the input's shape, separated by commas. cpu_vit.py runs this as a process, because OpenVINO need not be
installed in the environment of mpcompile.
"""

import sys
import time

import numpy as np
import openvino


def main(model: str, shape: str, threads: str) -> None:
    """Answers each line on stdin with a line `CPU_MS WALL_MS` on stdout."""
    options = {"INFERENCE_NUM_THREADS": int(threads), "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    images = np.random.default_rng(0).standard_normal([int(size) for size in shape.split(",")], dtype=np.float32)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        request.infer([images])
        print((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
