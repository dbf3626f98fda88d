"""Quantises a dense ONNX file to int8, compares its logits with the dense file's, and prints JSON.

    python lib/int8_worker.py FOLDER

FOLDER has dense.onnx and images.npz with three arrays: calibration and held_out (n, c, h, w), normalised for the model,
and labels (n,) of the held-out images. int8_baselines.py runs this as a process, so that an emulator can run it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcompile.export.onnx_export import Exported
from mpcompile.runtimes import QuantizedBaseline
from mpcompile.runtimes.ort.int8 import logits_of, quantised, saturates
from mpcompile.runtimes.ort.session import session_on

# How weights were quantised up to commit 58aa4e4.
FORMER_DYNAMIC, FORMER_STATIC = "8-bit weights, one scale a tensor", "8-bit weights, a scale per output channel"


def former_baselines(exported: Exported, images: NDArray[np.float32], folder: Path) -> dict[str, QuantizedBaseline]:
    """Returns the int8 engines as they were made up to commit 58aa4e4: with 8-bit weights on every processor."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(exported.onnx, folder / "before.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    static = quantised(exported, 1, images, folder, saturating=False)["int8, static"]
    assert isinstance(static, QuantizedBaseline), static
    return {
        "int8, dynamic": QuantizedBaseline(session_on(folder / "before.onnx", 1), FORMER_DYNAMIC),
        "int8, static": QuantizedBaseline(static.engine, FORMER_STATIC),
    }


def main(folder: Path) -> None:
    """Prints one JSON object: whether products saturate, and a row per kind of quantisation, before and now."""
    arrays = np.load(folder / "images.npz")
    images, labels = arrays["held_out"], arrays["labels"]
    exported = Exported(
        onnx=folder / "dense.onnx", arch="dense", image_shape=images.shape[1:], precision="fp32", batch=None
    )
    dense = logits_of(session_on(exported.onnx, 1), images)
    now = quantised(exported, 1, arrays["calibration"], folder, saturating=saturates())
    rows: list[dict[str, Any]] = []
    for when, baselines in (("before", former_baselines(exported, arrays["calibration"], folder)), ("now", now)):
        for kind, baseline in baselines.items():
            assert isinstance(baseline, QuantizedBaseline), baseline
            logits = logits_of(baseline.engine, images)
            shift = np.abs(logits - dense).max(1)
            rows.append(
                {
                    "kind": kind,
                    "when": when,
                    "method": baseline.method,
                    "shift": float(shift.mean()),
                    "shift_max": float(shift.max()),
                    "agreement": float((logits.argmax(1) == dense.argmax(1)).mean()),
                    "top1": float((logits.argmax(1) == labels).mean()),
                    "dense_top1": float((dense.argmax(1) == labels).mean()),
                    "count": len(images),
                }
            )
    print(json.dumps({"saturates": saturates(), "rows": rows}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
