"""Maps tensors of a captured graph to the state dict of the original class, and back.

Most tensors have one name and one shape in both. Three kinds differ:

- a Conv1d (out, in, k) is a Conv2d (out, in, 1, k) in the graph (mpcompile/frontend/conv1d.py);
- `in_proj_weight` and `in_proj_bias` of nn.MultiheadAttention are the weights and biases of Linear layers
  (mpcompile/frontend/multihead_attention.py): one `in_proj`, or several, each with some of the rows;
- `q_proj_weight`, `k_proj_weight` and `v_proj_weight` are those of the Linear layers q_proj, k_proj and v_proj.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# The Linear layers that hold the rows of `in_proj_weight`, top to bottom: query, key and value of the same size each.
PACKED = (
    ("in_proj",),
    ("in_proj_q", "in_proj_kv"),
    ("in_proj_qk", "in_proj_v"),
    ("in_proj_q", "in_proj_k", "in_proj_v"),
)
SEPARATE = ("q_proj", "k_proj", "v_proj")  # their biases are packed in `in_proj_bias`


def stored_tensor(name: str, graph: Mapping[str, Tensor], shape: torch.Size) -> tuple[Tensor | None, tuple[str, ...]]:
    """A tensor of the original class from those of the graph, and the names of the graph's tensors that it holds.

    None if the graph does not have it. `name` and `shape` are those of the original class.
    """
    for parts in ((name,), *_parts(name)):
        if all(part in graph for part in parts):
            values = [graph[part] for part in parts]
            value = values[0] if len(values) == 1 else torch.cat(values)
            conv1d = value.ndim == 4 and len(shape) == 3 and value.numel() == shape.numel()
            return (value.reshape(shape) if conv1d else value), parts
    return None, ()


def _parts(name: str) -> list[tuple[str, ...]]:
    """The names that the rows of a tensor of nn.MultiheadAttention may have in a graph, top to bottom."""
    owner, _, field = name.rpartition(".")
    prefix = f"{owner}." if owner else ""
    if field in ("in_proj_weight", "in_proj_bias"):
        end = field.removeprefix("in_proj_")
        layers = [*PACKED, SEPARATE] if end == "bias" else PACKED
        return [tuple(f"{prefix}{layer}.{end}" for layer in row) for row in layers]
    if field in tuple(f"{layer}_weight" for layer in SEPARATE):
        return [(f"{prefix}{field.removesuffix('_weight')}.weight",)]
    return []


def layer_weight(name: str, stored: Mapping[str, Tensor]) -> Tensor | None:
    """The weight of a layer of the graph from tensors under the names of the original class; None if they lack it.

    It has the shape of the original class: three axes if the layer is a Conv1d there.
    """
    if f"{name}.weight" in stored:
        return stored[f"{name}.weight"]
    if f"{name}_weight" in stored:  # in_proj, q_proj, k_proj, v_proj
        return stored[f"{name}_weight"]
    owner, _, layer = name.rpartition(".")
    packed = stored.get(f"{owner}.in_proj_weight" if owner else "in_proj_weight")
    letters = layer.removeprefix("in_proj_")
    if packed is None or layer == letters or letters not in "qkv":
        return None
    rows = len(packed) // 3
    first = "qkv".index(letters)
    return packed[rows * first : rows * (first + len(letters))]


def two_dimensional(tensor: Tensor) -> Tensor:
    """The weight or mask of a Conv1d (out, in, k) as that of its Conv2d (out, in, 1, k); any other unchanged."""
    return tensor.unsqueeze(2) if tensor.ndim == 3 else tensor
