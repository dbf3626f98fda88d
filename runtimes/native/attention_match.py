"""Finds attentions in a file: softmax(q kᵀ · scale + bias) v, with the tensors from which q, k and v are taken.

Exporters write the division into heads in many ways: Reshape, Transpose, Slice, Squeeze, Split, with constant or
computed shapes. All of these only move values. So a candidate is followed through such nodes to the tensor from which
its values come, and what was found is checked on a run of the file: each value of q must be equal to the value of the
source tensor at the place that the native operator reads, for two images. A candidate that fails the check is left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mpcompile.runtimes.native.graph_reading import number, only_reader, producer
from mpcompile.runtimes.native.int8_ops import ALL_QUERIES

# Operators whose results are values of their first input, moved.
MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Split", "Identity", "Gather", "Flatten")
Run = Callable[[Sequence[str]], Mapping[str, NDArray[np.float32]]]  # the values of these tensors, on two images


@dataclass(frozen=True, slots=True)
class FileAttention:
    """An attention of a file.

    Attributes:
        sources: tensors (images, tokens, channels) from which q, k and v are taken; often all the same.
        offsets: the first channel of q, k and v in its source.
        first_query, queries: the tokens of its source that q holds; ALL_QUERIES for all of them.
        heads, dim: the heads lie behind each other, `dim` channels each.
        scale: of the products q kᵀ.
        bias: the tensor that is added to the scaled products, or None.
        y: the result (images, tokens, heads · dim).
    """

    sources: tuple[str, str, str]
    offsets: tuple[int, int, int]
    first_query: int
    queries: int
    heads: int
    dim: int
    scale: float
    bias: str | None
    y: str


@dataclass(frozen=True, slots=True)
class _Described:
    """An attention as the nodes describe it, before its values are checked: names of tensors.

    `q`, `k` and `v` are split into heads, k perhaps transposed; `sources` are what they are taken from; `mixed` is the
    product with v, and `results` the tensors that it is moved to.
    """

    q: str
    k: str
    v: str
    sources: tuple[str, str, str]
    scale: float
    bias: str | None
    scores: str
    mixed: str
    results: tuple[str, ...]

    @property
    def tensors(self) -> set[str]:
        named = {self.q, self.k, self.v, *self.sources, self.scores, self.mixed, *self.results}
        return named | ({self.bias} if self.bias is not None else set())


def find(file: onnx.ModelProto, run: Run) -> list[FileAttention]:
    """Returns the attentions that the native operator can compute, in file order."""
    candidates = [c for node in ir.from_proto(file).graph if (c := _candidate(node)) is not None]
    if not candidates:
        return []
    values = run(sorted(set().union(*(candidate.tensors for candidate in candidates))))
    return [found for candidate in candidates if (found := _checked(candidate, values)) is not None]


def _candidate(softmax: ir.Node) -> _Described | None:
    """Returns the attention around a Softmax, or None."""
    if softmax.op_type != "Softmax" or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    mix = only_reader(softmax.outputs[0])
    if mix is None or mix.op_type != "MatMul" or mix.inputs[0] is not softmax.outputs[0]:
        return None
    scores, scale = _unscaled(softmax.inputs[0])
    bias = None
    add = scores.producer()
    if add is not None and add.op_type == "Add":
        if scale != 1:
            return None
        sides = [(_unscaled(value), other) for value, other in zip(add.inputs, reversed(add.inputs), strict=True)]
        inner = [(found, other) for found, other in sides if producer(found[0], "MatMul") is not None]
        if len(inner) != 1 or inner[0][1] is None:
            return None
        (scores, scale), bias = inner[0]
    product = scores.producer()
    if product is None or product.op_type != "MatMul":
        return None
    (q, q_scale), (k, k_scale) = (_unscaled(value) for value in product.inputs)
    v = mix.inputs[1]
    sources = [_source(value) for value in (q, k, v)]
    if v is None or any(source is None for source in sources):
        return None
    results = _moved(mix.outputs[0])
    if not results:
        return None
    q_name, k_name, v_name = (str(source.name) for source in sources if source is not None)
    return _Described(
        str(q.name), str(k.name), str(v.name), (q_name, k_name, v_name), scale * q_scale * k_scale,
        None if bias is None else str(bias.name), str(scores.name), str(mix.outputs[0].name), results,
    )  # fmt: skip


def _unscaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """Returns the value before multiplications and divisions by one constant number, and their factor."""
    assert value is not None
    factor = 1.0
    while (node := value.producer()) is not None and node.op_type in ("Mul", "Div"):
        numbers = [number(given) for given in node.inputs]
        if node.op_type == "Div" and numbers[1] is not None and node.inputs[0] is not None:
            value, factor = node.inputs[0], factor / numbers[1]
            continue
        if node.op_type == "Mul" and any(one is not None for one in numbers):
            constant = 0 if numbers[0] is not None else 1
            other, found = node.inputs[1 - constant], numbers[constant]
            if other is None or found is None:
                break
            value, factor = other, factor * found
            continue
        break
    return value, factor


def _source(value: ir.Value | None) -> ir.Value | None:
    """Returns the tensor whose values a tensor holds, moved; itself if no node moved it."""
    while value is not None and (node := value.producer()) is not None and node.op_type in MOVES:
        value = node.inputs[0]
    return None if value is None or value.is_initializer() else value


def _moved(value: ir.Value) -> tuple[str, ...]:
    """Returns the tensors that a value is moved to, one after the other, while each has one reader."""
    names = []
    while (node := only_reader(value)) is not None and node.op_type in MOVES:
        value = node.outputs[0]
        names.append(str(value.name))
    return tuple(names)


def _checked(candidate: _Described, values: Mapping[str, NDArray[np.float32]]) -> FileAttention | None:
    """Returns the attention if the values on two images are those that the native operator would read and write."""
    q, mixed, scores = values[candidate.q], values[candidate.mixed], values[candidate.scores]
    if q.ndim != 4 or mixed.ndim != 4 or scores.ndim != 4 or any(values[name].ndim != 3 for name in candidate.sources):
        return None
    heads, dim = q.shape[1], q.shape[3]
    k, v = values[candidate.k], values[candidate.v]
    query_source = values[candidate.sources[0]]
    first = _first_token(q, query_source)
    if first is None:
        return None
    of_queries = query_source[:, first : first + q.shape[2]]
    offsets = []
    for part, source in (
        (q, of_queries),
        (_turned(k, dim), values[candidate.sources[1]]),
        (v, values[candidate.sources[2]]),
    ):
        offset = None if part is None else _offset(part, source)
        if offset is None or part is None or part.shape[1] != heads or part.shape[3] != dim:
            return None
        offsets.append(offset)
    joined = mixed.transpose(0, 2, 1, 3).reshape(mixed.shape[0], mixed.shape[2], -1)
    y = next((name for name in candidate.results if np.array_equal(values[name], joined, equal_nan=True)), None)
    if y is None or (candidate.bias is not None and not _fits(values[candidate.bias].shape, scores.shape)):
        return None
    return FileAttention(
        sources=candidate.sources,
        offsets=(offsets[0], offsets[1], offsets[2]),
        first_query=first,
        queries=ALL_QUERIES if q.shape[2] == query_source.shape[1] else q.shape[2],
        heads=heads,
        dim=dim,
        scale=candidate.scale,
        bias=candidate.bias,
        y=y,
    )


def _first_token(q: NDArray[np.float32], source: NDArray[np.float32]) -> int | None:
    """Returns the token of the source whose channels contain those of the first token of q, or None.

    With as many tokens as the source has, q holds all of them.
    """
    if q.shape[0] != source.shape[0] or q.shape[2] > source.shape[1]:
        return None
    if q.shape[2] == source.shape[1]:
        return 0
    wanted = q[:, :, 0].reshape(len(q), -1)
    starts = range(source.shape[1] - q.shape[2] + 1)
    return next((first for first in starts if np.isin(wanted, source[:, first]).all()), None)


def _fits(bias: tuple[int, ...], scores: tuple[int, ...]) -> bool:
    """Whether a bias has the last dimension of the scores, and each other dimension or 1."""
    return (
        0 < len(bias) <= 4
        and bias[-1] == scores[-1]
        and all(size in (1, wanted) for size, wanted in zip(reversed(bias), reversed(scores), strict=False))
    )


def _turned(k: NDArray[np.float32], dim: int) -> NDArray[np.float32] | None:
    """Returns k as (images, heads, keys, dim), of the right operand of the product with q."""
    return k.transpose(0, 1, 3, 2) if k.ndim == 4 and k.shape[2] == dim else None


def _offset(part: NDArray[np.float32], source: NDArray[np.float32]) -> int | None:
    """Returns the channel of the source at which the heads (images, heads, tokens, dim) begin, or None."""
    images, heads, tokens, dim = part.shape
    if source.shape[:2] != (images, tokens):
        return None
    joined = part.transpose(0, 2, 1, 3).reshape(images, tokens, heads * dim)
    for offset in range(source.shape[2] - heads * dim + 1):
        if np.array_equal(source[0, 0, offset : offset + dim], joined[0, 0, :dim]) and np.array_equal(
            source[:, :, offset : offset + heads * dim], joined
        ):
            return offset
    return None
