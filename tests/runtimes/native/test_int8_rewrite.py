"""Random files with 8-bit products: the native operators compute the same, and are put only where they may be."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_models import SCALE, Graph, native_operators, rewritten, run
from native_models import built_library
from numpy.typing import NDArray
from onnx import TensorProto, helper


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@dataclass(frozen=True)
class Step:
    """One u8 tensor and the product that reads it, with what follows the product.

    Attributes:
        normed: whether a LayerNormalization stands before the u8 tensor.
        readers: products that read the u8 tensor; the results of the others are outputs.
        activation: after the product, or None.
        hidden: whether the result is quantised for a second product.
        residual: what is added: `same` is the input of the step, `broadcast` its mean over the tokens.
        exposed: whether the product's result is an output as well, so that nothing after it can be taken over.
    """

    normed: bool
    readers: int
    kinds: tuple[str, str]
    keep: int
    activation: str | None
    hidden: bool
    residual: str | None
    exposed: bool


@st.composite
def chains(draw: st.DrawFn) -> tuple[Graph, onnx.ModelProto, NDArray[np.float32]]:
    """Draws a graph, its file, and two images."""
    flat = draw(st.booleans())  # Gemm takes matrices only
    kinds = st.sampled_from(("gemm", "gemm transposed", "matmul bias", "matmul") if flat else ("matmul", "matmul bias"))
    steps = st.builds(
        Step,
        normed=st.booleans(),
        readers=st.sampled_from((1, 1, 2)),
        kinds=st.tuples(kinds, kinds),
        keep=st.sampled_from((4, 8, 16)),
        activation=st.sampled_from((None, "Relu", "Gelu", "GeluTanh")),
        hidden=st.booleans(),
        residual=st.sampled_from((None, "same", "broadcast")),
        exposed=st.sampled_from((False, False, False, True)),
    )
    columns, seed = draw(st.sampled_from((16, 20, 48, 70))), draw(st.integers(0, 2**32))
    graph = Graph(seed)
    h = graph.op("Neg", ["x"])  # shapes are known of computed tensors
    drawn = draw(st.lists(steps, min_size=1, max_size=3))
    for step, after in zip(drawn, [*drawn[1:], None], strict=True):
        h = add_step(graph, h, columns, step, after is None or not (after.normed or after.residual))
    graph.output(graph.quantize(h), TensorProto.UINT8)
    shape = (6, columns) if flat else (2, 3, columns)
    free: tuple[int | str, ...] = ("batch", *shape[1:]) if draw(st.booleans()) else shape
    return graph, graph.file(free), graph.rng.standard_normal(shape).astype(np.float32)


def add_step(graph: Graph, x: str, columns: int, step: Step, quantized: bool) -> str:
    """Adds one step, counts the native operators that it must get, and returns its result.

    `quantized`: the only reader of the result is a QuantizeLinear.
    """
    u8 = graph.quantize(graph.norm(x, columns) if step.normed else x)
    graph.native.update(["LayerNormQuantize"] * step.normed)
    inputs = graph.dequantize(u8)
    for _ in range(step.readers - 1):
        # one DequantizeLinear for all readers, or one for each
        other = graph.dequantize(u8) if graph.rng.random() < 0.5 else inputs
        graph.output(graph.product(other, columns, 12, step.kinds[1], step.keep))
        graph.native["NMGemmInt8"] += 1
    rows = 36 if step.hidden else columns
    y = graph.product(inputs, columns, rows, step.kinds[0], step.keep)
    if step.exposed:
        graph.output(y)
    taken_over = not step.exposed
    activation = step.activation if step.hidden else None
    if step.hidden:
        if activation is not None:
            approximate = "tanh" if activation == "GeluTanh" else "none"
            given = {} if activation == "Relu" else {"approximate": approximate}
            y = graph.op("Relu" if activation == "Relu" else "Gelu", [y], **given)
        u8 = graph.quantize(y)
        graph.native[f"NMGemmInt8{activation or ''}Quantize" if taken_over else "NMGemmInt8"] += 1
        y = graph.product(graph.dequantize(u8), rows, columns, step.kinds[1], step.keep)
        taken_over = True
    if step.residual is not None:
        other = x if step.residual == "same" else graph.op("ReduceMean", [x, graph.ints(-2)], keepdims=1)
        pair = [y, other] if graph.rng.random() < 0.5 else [other, y]
        y = graph.op("Add", pair)
    adds, quantizes = step.residual == "same", step.residual is None and quantized
    graph.native[f"NMGemmInt8{('Add' * adds + 'Quantize' * quantizes) * taken_over}"] += 1
    return y


@settings(max_examples=60)
@given(chain=chains())
def test_chains(library: Path, chain: tuple[Graph, onnx.ModelProto, NDArray[np.float32]]) -> None:
    graph, file, x = chain
    before = file.SerializeToString(deterministic=True)
    changed = rewritten(file, x)
    assert file.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(changed, full_check=True)
    assert native_operators(changed) == graph.native
    compare(file, changed, x, library)


def compare(file: onnx.ModelProto, changed: onnx.ModelProto, x: NDArray[np.float32], library: Path) -> None:
    """Compares a file with its native one, run natively and by its functions.

    A value at a tie may be rounded to the next byte. It moves a result by at most one quantum, as the products' gains
    are about 1 / 8 for all inputs together. Ties are rare.
    """
    wanted = run(file, x)
    for results in (run(changed, x, library, as_written=False), run(changed, x)):
        for found, right in zip(results, wanted, strict=True):
            assert found.dtype == right.dtype
            assert found.shape == right.shape
            quantum = 1 if right.dtype == np.uint8 else SCALE
            distance = np.abs(found.astype(np.float64) - right.astype(np.float64))
            assert distance.max(initial=0) <= quantum
            assert np.mean(distance > quantum / 2) < 0.05


@dataclass(frozen=True)
class Writing:
    """One of the ways in which exporters write an attention.

    Attributes:
        parts: how q, k and v come from the products: three `products`, or one whose result is cut by `slice`, `split`,
            or `reshape` to five dimensions.
        scaled: what is multiplied: the `scores`, `q`, `both` q and k, or the scores are `divided`.
        turned: whether k is split into heads like q and v, and then transposed.
        bias: what is added to the scores, by its dimensions, or None.
        quantized: whether the result goes to a product, rather than out.
        queries: the tokens of q that are kept, from the first to before the last; None for all.
    """

    parts: str
    scaled: str
    turned: bool
    bias: str | None
    quantized: bool
    queries: tuple[int, int] | None = None

    @property
    def query_count(self) -> int:
        """The number of tokens of q."""
        return TOKENS if self.queries is None else self.queries[1] - self.queries[0]


WRITINGS = st.builds(
    Writing,
    parts=st.sampled_from(("products", "slice", "split", "reshape")),
    scaled=st.sampled_from(("scores", "q", "both", "divided")),
    turned=st.booleans(),
    bias=st.sampled_from((None, None, "hnn", "nn", "1n", "computed")),
    quantized=st.booleans(),
    queries=st.sampled_from((None, (0, 1), (2, 4))),
)
HEADS, DIM, TOKENS = 3, 8, 5
WIDTH = HEADS * DIM


def add_attention(graph: Graph, x: str, writing: Writing, interleaved: bool = False) -> str:
    """Adds an attention over x (images, TOKENS, WIDTH) and returns its result, of the same shape.

    `interleaved`: the channels of one head's q, k and v lie together, which the native operator cannot read.
    """
    u8 = graph.dequantize(graph.quantize(x))
    q, k, v = heads_of(graph, u8, writing, interleaved)
    if writing.queries is not None:
        q = graph.op("Slice", [q, *(graph.ints(token) for token in writing.queries), graph.ints(2)])
    factor = np.float32(DIM**-0.5)
    if writing.scaled == "q":
        q = graph.op("Mul", [q, graph.store("factor", factor)])
    if writing.scaled == "both":
        root = graph.store("root", np.sqrt(factor))
        q, k = graph.op("Mul", [q, root]), graph.op("Mul", [root, k])
    scores = graph.op("MatMul", [q, k])
    if writing.scaled == "scores":
        scores = graph.op("Mul", [scores, graph.store("factor", factor)])
    if writing.scaled == "divided":
        scores = graph.op("Div", [scores, graph.store("factor", 1 / factor)])
    if writing.bias == "computed":  # of an image's own
        mean = graph.op("ReduceMean", [x, graph.ints(-1)], keepdims=0)
        scores = graph.op("Add", [scores, graph.op("Unsqueeze", [mean, graph.ints(1, 2)])])
    elif writing.bias is not None:
        queries = writing.query_count
        shape = {"hnn": (HEADS, queries, TOKENS), "nn": (queries, TOKENS), "1n": (1, TOKENS)}[writing.bias]
        scores = graph.op("Add", [graph.floats(*shape), scores])
    mixed = graph.op("MatMul", [graph.op("Softmax", [scores], axis=-1), v])
    turned = graph.op("Transpose", [mixed], perm=[0, 2, 1, 3])
    return graph.op("Reshape", [turned, graph.ints(0, 0, WIDTH)])


def heads_of(graph: Graph, x: str, writing: Writing, interleaved: bool) -> list[str]:
    """Returns q and v as (images, HEADS, TOKENS, DIM), and k as (images, HEADS, DIM, TOKENS)."""
    parts, turned = writing.parts, [0, 1, 3, 2]
    if parts == "products":
        flat = [graph.product(x, WIDTH, WIDTH, "matmul bias") for _ in range(3)]
    else:
        fused = graph.product(x, WIDTH, 3 * WIDTH, "matmul bias")
        if parts == "reshape":
            order, perm = ((HEADS, 3), (3, 0, 2, 1, 4)) if interleaved else ((3, HEADS), (2, 0, 3, 1, 4))
            five = graph.op("Transpose", [graph.op("Reshape", [fused, graph.ints(0, 0, *order, DIM)])], perm=perm)
            q, k, v = (graph.op("Gather", [five, graph.store(f"part{i}", np.int64(i))], axis=0) for i in range(3))
            return [q, graph.op("Transpose", [k], perm=turned), v]
        bounds = [(graph.ints(i * WIDTH), graph.ints((i + 1) * WIDTH), graph.ints(2)) for i in range(3)]
        if parts == "slice":
            flat = [graph.op("Slice", [fused, *bound]) for bound in bounds]
        else:
            flat = [f"part{i}" for i in range(3)]
            graph.nodes.append(helper.make_node("Split", [fused], flat, axis=2, num_outputs=3, name="split"))
    split = graph.ints(0, 0, HEADS, DIM)
    q, k, v = (graph.op("Reshape", [part, split]) for part in flat)
    q, v = (graph.op("Transpose", [part], perm=[0, 2, 1, 3]) for part in (q, v))
    if not writing.turned:
        return [q, graph.op("Transpose", [k], perm=[0, 2, 3, 1]), v]
    return [q, graph.op("Transpose", [graph.op("Transpose", [k], perm=[0, 2, 1, 3])], perm=turned), v]


def attention_file(writing: Writing, seed: int, interleaved: bool = False) -> tuple[Graph, onnx.ModelProto]:
    """Returns a file of one attention, with a LayerNormalization before and perhaps a product after."""
    graph = Graph(seed)
    y = add_attention(graph, graph.norm("x", WIDTH), writing, interleaved)
    if writing.quantized:
        y = graph.product(graph.dequantize(graph.quantize(y)), WIDTH, WIDTH, "matmul bias")
    graph.output(y)
    return graph, graph.file(("batch", TOKENS, WIDTH))


@settings(max_examples=40)
@given(writing=WRITINGS, seed=st.integers(0, 2**32))
def test_attentions(library: Path, writing: Writing, seed: int) -> None:
    graph, file = attention_file(writing, seed)
    x = graph.rng.standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    changed = rewritten(file, x)
    onnx.checker.check_model(changed, full_check=True)
    op = f"{'Biased' * (writing.bias is not None)}Attention{'Quantize' * writing.quantized}"
    products = (3 if writing.parts == "products" else 1) + writing.quantized
    # The bias that is computed from the normalised tensor is a second reader of it.
    wanted = Counter({op: 1, "NMGemmInt8": products, "LayerNormQuantize": int(writing.bias != "computed")})
    assert native_operators(changed) == +wanted
    assert not [node for node in changed.graph.node if node.op_type == "Softmax"]
    compare(file, changed, x, library)
    more = graph.rng.standard_normal((5, TOKENS, WIDTH)).astype(np.float32)
    compare(file, changed, more, library)


@settings(max_examples=10)
@given(writing=WRITINGS, seed=st.integers(0, 2**32))
def test_heads_whose_channels_are_interleaved_are_left(writing: Writing, seed: int) -> None:
    graph, file = attention_file(replace(writing, parts="reshape"), seed, interleaved=True)
    changed = rewritten(file, graph.rng.standard_normal((2, TOKENS, WIDTH)).astype(np.float32))
    assert not {name for name in native_operators(changed) if "Attention" in name}
