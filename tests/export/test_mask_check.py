"""Masks in the ONNX file: found on the right axis; a changed, lost or transposed weight is reported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mpcompile.data.images import Data
from mpcompile.driver.weight_files import write_weights
from mpcompile.errors import MaskError
from mpcompile.export.mask_check import file_weights, verify_masks
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import violation
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.system.safetensors_io import read_tensors
from mpcompile.testing import assert_follows, assert_same_function, tiny_mlp, tiny_source


def tampered(lowered: Lowered, layer: str, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    file = onnx.load(lowered.onnx)
    name = next(row.initializer for row in lowered.masks if row.layer == layer)
    tensor = next(t for t in file.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return file


def fill_one(values: np.ndarray) -> np.ndarray:
    values[tuple(np.argwhere(values == 0)[0])] = 1e-3
    return values


def proven(file: onnx.ModelProto, model: Model) -> None:
    verify_masks(file, model.plan, model.graph.state_dict())


@pytest.mark.parametrize("with_metadata", [True, False])
def test_one_weight_filled_in_is_found_and_named(vit_file: Lowered, with_metadata: bool) -> None:
    file = tampered(vit_file, "blocks.1.attn.proj", fill_one)
    if not with_metadata:
        del file.metadata_props[:]
    with pytest.raises(
        MaskError, match=r"blocks.1.attn.proj: 1 weights that the mask zeroes are not zero in \S+ \(axis 0"
    ) as error:
        proven(file, vit_file.model)
    assert error.value.exit_code == 5


def test_a_kept_weight_that_is_zero_does_not_break_a_pattern_that_rows_share(tmp_path: Path) -> None:
    model, _ = PassManager([NMMask(NM(2, 4, 2))]).run(tiny_mlp(), Data())
    weight, mask = model.layer("hidden").weight, model.masks()["hidden"]
    with torch.no_grad():  # as rounding to 8 bits, or half precision, may do
        weight[tuple(mask.nonzero()[0])] = 0.0
    [row, *_] = [row for row in lower(model, tmp_path / "m.onnx").masks if row.layer == "hidden"]
    assert row.zeros == weight.numel() // 2 + 1


def test_a_vocabulary_is_proven_although_kept_weights_are_zero(tmp_path: Path) -> None:
    model, _ = PassManager([NMMask(NM.parse("4:8v2"))]).run(tiny_mlp(), Data())
    weight, mask = model.layer("hidden").weight, model.masks()["hidden"]
    with torch.no_grad():
        weight[tuple(mask.nonzero()[0])] = 0.0
    [row, *_] = [row for row in lower(model, tmp_path / "m.onnx").masks if row.layer == "hidden"]
    assert (row.pattern, row.zeros) == ("4:8v2", weight.numel() // 2 + 1)
    assert row.nm == NM(4, 8, vocabulary=2)


def test_a_mask_of_too_many_patterns_is_found(tmp_path: Path) -> None:
    model, _ = PassManager([NMMask(NM.parse("4:8"))]).run(tiny_mlp(), Data())
    made = lower(model, tmp_path / "m.onnx")
    plan = {"hidden": replace(model.plan["hidden"], pattern=NM(4, 8, vocabulary=2))}
    with pytest.raises(MaskError, match=r"hidden: .* is not 4:8v2: \d+ of \d+ blocks .* more than 2 patterns \(up to"):
        verify_masks(onnx.load(made.onnx), plan, model.graph.state_dict())
    assert "the mask itself is not 4:8v2" in str(violation(model.layer("hidden"), plan["hidden"]))


def test_a_mask_on_the_wrong_axis_is_found(vit_file: Lowered) -> None:
    with pytest.raises(MaskError, match="blocks.0.attn.proj"):
        proven(tampered(vit_file, "blocks.0.attn.proj", lambda w: np.ascontiguousarray(w.T)), vit_file.model)


def test_a_lost_weight_is_found(vit_file: Lowered) -> None:
    file = onnx.load(vit_file.onnx)
    del file.metadata_props[:]
    weight = next(w for w in file_weights(file) if "blocks.0.mlp.fc1" in w.scopes)
    [node] = [n for n in file.graph.node if n.name == weight.node]
    del node.metadata_props[:]
    tensor = next(t for t in file.graph.initializer if t.name == weight.initializer)
    tensor.CopyFrom(numpy_helper.from_array(np.ones(weight.values.T.shape, np.float32), tensor.name))
    with pytest.raises(MaskError, match="blocks.0.mlp.fc1: its mask was lost in the export"):
        proven(file, vit_file.model)


def test_weights_behind_constant_steps_are_found(vit_file: Lowered) -> None:
    """An exporter that leaves the transpose in the graph stores the groups along axis 1."""
    file = onnx.load(vit_file.onnx)
    del file.metadata_props[:]
    weight = next(w for w in file_weights(file) if "blocks.0.mlp.fc1" in w.scopes)
    tensor = next(t for t in file.graph.initializer if t.name == weight.initializer)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight.values), "stored"))
    file.graph.node.insert(0, onnx.helper.make_node("Transpose", ["stored"], [weight.initializer], perm=[1, 0]))
    found = next(w for w in file_weights(file) if w.initializer == "stored")
    assert found.axis == 1
    proven(file, vit_file.model)


def test_a_plan_for_another_shape_is_found(vit_file: Lowered) -> None:
    plan = dict(vit_file.model.plan)
    mask = plan["blocks.0.mlp.fc1"].mask
    assert mask is not None
    plan["blocks.0.mlp.fc1"] = replace(plan["blocks.0.mlp.fc1"], mask=mask[:64])
    with pytest.raises(MaskError, match=r"blocks.0.mlp.fc1: .* is \(128, 32\), the mask \(64, 32\)"):
        verify_masks(onnx.load(vit_file.onnx), plan, vit_file.model.graph.state_dict())


class Twice(nn.Module):
    """Two layers that are one module, share a parameter, or are merely equal."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (nn.Linear(i, o) for i, o in ((64, 16), (16, 16), (16, 16), (16, 4)))
        if how == "module":
            self.b = self.a
        elif how == "parameter":
            self.b.weight = self.a.weight
        else:
            self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(self.stem(x.flatten(1))).relu()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["module", "parameter", "values"])
def test_layers_that_share_a_weight_are_proven_and_written(how: str, tmp_path: Path) -> None:
    module = Twice(how)
    model = PassManager([NMMask(NM(2, 4))]).run(capture(module, tiny_source()), Data())[0]
    lowered = lower(model, tmp_path / "model.onnx")
    assert {row.layer for row in lowered.masks} == ({"a"} if how == "module" else {"a", "b"})
    verify_masks(onnx.load(lowered.onnx), model.plan, model.graph.state_dict())
    write_weights(tmp_path, module, model)
    again = Twice(how)
    again.load_state_dict(read_tensors(tmp_path / "model.safetensors"))
    for layer in (again.a, again.b):
        assert_follows(layer.weight, NM(2, 4))
    # One thread of rounding: the same weights in the same modules.
    assert_same_function(model.graph, again, model.example, tolerance=1e-6)


def test_a_tied_layer_is_left_alone_with_its_twin() -> None:
    model = capture(Twice("parameter"), tiny_source())
    result, _ = PassManager([NMMask(exclude=("b",), include=("head",))]).run(model, Data())
    assert result.plan["a"].skipped == "shares its weight with b, which stays dense (excluded by 'b')"
    assert result.plan["a"].mask is None
    assert (result.layer("a").weight != 0).all()
