"""TensorRT's requirements as rules with their sources, and checks of an ONNX file against them. Needs no TensorRT.

`sparsity_of` returns which weights may get sparse kernels, `refusals` which nodes the parser or builder rejects. Each
rule is either documented by NVIDIA or was only observed. RULES_VERSION increases with each change of the rules, so that
reports show which rules they used.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpcompile.export.eight_bit_ends import Ends, ends_of
from mpcompile.export.mask_check import FileWeight, ProvenMask, file_weights
from mpcompile.ir.pattern import NM
from mpcompile.measure.layer_verdict import LayerVerdict, Rule
from mpcompile.runtimes.tensorrt.quantization_rules import (
    END_RULES,
    FP8,
    FUSED_STEPS,
    INT8_INPUT,
    INT8_OUTPUT,
    OBSERVED_IN,
    QUANTIZATION_RULES,
    dequantize_refusal,
    quantize_refusal,
)

RULES_VERSION = 2
TWO_FOUR = NM(2, 4)
GUIDE = "TensorRT developer guide, structured sparsity"

PATTERN = Rule("pattern", "of every 4 consecutive input channels at most 2 weights are not zero", GUIDE, "documented")
CHANNELS = Rule("channels", "the number of input channels is a multiple of 4", GUIDE, "documented")
TYPE = Rule("type", "weights are float16 or int8; the guide does not mention float32", GUIDE, "documented")
BFLOAT16 = Rule("bfloat16", "polygraphy prunes bfloat16 weights as it does float16", "polygraphy 0.53", "observed")
GROUPS = Rule("groups", "the guide does not mention grouped convolutions", GUIDE, "documented")
LARGE = Rule(
    "large",
    "sparse kernels are faster if there are many input and output channels (over 256)",
    "NVIDIA/TensorRT issues 3849 and 4065",
    "observed",
)
AMPERE = Rule("ampere", "sparse tensor cores need compute capability 8.0 or newer", GUIDE, "documented")
SPARSITY_RULES = (PATTERN, CHANNELS, TYPE, BFLOAT16, GROUPS, LARGE, AMPERE, *END_RULES)

UNSUPPORTED = Rule("operator", "the parser has no such operator", OBSERVED_IN, "observed")
REDUCTION = Rule("reduction", "ScatterElements and ScatterND only overwrite; they do not add", OBSERVED_IN, "observed")
TOP_K = Rule("top-k", "TopK takes at most 3840", OBSERVED_IN, "observed")
NONZERO = Rule("nonzero", "the size of the result depends on the data, which needs a plugin", OBSERVED_IN, "observed")
ATTENTION = Rule("attention", "the Attention operator has no float32 kernel; export opset 20", OBSERVED_IN, "observed")
CONSTANT = Rule("constant", "axes and shapes must be constants", "onnx-tensorrt operators.md 10.1", "documented")
OPSET = Rule("opset", "opsets 9 to 24 are supported", "onnx-tensorrt operators.md", "documented")
OPERATOR_RULES = (UNSUPPORTED, REDUCTION, TOP_K, NONZERO, ATTENTION, CONSTANT, OPSET, *QUANTIZATION_RULES)

LARGEST_K = 3840
OPSETS = range(9, 25)
NO_OPERATOR = frozenset({
    "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "CumProd", "DFT", "DeformConv", "Det",
    "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix",
    "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement", "QLinearConv",
    "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat",
    "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightSparsity:
    """Whether one constant weight of a file may get sparse kernels; None if the rules do not decide."""

    node: str
    op: str
    initializer: str
    shape: tuple[int, ...]  # (out, in, *taps)
    zeros: float  # share of zero weights, 0 to 1
    two_four: bool
    eligible: bool | None
    rule: Rule
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node that a rule rejects."""

    node: str
    op: str
    found: str
    rule: Rule

    def __str__(self) -> str:
        return f"{self.op} {self.node}: {self.found}; {self.rule.says} ({self.rule.standing}: {self.rule.source})"


def sparsity_of(file: onnx.ModelProto) -> list[WeightSparsity]:
    """Returns one row per constant weight of Conv, Gemm and MatMul."""
    groups = {n.name: a.i for n in file.graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "group"}
    ends = ends_of(file, FUSED_STEPS)
    rows = []
    for weight in file_weights(file):
        kept = _nonzero_mask(weight.values)
        two_four = _follows_pattern(kept, TWO_FOUR)
        eligible, rule, reason = _eligible(weight, two_four, groups.get(weight.node, 1), ends[weight.node])
        rows.append(
            WeightSparsity(
                node=weight.node,
                op=weight.op,
                initializer=weight.initializer,
                shape=tuple(weight.values.shape),
                zeros=1 - np.count_nonzero(kept) / kept.size,
                two_four=two_four,
                eligible=eligible,
                rule=rule,
                reason=reason,
            )
        )
    return rows


def verdicts_of(file: onnx.ModelProto, masks: tuple[ProvenMask, ...]) -> tuple[LayerVerdict, ...]:
    """Returns the verdict on each proven mask that the rules give, without an engine."""
    by_initializer = {row.initializer: row for row in sparsity_of(file)}
    rows = []
    for mask in masks:
        row = by_initializer[mask.initializer]
        reason = row.reason
        if row.eligible and min(row.shape[:2]) <= 256:
            reason += f"; {row.shape[1]} to {row.shape[0]} channels are few, and a dense kernel may be faster"
        rows.append(
            LayerVerdict(mask.layer, mask.initializer, mask.op, mask.pattern, row.eligible, row.rule.name, reason)
        )
    return tuple(rows)


