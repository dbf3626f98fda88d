"""The native convolution NMConv2d in an ONNX file: its window, its names, and its fallback as an ONNX function.

NMConv2d takes a kernel of any size. It adds the input `residual` (NMConv2dAdd…) and applies an activation (…Relu,
…Relu6) in the same pass over the result. The columns of its weight are ordered by tap, then by input channel, so that
N:M groups are neighbouring columns.

A plain 1×1 convolution is still written as NMConv (custom_op.py), which older versions of the library know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir
from onnx import AttributeProto, helper, numpy_helper

from mpcompile.runtimes.native.custom_op import ATTRIBUTES, CONV, DOMAIN, INPUTS, constants, dense_weight

CONV2D, ADD = "NMConv2d", "Add"
ACTIVATIONS = ("", "Relu", "Relu6")
RESIDUAL = "residual"
RELU6_LIMITS = (0.0, 6.0)


@dataclass(frozen=True, slots=True)
class Window:
    """The window of a convolution over images; pairs are vertical, horizontal; `pads` as in ONNX."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @property
    def pointwise(self) -> bool:
        """Whether each output position reads the input at the same position only."""
        return self == Window()

    def attributes(self) -> dict[str, tuple[int, ...]]:
        """Returns the attributes of a Conv."""
        return {
            "kernel_shape": self.kernel,
            "strides": self.strides,
            "pads": self.pads,
            "dilations": self.dilations,
        }

    def outputs(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and the width of the result."""
        sizes = (height, width)
        first, second = (
            (sizes[i] + self.pads[i] + self.pads[i + 2] - self.dilations[i] * (self.kernel[i] - 1) - 1)
            // self.strides[i]
            + 1
            for i in range(2)
        )
        return first, second


@dataclass(frozen=True, slots=True)
class Convolution:
    """What a native convolution computes beside the product: its window, and what follows it in the same operator."""

    window: Window
    activation: str = ""  # one of ACTIVATIONS
    residual: str | None = None  # the tensor that is added before the activation

    @property
    def op(self) -> str:
        """The native operator: NMConv where that is enough."""
        if self.window.pointwise and not self.activation and self.residual is None:
            return CONV
        return conv2d(self.activation, self.residual is not None)

    def attributes(self) -> dict[str, tuple[int, ...]]:
        """Returns the operator's attributes beside those of the packed weight."""
        return {} if self.op == CONV else self.window.attributes()


def conv2d(activation: str, adds: bool) -> str:
    """Returns the name of the operator."""
    return f"{CONV2D}{ADD if adds else ''}{activation}"


OPERATORS = tuple(conv2d(activation, adds) for adds in (False, True) for activation in ACTIVATIONS)


def columns_of(weight: np.ndarray) -> np.ndarray:
    """Returns a weight (out, in_, *taps) as a matrix (out, taps · in_), input channels innermost."""
    return np.ascontiguousarray(np.moveaxis(weight, 1, -1).reshape(len(weight), -1))


def weight_of(columns: np.ndarray, window: Window) -> np.ndarray:
    """Returns the weight (out, in_, height, width) of a matrix; the inverse of `columns_of`."""
    return np.ascontiguousarray(np.moveaxis(columns.reshape(len(columns), *window.kernel, -1), -1, 1))


def following(output: str, result: str, activation: str, residual: str | None) -> list[onnx.NodeProto]:
    """Returns the standard nodes that turn the output of a Conv into `result`; none if nothing follows it.

    The limits of a Relu6 are the values `low` and `high`.
    """
    nodes = []
    if residual is not None:
        nodes.append(helper.make_node("Add", [output, residual], [f"{output}.sum"]))
    if activation:
        inputs = [nodes[-1].output[0] if nodes else output]
        made = ("Clip", [*inputs, "low", "high"]) if activation == "Relu6" else ("Relu", inputs)
        nodes.append(helper.make_node(*made, [f"{output}.active"]))
    if nodes:
        nodes[-1].output[0] = result
    return nodes


def limits() -> Mapping[str, np.ndarray]:
    """Returns the constants `low` and `high` that `following` uses for a Relu6."""
    low, high = RELU6_LIMITS
    return MappingProxyType({"low": np.array(low, np.float32), "high": np.array(high, np.float32)})


def function(op: str, opset: int) -> onnx.FunctionProto:
    """Returns the fallback of one of OPERATORS in standard operators of `opset`, the opset of the file."""
    rest = op.removeprefix(CONV2D)
    adds, activation = rest.startswith(ADD), rest.removeprefix(ADD)
    after = following("product", "y", activation, RESIDUAL if adds else None)
    conv = helper.make_node("Conv", ["x", "kernel", "bias"], ["product" if after else "y"])
    for name in Window().attributes():
        conv.attribute.add(name=name, ref_attr_name=name, type=AttributeProto.INTS)
    taps = helper.make_node("Constant", [], ["taps"])
    taps.attribute.add(name="value_ints", ref_attr_name="kernel_shape", type=AttributeProto.INTS)
    body = [
        *dense_weight(),
        *constants(kept_rows=[0], channels=[-1]),
        taps,
        helper.make_node("Concat", ["kept_rows", "taps", "channels"], ["by_tap"], axis=0),
        helper.make_node("Reshape", ["weight", "by_tap"], ["channels_last"]),
        helper.make_node("Transpose", ["channels_last"], ["kernel"], perm=[0, 3, 1, 2]),
        conv,
    ]
    if activation == "Relu6":
        body += [
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
            for name, value in limits().items()
        ]
    inputs = [*INPUTS, *([RESIDUAL] if adds else [])]
    attributes = [*ATTRIBUTES, *Window().attributes()]
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, op, inputs, ["y"], [*body, *after], opsets, attributes)


def activation_of(node: ir.Node) -> str | None:
    """Returns the activation that a node applies to its first input, one of ACTIVATIONS, or None."""
    if node.op_type == "Relu":
        return "Relu"
    if node.op_type != "Clip" or len(node.inputs) != 3:
        return None
    found = []
    for value in node.inputs[1:]:
        stored = None if value is None else ir.convenience.get_const_tensor(value)
        if stored is None or stored.size != 1:
            return None
        found.append(float(stored.numpy().reshape(-1)[0]))
    return "Relu6" if tuple(found) == RELU6_LIMITS else None
