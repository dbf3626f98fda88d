"""What TensorRT says it needs, as rules with their sources, and what an ONNX file makes of them. Needs no TensorRT.

Two questions: which weights may get sparse kernels (`sparsity_of`), and which nodes its parser or builder refuses
(`refusals`). Each rule says whether NVIDIA documents it or whether it was only seen. RULES_VERSION counts changes
of the table, so that two reports can be told apart.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpcompile.export.mask_check import FileWeight, ProvenMask, file_weights
from mpcompile.ir.pattern import NM
from mpcompile.measure.layer_verdict import LayerVerdict, Rule

RULES_VERSION = 1
TWO_FOUR = NM(2, 4)
GUIDE = "TensorRT developer guide, structured sparsity"
SEEN = "TensorRT for RTX 1.7.1, its parser and compiler on a CPU"

PATTERN = Rule("pattern", "of every 4 consecutive input channels at most 2 weights are not zero", GUIDE, "documented")
CHANNELS = Rule("channels", "the number of input channels is a multiple of 4", GUIDE, "documented")
TYPE = Rule("type", "weights are float16 or int8; of float32 the guide says nothing", GUIDE, "documented")
BFLOAT16 = Rule("bfloat16", "polygraphy prunes bfloat16 weights as it does float16", "polygraphy 0.53", "observed")
GROUPS = Rule("groups", "of grouped convolutions nothing is said", GUIDE, "documented")
LARGE = Rule(
    "large",
    "sparse kernels are faster where input and output channels are many (over 256)",
    "NVIDIA/TensorRT issues 3849 and 4065",
    "observed",
)
AMPERE = Rule("ampere", "sparse tensor cores need compute capability 8.0 or newer", GUIDE, "documented")
SPARSITY_RULES = (PATTERN, CHANNELS, TYPE, BFLOAT16, GROUPS, LARGE, AMPERE)

UNSUPPORTED = Rule("operator", "the parser has no such operator", SEEN, "observed")
REDUCTION = Rule("reduction", "ScatterElements and ScatterND only overwrite; they do not add up", SEEN, "observed")
TOP_K = Rule("top-k", "TopK takes at most 3840", SEEN, "observed")
NONZERO = Rule("nonzero", "the number of results depends on the numbers, which needs a plugin", SEEN, "observed")
ATTENTION = Rule("attention", "the Attention operator has no float32 kernel; export opset 20", SEEN, "observed")
CONSTANT = Rule("constant", "axes and shapes are constants", "onnx-tensorrt operators.md 10.1", "documented")
OPSET = Rule("opset", "opsets 9 to 24 are read", "onnx-tensorrt operators.md", "documented")
OPERATOR_RULES = (UNSUPPORTED, REDUCTION, TOP_K, NONZERO, ATTENTION, CONSTANT, OPSET)

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
    """Whether one constant weight of a file may get sparse kernels: None where the rules do not say."""

    node: str
    op: str
    initializer: str
    shape: tuple[int, ...]  # (out, in, *taps)
    zeros: float  # share of the weights that are zero
    two_four: bool
    eligible: bool | None
    rule: Rule
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node that a rule does not let through."""

    node: str
    op: str
    found: str
    rule: Rule

    def __str__(self) -> str:
        return f"{self.op} {self.node}: {self.found}; {self.rule.says} ({self.rule.standing}: {self.rule.source})"


def sparsity_of(file: onnx.ModelProto) -> list[WeightSparsity]:
    """A row a constant weight of Conv, Gemm and MatMul."""
    groups = {n.name: a.i for n in file.graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "group"}
    rows = []
    for weight in file_weights(file):
        kept = _not_zero(weight.values)
        two_four = _holds(kept, TWO_FOUR)
        eligible, rule, reason = _eligible(weight, two_four, groups.get(weight.node, 1))
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
    """A row a mask that was found in the file, as far as can be said without an engine."""
    found = {row.initializer: row for row in sparsity_of(file)}
    rows = []
    for mask in masks:
        row = found[mask.initializer]
        reason = row.reason
        if row.eligible and min(row.shape[:2]) <= 256:
            reason += f"; {row.shape[1]} to {row.shape[0]} channels are few, and a dense kernel may win"
        rows.append(
            LayerVerdict(mask.layer, mask.initializer, mask.op, mask.pattern, row.eligible, row.rule.name, reason)
        )
    return tuple(rows)


