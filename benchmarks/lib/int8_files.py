"""The int8 files of a whole model that benchmarks compare: ours, ONNX Runtime's, and one in standard operators."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lib.nearest_int8 import quantised
from mpcompile.runtimes.native import attention_match, int8_rewrite
from mpcompile.runtimes.native.attention_match import FileAttention
from mpcompile.runtimes.native.custom_op import initializer
from mpcompile.runtimes.native.int8_selection import inspected, runner
from mpcompile.runtimes.ort.int8 import quantise_dynamic

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Int8Stages:
    """Our int8 file of a model, and the files on the way to it: each takes over more operators.

    Attributes:
        standard: QuantizeLinear and DequantizeLinear around each product; no native operator.
        linear: products on our kernel, with the GELU, the residual or the quantisation after them.
        norms: also LayerNorms that store 8 bits.
        whole: also each attention as one operator.
        attentions: how many attentions were found in the file.
    """

    standard: onnx.ModelProto
    linear: onnx.ModelProto
    norms: onnx.ModelProto
    whole: onnx.ModelProto
    attentions: int


def int8_stages(
    file: onnx.ModelProto, images: NDArray[np.float32], layers: Collection[str], saturating: bool
) -> Int8Stages:
    """Returns our int8 files of a float32 file, quantised on at least 2 images. Raises SystemExit if none runs."""
    standard = quantised(file, images, layers, saturating)
    found = inspected(standard, images)
    if len(found.products) != len(layers):
        raise SystemExit(f"{len(found.products)} of {len(layers)} layers can run on the int8 kernel")
    return Int8Stages(
        standard,
        int8_rewrite.replace(standard, found.products, found.shapes, norms=False),
        int8_rewrite.replace(standard, found.products, found.shapes),
        int8_rewrite.replace(standard, found.products, found.shapes, found.attentions),
        len(found.attentions),
    )


def with_multi_head_attention(file: onnx.ModelProto, images: NDArray[np.float32]) -> onnx.ModelProto:
    """Returns a float32 file with each attention as ONNX Runtime's MultiHeadAttention.

    onnxruntime.transformers finds none in these files. Raises SystemExit if there is no attention that can be replaced.
    """
    found = attention_match.find(file, runner(file, images))
    model = ir.from_proto(file)
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    for index, attention in enumerate(found):
        _replace_attention(model.graph, values, attention, index)
    if not found:
        raise SystemExit("no attention was found")
    ir.passes.common.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    return ir.to_proto(model)


def _replace_attention(graph: ir.Graph, values: dict[str, ir.Value], attention: FileAttention, index: int) -> None:
    """Replaces one attention whose q, k and v are the thirds of one tensor."""
    width = attention.heads * attention.dim
    if len(set(attention.sources)) > 1 or attention.offsets != (0, width, 2 * width) or attention.bias is not None:
        raise SystemExit(f"{attention.y}: q, k and v are not thirds of one tensor, or the scores have a bias")
    sizes = initializer(f"attention.{index}.sizes", np.full(3, width, np.int64))
    graph.register_initializer(sizes)
    output = values[attention.y]
    last = output.producer()
    assert last is not None
    split = ir.node("Split", [values[attention.sources[0]], sizes], {"axis": -1}, num_outputs=3)
    given = {"num_heads": attention.heads, "scale": attention.scale}
    whole = ir.node("MultiHeadAttention", split.outputs, given, domain=CONTRIB, name=f"attention.{index}")
    split.name = f"attention.{index}.split"
    graph.insert_before(last, split)
    ir.convenience.replace_nodes_and_values(graph, last, [last], [whole], [output], whole.outputs)
    values[attention.y] = whole.outputs[0]


def onnx_runtime_files(
    whole: Path, standard: onnx.ModelProto, images: NDArray[np.float32], folder: Path, saturating: bool
) -> dict[str, Path]:
    """Writes dense int8 files for ONNX Runtime into a folder, and returns them by name: the fastest is the baseline.

    All take any batch size. With a fixed one, ONNX Runtime joins MatMul and Add to a Gemm in float32, and the products
    of the static files would not run in 8 bits.

    Args:
        whole: the float32 file.
        standard: the quantised file.
        images: 2 images, to find attentions with.
        folder: where the files are written.
        saturating: whether u8 × s8 products saturate; dynamic weights then have 7 bits.
    """
    attention = folder / "attention.onnx"
    onnx.save_model(with_multi_head_attention(onnx.load(whole), images), attention)
    names = ("dynamic", "dynamic, MultiHeadAttention", "static", "static, MultiHeadAttention")
    files = {name: folder / f"{name.replace(', ', '_')}.onnx" for name in names}
    for name, source in zip(names, (whole, attention), strict=False):
        quantise_dynamic(source, files[name], saturating)
    onnx.save_model(standard, files["static"])
    onnx.save_model(with_multi_head_attention(standard, images), files["static, MultiHeadAttention"])
    return files
