"""Native convolutions equal torch's in float64, in the native operator, in its fallback, and in whole files."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conv_graphs import CONV, NODE, SHAPE, graph
from hypothesis import given, settings
from hypothesis import strategies as st
from native_models import Array, built_library, masked, masked_file
from torch import nn

from mpcompile.export.mask_check import ProvenMask, file_weights
from mpcompile.frontend.capture import capture
from mpcompile.ir.pattern import NM
from mpcompile.ir.source import Source
from mpcompile.runtimes.native.conv_op import ACTIVATIONS, RESIDUAL, Convolution, Window, weight_of
from mpcompile.runtimes.native.microbenchmark import native_node
from mpcompile.runtimes.native.onnx_rewrite import MaskedGemm, find
from mpcompile.runtimes.native.onnx_rewrite import replace as with_native
from mpcompile.runtimes.native.packing import pack


@pytest.fixture(scope="session")
def library() -> Path:
    return built_library()


@dataclass(frozen=True)
class Case:
    """A convolution, and its input."""

    product: MaskedGemm
    x: Array
    residual: Array | None

    @property
    def file(self) -> onnx.ModelProto:
        """The convolution as a file of one native node."""
        return native_node(self.product, pack(self.product.weight, self.product.pattern.of))

    def expected(self) -> tuple[Array, Array]:
        """Returns the result in float64, and the sum of the absolute values of its terms."""
        done = self.product.convolution
        assert done is not None
        weight, bias = (
            torch.from_numpy(weight_of(self.product.weight, done.window)),
            torch.from_numpy(self.product.bias),
        )
        top, left, bottom, right = done.window.pads
        x = nn.functional.pad(torch.from_numpy(self.x).double(), (left, right, top, bottom))
        strides, dilations = done.window.strides, done.window.dilations
        weight, bias = weight.double(), bias.double()
        y = nn.functional.conv2d(x, weight, bias, stride=strides, dilation=dilations)
        size = nn.functional.conv2d(x.abs(), weight.abs(), bias.abs(), stride=strides, dilation=dilations)
        if self.residual is not None:
            residual = torch.from_numpy(self.residual)
            y, size = y + residual, size + residual.abs()
        if done.activation:
            y = y.clamp(0, 6 if done.activation == "Relu6" else None)
        return y.numpy(), size.numpy()


@dataclass(frozen=True)
class Shape:
    """What is drawn for a Case, which is made outside of hypothesis: its type checks read random numbers."""

    window: Window
    channels: int
    rows: int
    keep: int
    of: int
    sharing: int
    images: int
    height: int
    width: int
    activation: str
    residual: bool
    seed: int

    def case(self) -> Case:
        """Returns the convolution with random numbers."""
        rng, window = np.random.default_rng(self.seed), self.window
        convolution = Convolution(window, self.activation, RESIDUAL if self.residual else None)
        columns = self.channels * window.kernel[0] * window.kernel[1]
        weight = masked(rng, self.rows, columns, self.keep, self.of, self.sharing)
        bias = rng.standard_normal(self.rows, dtype=np.float32)
        pattern = NM(self.keep, self.of)
        product = MaskedGemm(("l",), "n", convolution.op, "x", "y", ("y",), "w", pattern, weight, bias, convolution)
        x = rng.standard_normal((self.images, self.channels, self.height, self.width), dtype=np.float32)
        y = (self.images, self.rows, *window.outputs(self.height, self.width))
        return Case(product, x, rng.standard_normal(y, dtype=np.float32) if self.residual else None)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    strides = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilations = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pads = draw(st.tuples(*[st.integers(0, 4)] * 4))
    window = draw(st.sampled_from((Window(kernel, strides, pads, dilations), Window(kernel), Window())))
    least = [max(1, d * (k - 1) + 1) for d, k in zip(window.dilations, window.kernel, strict=True)]
    of, sharing = draw(st.sampled_from((4, 8, 16, 5))), draw(st.sampled_from((1, 2, 4)))
    return Shape(
        window,
        channels=of * draw(st.integers(1, 4)),
        rows=sharing * draw(st.integers(1, 40 // sharing)),
        keep=draw(st.integers(1, of - 1)),
        of=of,
        sharing=sharing,
        images=draw(st.integers(1, 3)),
        height=draw(st.integers(least[0], least[0] + 30)),
        width=draw(st.integers(least[1], least[1] + 30)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def run(file: onnx.ModelProto, library: Path | None, case: Case, threads: int = 1, calls: int = 1) -> list[Array]:
    """Returns the results of several calls of one session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {"x": case.x} | ({} if case.residual is None else {RESIDUAL: case.residual})
    return [session.run(None, given)[0] for _ in range(calls)]


