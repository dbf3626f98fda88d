"""The rules on QuantizeLinear and DequantizeLinear, and on the ends of sparse int8 products."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from quantized_models import normalized, quantised_by_hand

from mpcompile.data.images import Data
from mpcompile.errors import BuildError
from mpcompile.export.eight_bit_ends import ends_of
from mpcompile.export.onnx_export import lower
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import Precision
from mpcompile.passes import NMMask
from mpcompile.passes.quantize.quantize import Quantize
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.runtimes import Build, TensorRT, TensorRTForRTX
from mpcompile.runtimes.tensorrt.quantization_rules import FUSED_STEPS
from mpcompile.runtimes.tensorrt.rtx import compiled
from mpcompile.runtimes.tensorrt.rules import refusals, verdicts_of
from mpcompile.testing import tiny_cnn, tiny_data, tiny_mlp, tiny_vit

MISSING = TensorRTForRTX().missing()
needs_rtx = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def masked(model: Model) -> Model:
    return PassManager([NMMask(NM(2, 4), criterion="magnitude", refit="none")]).run(model, Data())[0]


def quantised(model: Model, activations: str, outputs: str = "all") -> Model:
    steps: list[Pass] = [
        NMMask(NM(2, 4), criterion="magnitude", refit="none"),
        Quantize(activations=activations, outputs=outputs, observer="min-max", refit=False),  # type: ignore[arg-type]
    ]
    return PassManager(steps).run(model, tiny_data(model, 16))[0]


def pair(scale: object, zero_point: object, bias: bool = False, computed: bool = False) -> onnx.ModelProto:
    """A Conv of a quantised activation; with `bias`, a DequantizeLinear of int32 beside it."""
    constants = {"s": np.asarray(scale, np.float32), "z": np.asarray(zero_point), "b": np.ones(8, np.int32)}
    constants |= {"w": np.ones((8, 4, 1, 1), np.float32), "bs": np.ones(8, np.float32)}
    used = "t" if computed else "s"
    nodes = [
        *([helper.make_node("ReduceMax", ["x"], ["t"], keepdims=0)] if computed else []),
        helper.make_node("QuantizeLinear", ["x", used, "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", used, "z"], ["d"], name="d"),
        *([helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], name="bias", axis=0)] if bias else []),
        helper.make_node("Conv", ["d", "w", *(["bd"] if bias else [])], ["y"], name="conv"),
    ]
    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4, 4])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "g", [images], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


@pytest.mark.parametrize(
    ("file", "rules", "words"),
    [
        (pair(0.1, np.int8(0)), [], ""),
        (pair(0.1, np.int8(3)), ["zero-point", "zero-point"], "its zero point is not 0"),
        (pair(0.1, np.uint8(128)), ["zero-point", "zero-point"], "its zero point is not 0"),
        (pair(0.1, np.uint8(0)), ["signed", "signed"], "its type is uint8"),
        (pair(0.0, np.int8(0)), ["scale", "scale"], "a scale is 0, negative or not a number"),
        (pair(-1.0, np.int8(0)), ["scale", "scale"], "a scale is 0, negative or not a number"),
        (pair(np.nan, np.int8(0)), ["scale", "scale"], "a scale is 0, negative or not a number"),
        (pair(0.1, np.int8(0), computed=True), ["scale", "scale"], "its scale, t, is not a constant"),
        (pair([0.1] * 4, np.zeros(4, np.int8)), ["per-tensor"], "it has 4 scales"),
        (pair(0.1, np.int8(0), bias=True), ["integers"], "it reads int32, as of a bias"),
    ],
)
def test_rules_reject_what_they_name(file: onnx.ModelProto, rules: list[str], words: str) -> None:
    found = refusals(file)
    assert [refusal.rule.name for refusal in found] == rules
    for refusal in found:
        assert words in str(refusal)
        assert refusal.rule.source in str(refusal)


def test_a_file_for_a_cpu_is_refused_in_words(tmp_path: Path) -> None:
    lowered = lower(quantised_by_hand(masked(tiny_mlp()), ["hidden"]), tmp_path / "m.onnx", precision="int8")
    notes = TensorRT().prepare(lowered, tmp_path, Build()).notes
    assert any("TensorRT may refuse QuantizeLinear" in note and "zero points are 0" in note for note in notes)
    assert any("TensorRT may refuse DequantizeLinear" in note and "biases stay in float" in note for note in notes)


def test_a_file_for_tensorrt_is_clean_and_every_layer_is_eligible(tmp_path: Path) -> None:
    model = quantised(tiny_vit(), "s8")
    lowered = lower(model, tmp_path / "m.onnx", precision="int8")
    prepared = TensorRT().prepare(lowered, tmp_path, Build())
    assert "breaks none of the trt rules" in prepared.notes[0]
    assert prepared.notes[1] == "m.onnx: 8 of 8 products with 8-bit weights read 8 bits and return 8 bits"
    assert {row.eligible for row in prepared.verdicts} == {True}
    assert {row.rule for row in prepared.verdicts} == {"pattern"}
    assert all("2:4 in int8" in row.reason for row in prepared.verdicts)
    assert prepared.commands == (
        "trtexec --onnx=m.onnx --stronglyTyped --sparsity=enable --minShapes=images:1x1x8x8 --optShapes=images:8x1x8x8 "
        "--maxShapes=images:8x1x8x8 --profilingVerbosity=detailed --verbose --saveEngine=m.engine",
    )


def test_a_float_output_is_not_eligible_and_is_named(tmp_path: Path) -> None:
    model = quantised(tiny_vit(), "s8", outputs="convolutions")
    rows = verdicts_of(onnx.load((file := lower(model, tmp_path / "m.onnx", precision="int8")).onnx), file.masks)
    by_layer = {row.layer: row for row in rows}
    row = by_layer["blocks.0.attn.proj"]
    assert (row.eligible, row.rule) == (False, "int8-output")
    assert "its output is not int8 (Add node_add_" in row.reason
    # Behind its GELU, the output of the first layer of an MLP is quantised as the input of the second.
    assert by_layer["blocks.0.mlp.fc1"].eligible is True


def test_an_input_in_float_is_not_eligible(tmp_path: Path) -> None:
    lowered = lower(quantised_by_hand(masked(tiny_mlp()), ["hidden"], "s8"), tmp_path / "m.onnx", precision="int8")
    file = onnx.load(lowered.onnx)
    [quantise] = [n for n in file.graph.node if n.op_type == "QuantizeLinear"]
    [product] = [n for n in file.graph.node if n.op_type == "Gemm" and "linear_1" in n.name]
    product.input[0] = quantise.input[0]
    [row] = verdicts_of(file, lowered.masks)
    assert (row.eligible, row.rule) == (False, "int8-input")
    assert "its input is not (Gelu node_gelu)" in row.reason


def test_fp8_is_not_decided_by_the_rules(tmp_path: Path) -> None:
    lowered = lower(quantised_by_hand(masked(tiny_mlp()), ["hidden"], "fp8"), tmp_path / "m.onnx", precision="fp8")
    prepared = TensorRT().prepare(lowered, tmp_path, Build())
    [row] = prepared.verdicts
    # Its output is float32, which decides for int8 only.
    assert (row.eligible, row.rule) == (None, "fp8")
    assert any("FP8 needs compute capability 8.9" in note for note in prepared.notes)


def test_ends_are_read_through_layouts_biases_and_fused_operators(tmp_path: Path) -> None:
    model = quantised(tiny_cnn(), "s8")
    ends = ends_of(onnx.load(lower(model, tmp_path / "m.onnx", precision="int8").onnx), FUSED_STEPS)
    found = [(end.reads, end.returns) for end in ends.values()]
    assert found.count((None, None)) == len(model.scales())
    assert found[0][0] == "images, which is not quantised"
    assert found[-1][1] == "it is an output of the model"


def test_fp8_is_compiled_for_new_gpus_only(tmp_path: Path) -> None:
    lowered = lower(quantised_by_hand(tiny_mlp(), ["hidden"], "fp8"), tmp_path / "m.onnx", precision="fp8")
    with pytest.raises(
        BuildError, match=r"FP8 needs compute capability 8\.9 or newer, and plans are compiled for SM80"
    ):
        TensorRTForRTX(("SM80", "SM86")).prepare(lowered, tmp_path, Build())


@needs_rtx
@pytest.mark.parametrize("activations", ["s8", "fp8"])
def test_rtx_compiles_quantised_files_and_every_masked_weight_is_in_the_plan(activations: str, tmp_path: Path) -> None:
    for build, layers in ((tiny_vit, ["blocks.0.mlp.fc1", "blocks.1.attn.qkv"]), (normalized, ["a", "b"])):
        model = quantised_by_hand(masked(build()), layers, activations)  # type: ignore[arg-type]
        precision: Precision = "fp8" if activations == "fp8" else "int8"
        lowered = lower(model, tmp_path / "m.onnx", precision=precision, batch=4)
        assert refusals(onnx.load(lowered.onnx)) == []
        plan = compiled(lowered.onnx, ["SM89"])
        assert {mask.initializer for mask in lowered.masks} <= plan.initializers
        types = {kind for layer in plan.layers for kind in layer.types}
        assert ("FP8" if activations == "fp8" else "Int8") in types


@needs_rtx
def test_rtx_refuses_what_the_rules_refuse(tmp_path: Path) -> None:
    lowered = lower(quantised_by_hand(tiny_mlp(), ["hidden"]), tmp_path / "m.onnx", precision="int8", batch=4)
    with pytest.raises(BuildError, match=r"cannot parse m\.onnx.*zero points are 0"):
        TensorRTForRTX(("SM86",)).prepare(lowered, tmp_path, Build())


@needs_rtx
def test_rtx_compiles_fp8_for_the_gpus_that_have_it(tmp_path: Path) -> None:
    lowered = lower(quantised_by_hand(tiny_mlp(), ["hidden"], "fp8"), tmp_path / "m.onnx", precision="fp8", batch=4)
    notes = TensorRTForRTX().prepare(lowered, tmp_path, Build()).notes
    assert "m.onnx compiles for SM89, SM120" in notes[0]
    assert notes[1].startswith("m.onnx is not compiled for SM80, SM86: FP8 needs compute capability 8.9")
