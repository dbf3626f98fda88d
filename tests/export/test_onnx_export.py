"""Export and proof: the masks are in the file, on the right axis, in both precisions; a tampered file is caught."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from kept_translations import TRANSLATE
from onnx import helper, numpy_helper
from torch import nn

from mpcompile.data.images import Data
from mpcompile.errors import BuildError, ParityError
from mpcompile.export import translation
from mpcompile.export.half_precision import to_half
from mpcompile.export.mask_check import file_weights
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.parity import TOLERANCE, relative_difference
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes.ort.overflow import OverflowScan, require_finite
from mpcompile.runtimes.ort.session import session_on
from mpcompile.testing import tiny_cnn, tiny_mlp, tiny_source, tiny_vit

SIDE = 64
REAL: dict[str, dict[str, Any]] = {  # few layers of each kind, narrow
    "vit_tiny_patch16_224": {"depth": 2, "img_size": SIDE},
    "beit_base_patch16_224": {"depth": 1, "img_size": SIDE, "embed_dim": 96, "num_heads": 4},
    "resnet18": {"channels": (16, 32, 48, 64)},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)},
}


def masked(model: Model) -> Model:
    return PassManager([NMMask(NM(2, 4))]).run(model, Data())[0]


def real(name: str) -> Model:
    torch.manual_seed(0)
    module = timm.create_model(name, **REAL[name])
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d) and child.running_var is not None and child.running_mean is not None:
            # as trained ones are: folding must have something to fold
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.running_var, 0.5, 1.5)
            nn.init.normal_(child.running_mean)
            nn.init.normal_(child.bias)
    source = replace(source_of(module, name=name, arch=name, sha256=""), size=(3, SIDE, SIDE))
    return masked(capture(module, source))


def outputs(path: Path, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"images": images.numpy()})[0]
    return result


def test_linear_masks_lie_on_axis_0_of_matmul(vit_file: Lowered) -> None:
    rows = {row.layer: row for row in vit_file.masks}
    assert len(rows) == 8
    row = rows["blocks.1.mlp.fc2"]
    assert (row.op, row.axis, row.pattern, row.group_size) == ("MatMul", 0, "2:4", 4)
    assert row.zeros * 2 == row.size == 32 * 128
    # Independently of the proof: the stored array, in groups of four along axis 0.
    stored = next(t for t in onnx.load(vit_file.onnx).graph.initializer if t.name == row.initializer)
    groups = numpy_helper.to_array(stored).reshape(-1, 4, stored.dims[1])
    assert ((groups != 0).sum(axis=1) == 2).all()


def test_outputs_equal_pytorch_for_any_batch(vit_file: Lowered) -> None:
    for batch in (1, 2, 5):
        images = torch.randn(batch, 1, 8, 8)
        found = outputs(vit_file.onnx, images)
        assert relative_difference(vit_file.model(images).numpy(), found) < TOLERANCE["fp32"]


def test_metadata_tells_where_the_masks_are(vit_file: Lowered) -> None:
    metadata = {p.key: p.value for p in onnx.load(vit_file.onnx).metadata_props}
    assert metadata["mpcompile.version"] == "1"
    assert metadata["mpcompile.precision"] == "fp32"
    sparsity = json.loads(metadata["mpcompile.sparsity"])
    assert {row["layers"][0] for row in sparsity.values()} == {row.layer for row in vit_file.masks}
    assert all(len(row["layers"]) == 1 for row in sparsity.values())
    assert all((row["axis"], row["group_size"], row["zero_count"]) == (0, 4, 2) for row in sparsity.values())


def test_no_local_paths_are_left_in_the_file(vit_file: Lowered) -> None:
    content = vit_file.onnx.read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content
    assert str(Path(__file__).parents[2]).encode() not in content


@pytest.mark.parametrize("name", REAL)
def test_real_architectures_keep_every_mask(name: str, tmp_path: Path) -> None:
    model = real(name)
    planned = {layer for layer, plan in model.plan.items() if plan.mask is not None}
    lowered = lower(model, tmp_path / "model.onnx", batch=1)
    assert {row.layer for row in lowered.masks} == planned
    kinds = {(row.op, row.axis) for row in lowered.masks}
    expected = {"resnet18": {("Conv", 1)}, "convnext_atto": {("Conv", 1)}}.get(name, {("MatMul", 0)})
    assert expected <= kinds <= {("Conv", 1), ("MatMul", 0), ("Gemm", 1)}
    found = outputs(lowered.onnx, model.example[:1])
    assert relative_difference(model(model.example[:1]).numpy(), found) < TOLERANCE["fp32"]


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
def test_half_precision_is_in_the_graph_and_norms_are_not(build: Callable[[], Model], tmp_path: Path) -> None:
    model = masked(build())
    lowered = lower(model, tmp_path / "model.onnx", precision="fp16", batch=4)
    file = onnx.shape_inference.infer_shapes(onnx.load(lowered.onnx))
    types = {value.name: value.type.tensor_type.elem_type for value in file.graph.value_info}
    half = {weight.values.dtype for weight in file_weights(file)}
    assert half == {np.dtype(np.float16)}
    spared = [node for node in file.graph.node if node.op_type in ("Softmax", "LayerNormalization", "ReduceMean")]
    assert spared
    assert all(types[node.output[0]] == onnx.TensorProto.FLOAT for node in spared)
    for value in (*file.graph.input, *file.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert len(lowered.masks) == sum(plan.mask is not None for plan in model.plan.values())
    images = torch.randn(4, 1, 8, 8)
    assert 1e-6 < relative_difference(model(images).numpy(), outputs(lowered.onnx, images)) < TOLERANCE["fp16"]


def test_a_fixed_batch_is_fixed(tmp_path: Path) -> None:
    lowered = lower(tiny_mlp(), tmp_path / "model.onnx", batch=4)
    file = onnx.load(lowered.onnx)
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    images = np.random.default_rng(0).standard_normal((6, 1, 8, 8), np.float32)
    found = session_on(lowered.onnx)(images)  # in two pieces, the second padded
    assert relative_difference(lowered.model(torch.from_numpy(images)).numpy(), found) < TOLERANCE["fp32"]


def test_large_weights_go_beside_the_file(tmp_path: Path) -> None:
    model = masked(tiny_vit())
    lowered = lower(model, tmp_path / "model.onnx", batch=2, inline_limit_bytes=1000)
    beside = tmp_path / "model.onnx.data"
    assert beside.stat().st_size > lowered.onnx.stat().st_size / 4
    assert len(lowered.masks) == 8
    images = torch.randn(2, 1, 8, 8)
    assert relative_difference(model(images).numpy(), outputs(lowered.onnx, images)) < TOLERANCE["fp32"]


# ---- what the proof catches


# ---- what cannot be built


def test_an_export_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("wrapper") from ValueError("no such operator\nand a page of advice")

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr(translation, "_translated", TRANSLATE)
    with pytest.raises(
        BuildError,
        match=r"cannot export tiny with a dynamic batch; try a fixed batch, --batch 1: ValueError: no such op",
    ) as error:
        lower(tiny_mlp(), tmp_path / "model.onnx")
    assert "advice" not in str(error.value)
    assert error.value.exit_code == 7


def test_overflow_in_half_precision_names_the_operator(tmp_path: Path) -> None:
    model = tiny_mlp()
    with torch.no_grad():
        model.layer("hidden").weight.mul_(1e5)
        model.layer("head").weight.mul_(1e-5)
    lowered = lower(model, tmp_path / "model.onnx", precision="fp16")
    images = model.example.numpy()
    # The outputs need not tell: where a CPU computes in float32 they are finite, and on a GPU they would not be.
    with pytest.raises(ParityError, match=r"model.onnx: (Gemm|MatMul|Add) \w*linear_1\w* overflows in half precision"):
        require_finite(lowered, [(images,)])


def test_masks_of_minus_infinity_are_no_overflow(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(64, 8), nn.Linear(8, 4)
            self.register_buffer("hidden", torch.tensor([False, True] * 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x.flatten(1)).masked_fill(self.hidden, float("-inf"))
            return self.head(y.softmax(-1))  # type: ignore[no-any-return]

    model = capture(Masked(), tiny_source())
    lowered = lower(model, tmp_path / "model.onnx", precision="fp16")
    assert require_finite(lowered, [(model.example.numpy(),)]) == 2


def test_finite_outputs_are_counted(vit_file: Lowered) -> None:
    images = vit_file.model.example.numpy()
    assert require_finite(vit_file, [(images,), (images,)]) == 4
    assert OverflowScan(vit_file.onnx)(images) is None


def test_a_cast_from_a_comparison_stays_in_half_precision() -> None:
    """A failure before: a softmax was fed with booleans, and the file did not load."""
    nodes = [
        helper.make_node("Greater", ["images", "zero"], ["larger"], name="greater"),
        helper.make_node("Cast", ["larger"], ["number"], name="cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Softmax", ["number"], ["logits"], name="softmax"),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("images", "logits")]
    known = [helper.make_tensor_value_info("larger", onnx.TensorProto.BOOL, [1, 4])]
    known.append(helper.make_tensor_value_info("number", onnx.TensorProto.FLOAT, [1, 4]))
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [zero], value_info=known)
    half = to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    session = onnxruntime.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.array([[1, -1, 2, -2]], np.float32)
    [found] = session.run(None, {"images": images})
    wanted = np.exp([1, 0, 1, 0]) / np.exp([1, 0, 1, 0]).sum()
    assert np.abs(found[0] - wanted).max() < 1e-3  # float16