@given(shapes())
@settings(max_examples=150)
def test_equal_to_torch_in_float64_for_any_shape(library: Path, shape: Shape) -> None:
    case = shape.case()
    file = case.file
    expected, size = case.expected()
    # Every multiplication and addition rounds by at most 2^-24 of the sum of absolute values.
    bound = (case.product.weight.shape[1] + 4) * 2.0**-24 * size
    for used in (library, None):
        [found] = run(file, used, case)
        assert found.shape == expected.shape
        assert (np.abs(found - expected) <= bound).all()


@pytest.mark.parametrize("size", [1, 7, 14, 33])
@pytest.mark.parametrize("sharing", [1, 4])
def test_threads_change_no_bit(library: Path, size: int, sharing: int) -> None:
    rng = np.random.default_rng(0)
    convolution = Convolution(Window((3, 3), pads=(1, 1, 1, 1)), "Relu", RESIDUAL)
    weight, bias = masked(rng, 300, 9 * 32, 2, 4, sharing), rng.standard_normal(300, dtype=np.float32)
    product = MaskedGemm(("l",), "n", convolution.op, "x", "y", ("y",), "w", NM(2, 4), weight, bias, convolution)
    x, residual = (rng.standard_normal((2, count, size, size), dtype=np.float32) for count in (32, 300))
    case = Case(product, x, residual)
    file = case.file
    [one] = run(file, library, case)
    for threads in (1, 2, 3, 8):
        for found in run(file, library, case, threads, calls=6):  # work is divided otherwise after some calls
            np.testing.assert_array_equal(found, one)


def test_special_values_reach_only_what_reads_them(library: Path) -> None:
    """A padded or pruned position does not multiply: 0 · inf would be NaN. NaN passes the activation."""
    weight = np.zeros((4, 9 * 4), np.float32)
    weight[:, 4 * 4] = 1  # the middle tap of channel 0
    convolution = Convolution(Window((3, 3), pads=(1, 1, 1, 1)), "Relu6")
    product = MaskedGemm(
        ("l",), "n", convolution.op, "x", "y", ("y",), "w", NM(1, 4), weight, np.zeros(4, np.float32), convolution
    )
    x = np.full((1, 4, 9, 9), np.inf, np.float32)
    x[0, 0] = np.linspace(-1, 8, 81).reshape(9, 9)
    x[0, 0, 3, 3] = np.nan
    [found] = run(Case(product, x, None).file, library, Case(product, x, None))
    np.testing.assert_array_equal(found[0, 0], np.clip(x[0, 0], 0, 6))


class Block(nn.Module):
    """A residual block with a strided branch."""

    def __init__(self, channels: int, out: int, stride: int, last: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.second(self.first(x).relu()) + self.skip(x))
        return result


@pytest.mark.parametrize("batch", [None, 3])
def test_a_residual_network_with_everything_fused(library: Path, tmp_path: Path, batch: int | None) -> None:
    torch.manual_seed(0)
    blocks = [Block(8, 8, 1, nn.ReLU()), Block(8, 16, 2, nn.ReLU6()), Block(16, 16, 1, nn.Identity())]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    model = capture(net.eval(), Source("net", "", "net"), torch.randn(1, 3, 12, 12))
    made = masked_file(model, tmp_path, batch)
    file = onnx.load(made.onnx)
    products, refused = find(file, made.masks)
    assert refused == []
    assert sorted(product.op for product in products if product.convolution) == sorted(
        [
            "NMConv2dRelu",
            "NMConv2dAddRelu",
            "NMConv2dRelu",
            "NMConv2dAddRelu6",
            "NMConv2d",
            "NMConv2dRelu",
            "NMConv2dAdd",
        ]
    )
    changed = with_native(file, products)
    onnx.checker.check_model(changed, full_check=True)
    assert not {"Conv", "Relu", "Clip", "Add"} & {node.op_type for node in changed.graph.node[1:]}
    # The native file's fallback holds weights that are proven in the dense one.
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        dense = made.model.graph(x).numpy()
    case = Case(products[0], x.numpy(), None)
    for used in (library, None):
        name = changed.graph.input[0].name
        renamed = onnx.ModelProto()
        renamed.CopyFrom(changed)
        for node in renamed.graph.node:
            for i, value in enumerate(node.input):
                if value == name:
                    node.input[i] = "x"
        renamed.graph.input[0].name = "x"
        [found] = run(renamed, used, case, threads=2)
        np.testing.assert_allclose(found, dense, rtol=0, atol=2e-5 * np.abs(dense).max())


