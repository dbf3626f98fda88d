"""Target rtx: NVIDIA's own parser and compiler accept exported graphs, on a machine without a GPU."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
from onnx import TensorProto, helper

import mpcompile
from mpcompile.analysis.block_macs import parts
from mpcompile.data.images import Data
from mpcompile.errors import BuildError
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask, ToMe
from mpcompile.pipeline.pass_manager import Pass, PassManager
from mpcompile.recipe.schema import Recipe
from mpcompile.runtimes import Build, TensorRTForRTX
from mpcompile.runtimes.tensorrt.rtx import CAPABILITIES, compiled, initializers_in
from mpcompile.testing import tiny_vit

MISSING = TensorRTForRTX().missing()
needs_rtx = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def masked(name: str, merged: int = 0) -> Model:
    """Returns a timm model with random weights, masked to 2:4."""
    module = timm.create_model(name).eval()
    model = capture(module, source_of(module, name=name, arch=name, sha256=""))
    steps: list[Pass] = [NMMask(pattern=NM(2, 4), criterion="magnitude", refit="none")]
    result, _ = PassManager([*steps, *([ToMe(r=merged)] if merged else [])]).run(model, Data())
    return result


@needs_rtx
@pytest.mark.parametrize(
    ("name", "merged", "precision"),
    [
        ("vit_tiny_patch16_224", 8, "fp16"),
        ("vit_tiny_patch16_224", 8, "bf16"),
        ("resnet18", 0, "fp16"),
        ("convnextv2_atto", 0, "fp16"),
    ],
)
def test_masked_models_compile_and_every_masked_weight_is_in_the_plan(
    name: str, merged: int, precision: str, tmp_path: Path
) -> None:
    model = masked(name, merged)
    lowered = lower(model, tmp_path / "m.onnx", precision=precision, batch=8)  # type: ignore[arg-type]
    plan = compiled(lowered.onnx, ["SM86"])
    assert {mask.initializer for mask in lowered.masks} <= plan.initializers
    assert len(lowered.masks) == len(model.masks())
    blocks = len(parts(model.graph, model.example).tokens) // 2
    assert plan.attentions == blocks  # each fused into one kernel


@needs_rtx
def test_a_weight_with_one_changed_value_is_not_found_in_the_plan(tmp_path: Path) -> None:
    lowered = lower(masked("resnet18"), tmp_path / "m.onnx", precision="fp16", batch=1)
    plan = compiled(lowered.onnx, ["SM86"])
    file = onnx.load(lowered.onnx)
    changed = next(t for t in file.graph.initializer if t.name == lowered.masks[0].initializer)
    values = onnx.numpy_helper.to_array(changed).copy()
    values.flat[0] += 1  # one weight of one layer
    changed.CopyFrom(onnx.numpy_helper.from_array(values, changed.name))
    assert plan.initializers - initializers_in(plan.data, file) == {changed.name}


@needs_rtx
def test_compile_writes_plans_for_the_target(example: Path, tmp_path: Path) -> None:
    recipe = Recipe.checked(
        {"passes": [{"nm-mask": {"pattern": "2:4"}}], "target": "rtx", "precision": "fp16", "data": {"held_out": 64}}
    )
    artifact = mpcompile.compile(
        example / "model.safetensors", recipe, data=example / "images.npz", output=tmp_path / "o"
    )
    plans = sorted(artifact.folder.glob("*.engine"))
    version = TensorRTForRTX().versions()["tensorrt-rtx"]
    assert [path.name for path in plans] == [
        f"vit_tiny_patch16_224-{kind}-fp16-bs1-8-rtx{version}-sm80+86+89+120.engine" for kind in ("2x4", "dense")
    ]
    sidecar = json.loads(Path(f"{str(plans[0]).removesuffix('.engine')}.json").read_text())
    assert len(sidecar["masked_weights_found"]) == 24
    assert sidecar["masked_weights_not_found"] == []
    assert sidecar["compute_capabilities"] == list(CAPABILITIES)
    report = artifact.report
    assert report.latency == ()
    assert not report.accelerated
    assert "no speed is claimed" in " ".join(report.verdict)
    artifact.verify()


@needs_rtx
def test_a_parser_error_names_the_broken_rule(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["i"], value=onnx.numpy_helper.from_array(np.zeros((1, 4), np.int64))),
        helper.make_node("ScatterElements", ["images", "i", "images"], ["logits"], name="sum", reduction="add", axis=1),
    ]
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("images", "logits")]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:])
    lowered = lower(tiny_vit(), tmp_path / "m.onnx", batch=1)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), lowered.onnx)
    with pytest.raises(BuildError, match=r"cannot parse m\.onnx.*ScatterElements sum: its reduction is add"):
        TensorRTForRTX(("SM86",)).prepare(lowered, tmp_path, Build())


@needs_rtx
def test_an_unknown_capability_is_refused(tmp_path: Path) -> None:
    lowered = lower(tiny_vit(), tmp_path / "m.onnx", batch=1)
    with pytest.raises(BuildError, match="does not compile for SM99"):
        compiled(lowered.onnx, ["SM99"])


@needs_rtx
def test_build_says_that_plans_cannot_run_here(tmp_path: Path) -> None:
    lowered = lower(tiny_vit(), tmp_path / "m.onnx", batch=1)
    with pytest.raises(BuildError, match="cannot run here"):
        TensorRTForRTX().build(lowered, Build())