def _eligible(weight: FileWeight, two_four: bool, groups: int, ends: Ends) -> tuple[bool | None, Rule, str]:
    """Returns whether a weight is eligible, the first rule that decides, and the reason as a sentence."""
    channels = weight.values.shape[1]
    if groups > 1:
        return None, GROUPS, f"it is a convolution of {groups} groups, which the rules do not cover"
    if channels % 4:
        return False, CHANNELS, f"{channels} input channels are not a multiple of 4"
    if not two_four:
        return False, PATTERN, "it is not 2:4, and no other pattern has a kernel: it runs as dense"
    kind = weight.values.dtype
    if kind == np.int8 and ends.reads is not None:
        return False, INT8_INPUT, f"its weight is int8 and its input is not ({ends.reads}): it runs in floating point"
    if kind == np.int8 and ends.returns is not None:
        return False, INT8_OUTPUT, f"2:4 in int8, but its output is not int8 ({ends.returns}): it runs as dense int8"
    if kind.name == "float8_e4m3fn":
        return None, FP8, "2:4 in FP8, which the rules do not cover"
    if kind == np.float16 or kind == np.int8:
        return True, PATTERN, f"2:4 in {kind}; TensorRT decides on a GPU whether to use a sparse kernel"
    if kind.name == "bfloat16":
        return True, BFLOAT16, "2:4 in bfloat16; TensorRT decides on a GPU whether to use a sparse kernel"
    return None, TYPE, f"2:4 in {kind}, which the rules do not cover; use --precision fp16"


def _nonzero_mask(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns where a weight is nonzero. 2-byte types are compared as integers, which is faster."""
    if values.dtype.itemsize == 2:
        kept: NDArray[np.bool_] = (values.view(np.uint16) & 0x7FFF) != 0
    else:
        kept = values != 0
    return kept


def _follows_pattern(kept: NDArray[np.bool_], pattern: NM) -> bool:
    """Whether every group along axis 1 of (out, in, *taps) keeps no more weights than the pattern allows.

    Adds strided slices: that is fast for a transposed weight too, unlike a sum over a short last axis.
    """
    if kept.shape[1] % pattern.of:
        return False
    counts = np.zeros((kept.shape[0], kept.shape[1] // pattern.of, *kept.shape[2:]), np.uint8)
    bits = kept.view(np.uint8)
    for offset in range(pattern.of):
        counts += bits[:, offset :: pattern.of]
    return bool(counts.max() <= pattern.keep)


def implies_two_four(pattern: NM) -> bool:
    """Whether every mask of a pattern is also 2:4: no aligned group of 4 channels can keep more than 2."""

    def most(start: int) -> int:
        """Returns how many of the 4 channels from `start` a mask can keep."""
        overlaps = Counter(channel // pattern.of for channel in range(start, start + 4))
        return sum(min(pattern.keep, overlap) for overlap in overlaps.values())

    return all(most(start) <= TWO_FOUR.keep for start in range(0, math.lcm(4, pattern.of), 4))


def refusals(file: onnx.ModelProto) -> list[Refusal]:
    """Returns every node that a rule rejects, in file order."""
    constants = {tensor.name: tensor for tensor in file.graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in file.graph.node if n.op_type == "Constant" and n.attribute}
    types = {v.name: v.type.tensor_type.elem_type for v in (*file.graph.value_info, *file.graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in file.graph.initializer}
    opset = next((entry.version for entry in file.opset_import if entry.domain in ("", "ai.onnx")), 0)
    rejected = [Refusal("", "the file", f"it is opset {opset}", OPSET)] if opset not in OPSETS else []
    for node in file.graph.node:
        rejected += _refused(node, constants, types)
    return rejected


def _refused(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], types: Mapping[str, int]
) -> Iterator[Refusal]:
    """Yields the rules that one node breaks."""
    if node.op_type in NO_OPERATOR:
        yield Refusal(node.name, node.op_type, "not supported", UNSUPPORTED)
    if check := CHECKS.get(node.op_type):
        broken = check(node, constants, types)
        if broken is not None:
            yield Refusal(node.name, node.op_type, broken[0], broken[1])


Constants = Mapping[str, onnx.TensorProto]
Check = Callable[[onnx.NodeProto, Constants, Mapping[str, int]], tuple[str, Rule] | None]


def _reduction(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    given = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
    return None if given == "none" else (f"its reduction is {given}", REDUCTION)


def _top_k(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    stored = constants.get(node.input[1])
    if stored is None:
        return "its k is not a constant", CONSTANT
    count = int(onnx.numpy_helper.to_array(stored).reshape(-1)[0])
    return (f"its k is {count}", TOP_K) if count > LARGEST_K else None


def _nonzero(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    return "not supported", NONZERO


def _attention(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    return ("its input is float32", ATTENTION) if types.get(node.input[0]) == onnx.TensorProto.FLOAT else None


def _constant_axes(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    position = 3 if node.op_type == "Slice" else 1
    axes = node.input[position] if len(node.input) > position else ""
    return (f"its axes, {axes}, are not a constant", CONSTANT) if axes and axes not in constants else None


CHECKS: Mapping[str, Check] = {
    "ScatterElements": _reduction,
    "ScatterND": _reduction,
    "TopK": _top_k,
    "NonZero": _nonzero,
    "Attention": _attention,
    "QuantizeLinear": quantize_refusal,
    "DequantizeLinear": dequantize_refusal,
    **dict.fromkeys(("Slice", "Squeeze", "Unsqueeze", "ReduceMean", "ReduceSum", "ReduceMax"), _constant_axes),
}
