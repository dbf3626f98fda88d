"""Modules as users have them, in every pass and on the whole way to an output folder and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from user_modules import UserModules, captured_user_modules, user_modules

import mpcompile
from mpcompile.driver.artifact import Artifact
from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture
from mpcompile.passes import PASSES, NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.recipe.schema import Recipe
from mpcompile.testing import check_contract, tiny_data, tiny_source

MASKED = ["conv", "attention.in_proj", "attention.out_proj", "to_half.in_proj_q", "to_half.in_proj_kv",
          "to_half.out_proj", "first", "second"]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in PASSES if name != "tome"])  # its attention to a half is not merged
def test_every_pass_keeps_the_contract(name: str) -> None:
    model = captured_user_modules()
    check_contract(PASSES[name](), model, tiny_data(model))


def test_a_mask_and_a_refit_of_every_layer() -> None:
    model = captured_user_modules()
    data = tiny_data(model, 32)
    masked, _ = PassManager([PASSES["permute"](), NMMask()]).run(model, data)
    assert list(masked.masks()) == MASKED
    assert all(plan.relative_error is not None for plan in map(masked.plan_of, MASKED))
    reordered = [name for name in MASKED if masked.plan_of(name).permutation is not None]
    assert {"conv", "attention.out_proj"} <= set(reordered)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    recipe = Recipe.checked({"target": "eager", "bench": {"batches": [1], "seconds": 0.05}})
    passes = [PASSES["permute"](), NMMask()]
    output = tmp_path_factory.mktemp("user-modules") / "out"
    return mpcompile.compile(user_modules(), recipe, passes=passes, output=output)


def test_the_files_have_the_names_and_shapes_of_the_original_class(artifact: Artifact) -> None:
    weights, masks = (load_file(artifact.folder / f"{name}.safetensors") for name in ("model", "masks"))
    expected = {name: value.shape for name, value in UserModules().state_dict().items() if "param" not in name}
    assert {name: value.shape for name, value in weights.items()} == {**expected, "conv.weight": (16, 16, 3)}
    assert list(masks) == sorted(MASKED)
    assert masks["conv"].shape == weights["conv.weight"].shape
    assert masks["attention.in_proj"].shape == weights["attention.in_proj_weight"].shape
    assert masks["to_half.in_proj_kv"].shape == (32, 16)
    # Rows of the packed weight: those of the query, then those of key and value.
    packed = torch.cat([masks["to_half.in_proj_q"], masks["to_half.in_proj_kv"]])
    assert not weights["to_half.in_proj_weight"][~packed].any()
    assert {row.layer for row in artifact.verify()} == set(MASKED)


def test_the_report_counts_a_tied_weight_once_and_names_computed_weights(artifact: Artifact) -> None:
    rows = {row.name: row for row in artifact.report.layers}
    assert [name for name, row in rows.items() if row.pattern] == MASKED
    assert rows["second"].shares_weight_with == "first"
    assert "weight_norm computes 1 tensor before each use (conv.weight)" in " ".join(artifact.report.notes)
    assert "7 of 9 layers are masked (7 at 2:4)" in " ".join(artifact.report.verdict)


def test_the_original_class_loads_them(artifact: Artifact) -> None:
    images = torch.randn(3, 1, 8, 8)
    module = artifact.load("torch", model=user_modules(seed=1))  # computes what model.onnx computes, or is refused
    assert type(module.conv) is nn.Conv1d
    # A graph that calls the same operators on the same weights: only fused attention rounds in another order.
    assert torch.allclose(capture(module, tiny_source())(images), module(images), atol=1e-6)


def test_int8_masks_are_proven_in_the_file(tmp_path: Path) -> None:
    model = captured_user_modules()
    result, _ = PassManager([NMMask(), PASSES["quantize"]()]).run(model, tiny_data(model, 16))
    assert set(MASKED) <= set(result.scales())
    lowered = lower(result, tmp_path / "model.onnx", precision="int8")
    assert {row.layer for row in lowered.masks} == set(MASKED)