def _eligible(weight: FileWeight, two_four: bool, groups: int) -> tuple[bool | None, Rule, str]:
    """The first rule that decides, and what it found."""
    channels = weight.values.shape[1]
    if groups > 1:
        return None, GROUPS, f"a convolution of {groups} groups, of which the rules say nothing"
    if channels % 4:
        return False, CHANNELS, f"{channels} input channels are not a multiple of 4"
    if not two_four:
        return False, PATTERN, "it is not 2:4, and no other pattern has a kernel: it runs as dense"
    kind = weight.values.dtype
    if kind == np.float16 or kind == np.int8:
        return True, PATTERN, f"2:4 in {kind}; whether a sparse kernel is chosen shows on a GPU"
    if kind.name == "bfloat16":
        return True, BFLOAT16, "2:4 in bfloat16; whether a sparse kernel is chosen shows on a GPU"
    return None, TYPE, f"2:4 in {kind}, of which the rules say nothing; use --precision fp16"


def _not_zero(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a weight is not zero; by its bits where two bytes are compared faster as integers than as numbers."""
    if values.dtype.itemsize == 2:
        kept: NDArray[np.bool_] = (values.view(np.uint16) & 0x7FFF) != 0
    else:
        kept = values != 0
    return kept


def _holds(kept: NDArray[np.bool_], pattern: NM) -> bool:
    """Whether every group of weights along axis 1 (out, in, *taps) keeps no more than the pattern allows.

    Slices are added up, which follows the memory of a transposed weight; a sum over a short last axis does not.
    """
    if kept.shape[1] % pattern.of:
        return False
    counts = np.zeros((kept.shape[0], kept.shape[1] // pattern.of, *kept.shape[2:]), np.uint8)
    bits = kept.view(np.uint8)
    for place in range(pattern.of):
        counts += bits[:, place :: pattern.of]
    return bool(counts.max() <= pattern.keep)


def implies_two_four(pattern: NM) -> bool:
    """Whether every mask of a pattern is 2:4 too: no four consecutive channels can keep more than two."""

    def most(start: int) -> int:
        """How many of the four from `start` on a mask can keep."""
        overlaps = Counter(channel // pattern.of for channel in range(start, start + 4))
        return sum(min(pattern.keep, overlap) for overlap in overlaps.values())

    return all(most(start) <= TWO_FOUR.keep for start in range(0, math.lcm(4, pattern.of), 4))


def refusals(file: onnx.ModelProto) -> list[Refusal]:
    """Every node that a rule refuses, in the order of the file."""
    constants = {tensor.name: tensor for tensor in file.graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in file.graph.node if n.op_type == "Constant" and n.attribute}
    types = {v.name: v.type.tensor_type.elem_type for v in (*file.graph.value_info, *file.graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in file.graph.initializer}
    opset = next((entry.version for entry in file.opset_import if entry.domain in ("", "ai.onnx")), 0)
    found = [Refusal("", "the file", f"it is opset {opset}", OPSET)] if opset not in OPSETS else []
    for node in file.graph.node:
        found += _refused(node, constants, types)
    return found


def _refused(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], types: Mapping[str, int]
) -> Iterator[Refusal]:
    """What is wrong with one node."""
    if node.op_type in NO_OPERATOR:
        yield Refusal(node.name, node.op_type, "not supported", UNSUPPORTED)
    if check := CHECKS.get(node.op_type):
        wrong = check(node, constants, types)
        if wrong is not None:
            yield Refusal(node.name, node.op_type, wrong[0], wrong[1])


Constants = Mapping[str, onnx.TensorProto]
Check = Callable[[onnx.NodeProto, Constants, Mapping[str, int]], tuple[str, Rule] | None]


def _reduction(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    given = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
    return None if given == "none" else (f"its reduction is {given}", REDUCTION)


def _top_k(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    known = constants.get(node.input[1])
    if known is None:
        return "how many is not a constant", CONSTANT
    count = int(onnx.numpy_helper.to_array(known).reshape(-1)[0])
    return (f"it asks for {count}", TOP_K) if count > LARGEST_K else None


def _nonzero(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    return "not supported", NONZERO


def _attention(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    return ("its input is float32", ATTENTION) if types.get(node.input[0]) == onnx.TensorProto.FLOAT else None


def _constant_axes(node: onnx.NodeProto, constants: Constants, types: Mapping[str, int]) -> tuple[str, Rule] | None:
    places = (3,) if node.op_type == "Slice" else (1,)
    for place in places:
        if len(node.input) > place and node.input[place] and node.input[place] not in constants:
            return f"its axes, {node.input[place]}, are not a constant", CONSTANT
    return None


CHECKS: Mapping[str, Check] = {
    "ScatterElements": _reduction,
    "ScatterND": _reduction,
    "TopK": _top_k,
    "NonZero": _nonzero,
    "Attention": _attention,
    **dict.fromkeys(("Slice", "Squeeze", "Unsqueeze", "ReduceMean", "ReduceSum", "ReduceMax"), _constant_axes),
}
