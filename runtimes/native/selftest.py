"""Checks that a library of the kernel works with the installed ONNX Runtime, on a tiny model.

    python selftest.py LIBRARY
    python selftest.py --installed        the library of the installed package

If the library and ONNX Runtime disagree about the C interface, the process crashes, so callers run this as a
subprocess. It imports nothing
of mpcompile, which would take seconds. On success the exit code is 0 and nothing is printed; otherwise one sentence is
printed to standard error.
"""

import sys
from importlib.metadata import files
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


def model() -> onnx.ModelProto:
    """Returns x W^T + bias with W = [[1, 0, 0, 2], [3, 0, 4, 0], [0, 0, 0, 5]], packed as two groups of two rows."""
    streams: dict[str, NDArray[Any]] = {
        "values": np.array([[[[1, 3], [2, 4]], [[5, 0], [0, 0]]]], np.float32),
        "places": np.array([[[[0, 0], [3, 2]], [[3, 4], [4, 4]]]], np.uint16),
        "common": np.array([[1, 0]], np.uint16),
        "order": np.array([[[0, 1], [2, 3]]], np.int32),
        "bias": np.array([0.5, -1, 0], np.float32),
    }
    attributes: dict[str, Any] = {"rows": 3, "columns": 4, "share": 1, "block": 4, "chunk": 16}
    node = helper.make_node("NMGemm", ["x", *streams], ["y"], domain="mpcompile", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 3])
    stored = [numpy_helper.from_array(array, name) for name, array in streams.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mpcompile", 1)]
    return helper.make_model(
        helper.make_graph([node], "selftest", [x], [y], stored), opset_imports=opsets, ir_version=8
    )


def main(library: str) -> str | None:
    """Returns what the library computes wrongly, or None."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model().SerializeToString(), options, providers=["CPUExecutionProvider"])
    weight = np.array([[1, 0, 0, 2], [3, 0, 4, 0], [0, 0, 0, 5]], np.float32)
    for tokens in (1, 7, 200):
        x = np.arange(4 * tokens, dtype=np.float32).reshape(tokens, 4) % 13  # small integers: every sum is exact
        if not np.array_equal(session.run(None, {"x": x})[0], x @ weight.T + np.array([0.5, -1, 0], np.float32)):
            return f"wrong results for {tokens} tokens"
    return None


def installed() -> str:
    """Returns the path of the library in the installed package."""
    return next(str(f.locate()) for f in files("mpcompile") or () if f.name.startswith("libmpcompile_native"))


if __name__ == "__main__":
    try:
        sys.exit(main(installed() if sys.argv[1] == "--installed" else sys.argv[1]))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
