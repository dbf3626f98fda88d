"""One dense file in ONNX Runtime's int8 on the processor that runs this: prints JSON. For int8_baselines.py.

    python lib/int8_worker.py FOLDER

FOLDER has dense.onnx and images.npz: calibration and held_out (n, c, h, w) as the model takes them, and labels (n) of
those held out. A program of its own, so that an emulator can run it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpcompile.export.onnx_export import Exported
from mpcompile.runtimes import Engine, QuantizedBaseline
from mpcompile.runtimes.ort.int8 import quantised, saturates
from mpcompile.runtimes.ort.session import session_on

BATCH = 8
UNCHANGED = "8-bit weights, one scale a tensor", "8-bit weights, a scale per output channel"


def logits(engine: Engine, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (n, outputs)."""
    return np.concatenate([engine(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


def before(exported: Exported, images: NDArray[np.float32], folder: Path) -> dict[str, QuantizedBaseline]:
    """The int8 engines as they were up to commit 58aa4e4, whatever the processor."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(exported.onnx, folder / "before.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    static = quantised(exported, 1, images, folder, saturating=False)["int8, static"]
    assert isinstance(static, QuantizedBaseline), static
    return {
        "int8, dynamic": QuantizedBaseline(session_on(folder / "before.onnx", 1), UNCHANGED[0]),
        "int8, static": QuantizedBaseline(static.engine, UNCHANGED[1]),
    }


def main(folder: Path) -> None:
    given = np.load(folder / "images.npz")
    images, labels = given["held_out"], given["labels"]
    exported = Exported(
        onnx=folder / "dense.onnx", arch="dense", image_shape=images.shape[1:], precision="fp32", batch=None
    )
    expected = logits(session_on(exported.onnx, 1), images)
    now = quantised(exported, 1, given["calibration"], folder, saturating=saturates())
    rows: list[dict[str, Any]] = []
    for when, made in (("before", before(exported, given["calibration"], folder)), ("now", now)):
        for kind, found in made.items():
            assert isinstance(found, QuantizedBaseline), found
            shift = np.abs((here := logits(found.engine, images)) - expected).max(1)
            rows.append(
                {
                    "kind": kind,
                    "when": when,
                    "method": found.method,
                    "shift": float(shift.mean()),
                    "shift_max": float(shift.max()),
                    "agreement": float((here.argmax(1) == expected.argmax(1)).mean()),
                    "top1": float((here.argmax(1) == labels).mean()),
                    "dense_top1": float((expected.argmax(1) == labels).mean()),
                    "count": len(images),
                }
            )
    print(json.dumps({"saturates": saturates(), "rows": rows}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
