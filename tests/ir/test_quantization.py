"""Quantizers: bit for bit what ONNX Runtime computes, a straight-through gradient, and ranges of every kind."""

import copy
import math

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpcompile.errors import PassError
from mpcompile.ir.quantization import LARGEST_END, LARGEST_FP8, RANGE, STORAGE, Quantizer, fake_quantize, quantizers
from mpcompile.ir.structure import structure_of, tensors_of
from mpcompile.testing import tiny_mlp

KINDS = tuple(STORAGE)
ONNX_TYPES = {"u8": TensorProto.UINT8, "s8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
FLOAT32 = torch.finfo(torch.float32)
kinds = pytest.mark.parametrize("kind", KINDS)
numbers = st.floats(-LARGEST_END, LARGEST_END, width=32)


def quantizer(kind: str, low: float, high: float) -> Quantizer:
    made = Quantizer(kind)  # type: ignore[arg-type]
    made.set_range(float(low), float(high))
    return made


def by_onnx_runtime(made: Quantizer, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values x after QuantizeLinear and DequantizeLinear with the quantizer's scale and zero point."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [float(made.scale)]),
        helper.make_tensor("zero", ONNX_TYPES[made.kind], [], [int(made.zero_point.float())]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x)]) for name in "xy"]
    graph = helper.make_graph(nodes, "pair", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps the pair as it is
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return found


@kinds
@pytest.mark.parametrize(
    ("low", "high"), [(-1, 1), (0, 6), (-0.17, 2.5), (-8e37, 8e37), (-1e-35, 1e-36), (-2, 5e30), (-4, 0), (0, 0)]
)
def test_equals_onnx_runtime_bit_for_bit(kind: str, low: float, high: float) -> None:
    made = quantizer(kind, low, high)
    scale = float(made.scale)
    rng = np.random.default_rng(0)
    ties = (np.arange(-400, 400) + 0.5) * scale
    special = [0.0, -0.0, 1e-40, -1e-40, low, high, scale / 2, -scale / 2, math.inf, -math.inf]
    random = rng.normal(size=2000) * scale * 80  # some are outside the range
    with np.errstate(over="ignore"):
        x = np.concatenate([special, ties, random]).astype(np.float32)
    found = made(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(found.view(np.uint32), by_onnx_runtime(made, x).view(np.uint32))


@kinds
def test_fp8_and_integers_saturate_at_their_largest_values(kind: str) -> None:
    made = quantizer(kind, -10, 10)
    low, high = RANGE.get(STORAGE[kind], (-LARGEST_FP8, LARGEST_FP8))
    shift = float(made.zero_point.float())
    found = made(torch.tensor([-1e9, 1e9]))
    assert torch.equal(found, (torch.tensor([low, high]) - shift) * made.scale)


@kinds
@given(low=numbers, high=numbers, share=st.floats(0, 1))
def test_a_value_in_the_range_moves_by_half_a_step_and_zero_not_at_all(
    kind: str, low: float, high: float, share: float
) -> None:
    low, high = min(low, high), max(low, high)
    made = quantizer(kind, low, high)
    scale = float(made.scale)
    assert made.scale.dtype == torch.float32
    assert FLOAT32.tiny <= scale < math.inf
    x = torch.tensor([0.0, low, high, low + share * (high - low)], dtype=torch.float64).float()
    found = made(x)
    assert found[0] == 0
    assert found.isfinite().all()
    # Half a step; at the ends of u8 half a step more, since the zero point is an integer. fp8: 4 significant bits.
    step = {"u8": 1.0, "s8": 0.5, "fp8": 0.5}[kind] * scale
    allowed = torch.maximum(torch.full_like(x, step), x.abs() / 16 if kind == "fp8" else torch.zeros(()))
    # Quotient, product and the scale itself are rounded to float32; 255 steps of it.
    rounding = 4 * FLOAT32.eps * x.abs()
    assert ((found.double() - x.double()).abs() <= allowed.double() + rounding.double()).all()


@kinds
@given(low=numbers, high=numbers)
def test_quantising_twice_changes_nothing_more(kind: str, low: float, high: float) -> None:
    made = quantizer(kind, min(low, high), max(low, high))
    once = made(torch.tensor([low, high, low / 3, high / 7]))
    assert torch.equal(made(once), once)


@pytest.mark.parametrize(
    ("kind", "low", "high", "scale", "zero"),
    [
        ("u8", -1.0, 1.55, 2.55 / 255, 100),
        ("u8", 0.0, 255.0, 1.0, 0),
        ("u8", -255.0, 0.0, 1.0, 255),
        ("u8", 3.0, 5.0, 5 / 255, 0),  # zero is always inside
        ("u8", -5.0, -3.0, 5 / 255, 255),
        ("s8", -127.0, 3.0, 1.0, 0),
        ("s8", 3.0, 254.0, 2.0, 0),
        ("fp8", -448.0, 1.0, 1.0, 0),
        *((kind, value, value, 1.0, 0) for kind in KINDS for value in (0.0, -0.0, 1e-42, -1e-42)),
    ],
)
def test_ranges(kind: str, low: float, high: float, scale: float, zero: int) -> None:
    made = quantizer(kind, low, high)
    assert made.scale == torch.tensor(scale)  # float32
    assert made.zero_point.dtype == STORAGE[kind]
    assert float(made.zero_point.float()) == zero
    assert made.calibrated


@kinds
@pytest.mark.parametrize(
    ("low", "high"), [(math.nan, 1), (0, math.nan), (-math.inf, 1), (0, math.inf), (0, 3e38), (-1e300, 0)]
)
def test_a_range_that_float32_cannot_hold_is_refused(kind: str, low: float, high: float) -> None:
    made = Quantizer(kind)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="an activation ranges from .* to .*; 8 bits need finite values up to 8.5e"):
        made.set_range(float(low), float(high))
    assert not made.calibrated


@kinds
def test_the_gradient_is_straight_through(kind: str) -> None:
    made = quantizer(kind, -1, 1)
    x = torch.linspace(-3, 3, 50, requires_grad=True)  # also outside the range
    weight = torch.randn(50)
    (made(x) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("kind", ["u8", "s8"])  # opcheck itself multiplies, which torch cannot in fp8
def test_the_operator_is_well_formed(kind: str) -> None:
    made = quantizer(kind, -1, 1)
    torch.library.opcheck(
        fake_quantize, (torch.randn(5), made.scale, made.zero_point), test_utils=("test_schema", "test_faketensor")
    )


@kinds
def test_float64_values_stay_float64(kind: str) -> None:
    made = quantizer(kind, -1, 1)
    x = torch.randn(100, dtype=torch.float64)
    assert made(x).dtype == torch.float64
    # float32 rounds the quotient and the product.
    torch.testing.assert_close(made(x).float(), made(x.float()), rtol=1e-6, atol=float(made.scale) * 1.01)


@kinds
def test_without_a_range_the_input_is_returned(kind: str) -> None:
    x = torch.randn(3)
    assert Quantizer(kind)(x) is x  # type: ignore[arg-type]


@kinds
def test_a_deep_copy_keeps_its_state(kind: str) -> None:
    made = quantizer(kind, -1, 2)
    other = copy.deepcopy(made)
    x = torch.randn(100)
    assert torch.equal(made(x), other(x))
    other.set_range(-9.0, 9.0)
    assert not torch.equal(made(x), other(x))


def test_quantizers_are_part_of_the_hash_of_the_structure() -> None:
    models = [tiny_mlp() for _ in range(2 * len(KINDS))]
    for index, model in enumerate(models):
        kind = KINDS[index // 2]
        model.graph.add_submodule("q", quantizer(kind, -1, 1) if index % 2 else Quantizer(kind))  # type: ignore[arg-type]
    assert len({structure_of(model) for model in models}) == len(models)
    assert [*quantizers(models[0].graph)] == ["q"]
    assert {"weight/q.scale", "weight/q.zero_point"} <= tensors_of(models[0]).keys()
    assert quantizers(tiny_mlp().graph) == {}
