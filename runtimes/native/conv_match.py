"""Reads a Conv of a graph: its window, what follows it, and why the native operator cannot compute it."""

from collections.abc import Sequence

import onnx_ir as ir

from mpcompile.runtimes.native.conv_op import Convolution, Window, activation_of
from mpcompile.runtimes.native.graph_reading import only_reader

UNPADDED = ("NOTSET", "VALID")


def refusal(node: ir.Node, shape: Sequence[int]) -> str | None:
    """Returns why the native operator cannot compute a Conv with a weight of this shape, or None."""
    given = node.attributes
    groups = given.get_int("group", 1)
    if groups != 1:
        return f"it is a convolution with {groups} groups; the kernel takes one group"
    padding = given.get_string("auto_pad", "NOTSET")
    if padding not in UNPADDED:
        return f"it is a convolution with auto_pad {padding}; the kernel takes explicit pads"
    one_tap = all(taps == 1 for taps in shape[2:])
    plain = one_tap and not any(given.get_ints("pads", ())) and all(s == 1 for s in given.get_ints("strides", ()))
    if len(shape) != 4 and not plain:
        return f"it is a convolution over {len(shape) - 2} axes; the kernel takes 2, or 1×1 without strides and padding"
    return None


def matched(node: ir.Node, shape: Sequence[int], claimed: set[ir.Node]) -> tuple[Convolution, tuple[str, ...]]:
    """Returns what the native operator computes for a Conv, and the outputs of the nodes after it that it replaces.

    An Add that joins two convolutions is computed by the first; `claimed` has the Adds that are taken, and gets this
    one.
    """
    given = node.attributes
    if len(shape) != 4:
        return Convolution(Window()), ()
    height, width = shape[2:]
    strides = tuple(given.get_ints("strides", (1, 1)))
    pads = (0, 0, 0, 0) if given.get_string("auto_pad", "NOTSET") == "VALID" else given.get_ints("pads", (0, 0, 0, 0))
    dilations = tuple(given.get_ints("dilations", (1, 1)))
    if (height, width) == (1, 1):
        dilations = (1, 1)
    window = Window((height, width), (strides[0], strides[1]), tuple(pads), (dilations[0], dilations[1]))  # type: ignore[arg-type]
    output, nodes, residual = node.outputs[0], [], None
    reader = only_reader(output)
    if reader is not None and reader.op_type == "Add" and reader not in claimed:
        added = next((value for value in reader.inputs if value is not output), None)
        if added is not None and added.const_value is None and _same_shape(added, output):
            claimed.add(reader)
            residual, output = added, reader.outputs[0]
            nodes.append(str(output.name))
            reader = only_reader(output)
    activation = None if reader is None else activation_of(reader)
    if reader is not None and activation is not None and reader.inputs[0] is output:
        nodes.append(str(reader.outputs[0].name))
    return Convolution(window, activation or "", None if residual is None else str(residual.name)), tuple(nodes)


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    """Whether the file gives both values the same shape of four known or named sizes."""
    if one.shape is None or other.shape is None or len(one.shape) != 4 or len(other.shape) != 4:
        return False
    pairs = zip(one.shape, other.shape, strict=True)
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in pairs)
