"""Small ONNX files with one float convolution and what follows it."""

import numpy as np
import onnx
from native_models import Array
from onnx import TensorProto, helper, numpy_helper

NODE = helper.make_node
CONV = NODE("Conv", ["x", "w"], ["c"], name="n", pads=[1, 1, 1, 1])
SHAPE = [2, 4, 5, 5]


def graph(nodes: list[onnx.NodeProto], weight: Array, shapes: dict[str, list[int]]) -> onnx.ModelProto:
    """Returns a file with one 3×3 weight `w` of the node `n`; the last tensor of `shapes` is the output."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    limits = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("zero", 0), ("six", 6), ("five", 5))]
    made = helper.make_graph(
        nodes, "g", values[:2], values[-1:], [numpy_helper.from_array(weight, "w"), *limits], value_info=values[2:-1]
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
