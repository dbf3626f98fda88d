"""The rules on weights and operators: each rejects what it names, and agrees with NVIDIA's own checker."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mpcompile.data.images import Data
from mpcompile.export.onnx_export import Lowered, lower
from mpcompile.frontend.capture import capture
from mpcompile.frontend.preprocessing import source_of
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.precision import Precision
from mpcompile.passes import NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.runtimes.tensorrt.rules import (
    NO_OPERATOR,
    OPERATOR_RULES,
    SPARSITY_RULES,
    _follows_pattern,
    refusals,
    sparsity_of,
    verdicts_of,
)
from mpcompile.testing import tiny_cnn, tiny_mlp, tiny_vit


def file_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 4, 4])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(values, name) for name, values in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", [images], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "rule"),
    [
        ("Unique", ["x"], {}, "operator"),
        ("ScatterElements", ["x", "i", "u"], {"reduction": "add"}, "reduction"),
        ("ScatterND", ["x", "i", "u"], {"reduction": "max"}, "reduction"),
        ("TopK", ["x", "many"], {}, "top-k"),
        ("TopK", ["x", "computed"], {}, "constant"),
        ("NonZero", ["x"], {}, "nonzero"),
        ("Attention", ["x", "x", "x"], {}, "attention"),
        ("Slice", ["x", "few", "few", "computed"], {}, "constant"),
        ("Squeeze", ["x", "computed"], {}, "constant"),
        ("ScatterElements", ["x", "i", "u"], {}, None),
        ("ScatterND", ["x", "i", "u"], {"reduction": "none"}, None),
        ("TopK", ["x", "few"], {}, None),
        ("Slice", ["x", "few", "few", "few"], {}, None),
        ("Slice", ["x", "few", "few"], {}, None),
        ("Relu", ["x"], {}, None),
    ],
)
def test_rules_reject_what_they_name(op: str, inputs: list[str], attributes: dict[str, str], rule: str | None) -> None:
    constants = {"few": np.array([4], np.int64), "many": np.array([3841], np.int64)}
    node = helper.make_node(op, inputs, ["y"], name="n", **attributes)
    found = refusals(file_of([node], constants))
    assert [refusal.rule.name for refusal in found] == ([rule] if rule else [])
    for refusal in found:
        assert op in str(refusal)
        assert refusal.rule.source in str(refusal)


def test_an_unsupported_opset_is_reported() -> None:
    [found] = refusals(file_of([helper.make_node("Relu", ["x"], ["y"])], opset=8))
    assert "opset 8" in str(found)


def test_every_rule_has_a_source_and_a_unique_name() -> None:
    rules = (*SPARSITY_RULES, *OPERATOR_RULES)
    assert len({rule.name for rule in rules}) == len(rules)
    assert all(rule.source and rule.says and rule.standing in ("documented", "observed") for rule in rules)
    assert "MatMul" not in NO_OPERATOR


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.sampled_from(["2:4", "1:4", "8:16"]), st.data())
def test_the_pattern_check_agrees_with_the_definition(
    rows: int, groups: int, taps: int, text: str, data: st.DataObject
) -> None:
    pattern = NM.parse(text)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    density = data.draw(st.sampled_from([0.1, 0.3, 0.6]))
    kept = rng.random((rows, groups * pattern.of, taps)) < density
    by_definition = all(
        kept[row, start : start + pattern.of, tap].sum() <= pattern.keep
        for row in range(rows)
        for start in range(0, groups * pattern.of, pattern.of)
        for tap in range(taps)
    )
    assert _follows_pattern(kept, pattern) == by_definition


def masked(model: Model, pattern: str) -> Model:
    result, _ = PassManager([NMMask(pattern=NM.parse(pattern), criterion="magnitude", refit="none")]).run(model, Data())
    return result


@pytest.fixture(scope="module")
def tiny_vit_at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision], Lowered]:
    """Returns a function that exports the tiny ViT at 2:4 in a precision, once per precision."""

    @cache
    def exported(precision: Precision) -> Lowered:
        folder = tmp_path_factory.mktemp(precision)
        return lower(masked(tiny_vit(), "2:4"), folder / "m.onnx", precision=precision, batch=1)

    return exported


@pytest.mark.parametrize(("precision", "eligible"), [("fp16", True), ("bf16", True), ("fp32", None)])
def test_eligibility_depends_on_the_type_of_the_weights(
    precision: Precision, eligible: bool | None, tiny_vit_at: Callable[[Precision], Lowered]
) -> None:
    lowered = tiny_vit_at(precision)
    rows = verdicts_of(onnx.load(lowered.onnx), lowered.masks)
    assert {row.layer for row in rows} == {mask.layer for mask in lowered.masks}
    assert all(row.eligible is eligible for row in rows)
    assert all(row.chosen is None for row in rows)


def test_another_pattern_and_other_channels_are_not_eligible(tmp_path: Path) -> None:
    lowered = lower(masked(tiny_mlp(), "3:4"), tmp_path / "m.onnx", precision="fp16", batch=1)
    file = onnx.load(lowered.onnx)
    assert all(row.eligible is False for row in verdicts_of(file, lowered.masks))
    assert all("runs as dense" in row.reason for row in verdicts_of(file, lowered.masks))
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="n")
    [stem] = sparsity_of(file_of([node], {"w": np.zeros((8, 3, 3, 3), np.float16)}))
    assert stem.eligible is False
    assert "3 input channels are not a multiple of 4" in stem.reason


def test_eligibility_of_grouped_convolutions_is_unknown() -> None:
    weight = np.zeros((8, 4, 3, 3), np.float16)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="n", group=2)
    [row] = sparsity_of(file_of([node], {"w": weight}))
    assert row.eligible is None
    assert "2 groups" in row.reason


# Few, narrow layers of each kind.
SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 96},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
}


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("tiny_vit", "fp16"),
        ("tiny_vit", "fp32"),
        ("tiny_cnn", "fp16"),
        # The tiny models have the same kinds of layers as these two.
        pytest.param("vit_tiny_patch16_224", "fp32", marks=pytest.mark.slow),
        pytest.param("resnet18", "fp32", marks=pytest.mark.slow),
        ("convnextv2_atto", "fp32"),
    ],
)
def test_polygraphy_finds_the_same_weights_sparse(
    family: str, precision: Precision, tmp_path: Path, tiny_vit_at: Callable[[Precision], Lowered]
) -> None:
    if family == "tiny_vit":
        lowered = tiny_vit_at(precision)
    else:
        model = tiny_cnn() if family == "tiny_cnn" else of_timm(family, **SMALL[family])
        lowered = lower(masked(model, "2:4"), tmp_path / "m.onnx", precision=precision, batch=1)
    rows = sparsity_of(onnx.load(lowered.onnx))
    polygraphy = str(Path(sys.executable).parent / "polygraphy")
    command = [polygraphy, "inspect", "sparsity", str(lowered.onnx)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    theirs = {line.rpartition(": ")[2].strip() for line in output.splitlines() if "Found sparse tensor" in line}
    assert {mask.initializer for mask in lowered.masks} <= theirs
    assert theirs == {row.initializer for row in rows if row.two_four}


def of_timm(name: str, **args: Any) -> Model:
    """Returns a timm model with random weights."""
    module = timm.create_model(name, **args).eval()
    return capture(module, source_of(module, name=name, arch=name, sha256=""))


def check_reads(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asserts that sparsity_of finds every mask of a file 2:4 and reads each weight once."""
    file, reads, read = onnx.load(lowered.onnx), Counter[str](), numpy_helper.to_array

    def counted(tensor: onnx.TensorProto) -> np.ndarray:
        reads[tensor.name] += 1
        return read(tensor)

    monkeypatch.setattr("mpcompile.export.mask_check.numpy_helper.to_array", counted)
    rows = sparsity_of(file)
    assert reads == Counter(row.initializer for row in rows)
    assert set(reads.values()) == {1}
    assert {row.initializer for row in rows if row.two_four} == {mask.initializer for mask in lowered.masks}


def test_each_weight_is_read_once(tiny_vit_at: Callable[[Precision], Lowered], monkeypatch: pytest.MonkeyPatch) -> None:
    check_reads(tiny_vit_at("fp16"), monkeypatch)


@pytest.mark.slow
def test_vit_b_is_checked_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = lower(masked(of_timm("vit_base_patch16_224"), "2:4"), tmp_path / "m.onnx", precision="fp16", batch=1)
    assert len(lowered.masks) == 48
    check_reads(lowered, monkeypatch)