@pytest.mark.parametrize(
    ("nodes", "other", "op"),
    [
        ([NODE("Relu", ["c"], ["y"])], SHAPE, "NMConv2dRelu"),
        ([NODE("Clip", ["c", "zero", "six"], ["y"])], SHAPE, "NMConv2dRelu6"),
        ([NODE("Clip", ["c", "zero", "five"], ["y"])], SHAPE, "NMConv2d"),
        ([NODE("Clip", ["c", "zero"], ["y"])], SHAPE, "NMConv2d"),
        ([NODE("Add", ["c", "r"], ["y"])], SHAPE, "NMConv2dAdd"),
        ([NODE("Add", ["r", "c"], ["d"]), NODE("Relu", ["d"], ["y"])], SHAPE, "NMConv2dAddRelu"),
        ([NODE("Relu", ["c"], ["d"]), NODE("Add", ["d", "r"], ["y"])], SHAPE, "NMConv2dRelu"),
        ([NODE("Add", ["c", "r"], ["y"])], [2, 4, 1, 1], "NMConv2d"),  # broadcast
        ([NODE("Add", ["c", "c"], ["y"])], SHAPE, "NMConv2d"),
        ([NODE("Relu", ["c"], ["d"]), NODE("Add", ["d", "c"], ["y"])], SHAPE, "NMConv2d"),  # two readers
        ([NODE("Sigmoid", ["c"], ["y"])], SHAPE, "NMConv2d"),
    ],
)
def test_what_follows_a_convolution_is_fused_only_if_the_operator_can(
    library: Path, nodes: list[onnx.NodeProto], other: list[int], op: str
) -> None:
    rng = np.random.default_rng(0)
    weight = weight_of(masked(rng, 4, 36, 2, 4), Window((3, 3)))
    names = ("c", "d", "y") if any("d" in node.output for node in nodes) else ("c", "y")
    file = graph([CONV, *nodes], weight, {"x": SHAPE, "r": other, **dict.fromkeys(names, SHAPE)})
    onnx.checker.check_model(file, full_check=True)
    [found] = file_weights(file)
    mask = ProvenMask("layer", "w", ("n",), "Conv", found.axis, "2:4", 4, 0, weight.size)
    [product], refused = find(file, [mask])
    assert (product.op, refused) == (op, [])
    changed = with_native(file, [product])
    given = {"x": rng.standard_normal(SHAPE, dtype=np.float32), "r": rng.standard_normal(other, dtype=np.float32)}
    results = []
    for made, used in ((file, None), (changed, library), (changed, None)):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if used:
            options.register_custom_ops_library(str(used))
        session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results.append(session.run(None, given)[0])
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("added", "after"),
    [(RESIDUAL, []), (RESIDUAL, [NODE("Mul", ["d", "s"], ["y"])]), ("x", [])],
    ids=["nothing else reads it", "read later", "the convolution's own input"],
)
def test_a_residual_whose_memory_may_be_reused_is_read_first(
    library: Path, added: str, after: list[onnx.NodeProto]
) -> None:
    rng = np.random.default_rng(0)
    shape, size = [2, 4, 19, 19], 3  # several tiles of tokens, which end within a row
    weight = weight_of(masked(rng, 4, 4 * size * size, 2, 4), Window((size, size)))
    nodes = [
        NODE("Abs", [added], ["s"]),
        NODE("Conv", ["s" if added == "x" else "x", "w"], ["c"], name="n", pads=[1, 1, 1, 1]),
        NODE("Add", ["c", "s"], ["d" if after else "y"]),
        *after,
    ]
    file = graph(nodes, weight, dict.fromkeys(("x", RESIDUAL, "s", "c", *["d"] * bool(after), "y"), shape))
    [stored] = file_weights(file)
    [product], _ = find(file, [ProvenMask("layer", "w", ("n",), "Conv", stored.axis, "2:4", 4, 0, weight.size)])
    assert product.op == "NMConv2dAdd"
    x, r = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    case = Case(product, x, r)
    changed = with_native(file, [product])
    [expected] = run(file, None, case)
    for found in run(changed, library, case, threads=2, calls=3):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_products_that_differ_only_in_what_follows_have_operators_of_their_own() -> None:
    plain = Convolution(Window())
    assert plain.op == "NMConv"
    assert replace(plain, activation="Relu").op == "NMConv2dRelu"
    assert replace(plain, residual="r").op == "NMConv2dAdd"
    assert Convolution(Window(strides=(2, 2))).op == "NMConv2d"
