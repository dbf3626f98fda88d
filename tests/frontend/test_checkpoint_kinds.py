"""Kinds of checkpoints: the right weights are loaded and named, or the cause of the refusal is."""

import argparse
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from norm_model import ARCH, Computes, Normed, loaded, same, seeded
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.load_model import Request, load


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "params", "teacher", "net_g", "weights"])
def test_weights_under_any_key(tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    module = seeded(1)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.zeros(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    content = {"epoch": 3, "optimizer_state_dict": optimizer.state_dict(), key: module.state_dict()}
    assert same(loaded(tmp_path, content), module)
    assert f"weights taken from {key!r} of model.pt" in caplog.text


def test_weights_two_keys_down(tmp_path: Path) -> None:
    module = seeded(1)
    assert same(loaded(tmp_path, {"checkpoint": {"model": module.state_dict()}, "step": torch.tensor(7)}), module)


def test_averaged_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = seeded(1)
    assert same(loaded(tmp_path, AveragedModel(module).state_dict()), module)
    assert "1 tensor outside 'module' is not used: n_averaged" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "net.", "encoder.", "module.encoder_q."])
def test_any_prefix_beside_a_foreign_key(tmp_path: Path, prefix: str) -> None:
    module = seeded(1)
    state = {f"{prefix}{name}": value for name, value in module.state_dict().items()}
    assert same(loaded(tmp_path, {"state_dict": state | {"criterion.weight": torch.ones(4)}}), module)


def test_lightning_with_a_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = seeded(1)
    state = {f"model.{name}": value for name, value in module.state_dict().items()}
    assert same(loaded(tmp_path, {"state_dict": state | {"criterion.weight": torch.ones(4)}}), module)
    assert "1 tensor outside 'state_dict.model' is not used: criterion.weight" in caplog.text


def test_averaged_weights_beside_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw, averaged = seeded(1), seeded(2)
    content = {"model": raw.state_dict(), "ema": averaged.state_dict(), "epoch": 3}
    assert same(loaded(tmp_path, content), averaged)
    assert "model, ema. ema was taken, the averaged weights; --weights-key model takes the others" in caplog.text
    assert same(loaded(tmp_path, content, "model"), raw)
    assert same(loaded(tmp_path, content, "ema"), averaged)


@pytest.mark.parametrize("keys", [("params", "params_ema"), ("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_averaged_weights_by_the_names_of_common_tools(tmp_path: Path, keys: tuple[str, str]) -> None:
    raw, averaged = seeded(1), seeded(2)
    assert same(loaded(tmp_path, {keys[0]: raw.state_dict(), keys[1]: averaged.state_dict()}), averaged)


def test_dino_asks_for_student_or_teacher(tmp_path: Path) -> None:
    student, teacher = seeded(1), seeded(2)
    content = {
        "student": {f"module.backbone.{name}": value for name, value in student.state_dict().items()}
        | {"module.head.mlp.0.weight": torch.ones(2, 2)},
        "teacher": {f"backbone.{name}": value for name, value in teacher.state_dict().items()}
        | {"head.mlp.0.weight": torch.ones(2, 2)},
        "dino_loss": {"center": torch.ones(1, 2)},
        "args": argparse.Namespace(arch="vit_small"),
    }
    with pytest.raises(LoadError, match="fit and differ: student.module.backbone, teacher.backbone; choose one with"):
        loaded(tmp_path, content)
    assert same(loaded(tmp_path, content, "teacher"), teacher)


def test_a_backbone_and_a_head_under_two_prefixes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As mmpretrain saves a model. Without the second prefix, head.weight was missing."""
    module = seeded(1)
    parts = {"head.": "cls_head.", "conv.": "backbone.", "norm.": "backbone."}
    state = {f"{parts[name.split('.')[0] + '.']}{name}": value for name, value in module.state_dict().items()}
    assert same(loaded(tmp_path, {"meta": {"epoch": 3}, "state_dict": state}), module)
    assert "head.bias, head.weight taken from 'cls_head.', all others from 'backbone.'" in caplog.text
    twice = state | {f"aux_{name}": value for name, value in state.items() if name.startswith("cls_")}
    with pytest.raises(LoadError, match="2 missing: head.weight, head.bias"):  # which head is not known
        loaded(tmp_path, {"state_dict": twice})


def test_a_part_that_torch_compile_wrapped(tmp_path: Path) -> None:
    module = seeded(1)
    state = {key.replace("conv.", "conv._orig_mod."): value for key, value in module.state_dict().items()}
    assert "conv._orig_mod.weight" in state
    assert same(loaded(tmp_path, {"state_dict": state}), module)


def test_plain_weights_for_a_class_that_computes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    plain, computing = Normed(), Computes()
    for module in (plain, computing):
        torch.save(module.state_dict(), tmp_path / "model.pt")
        request = Request(
            str(tmp_path / "model.pt"), arch="norm_model:Computes", input_size=(1, 8, 8), mean=(0.5,), std=(0.5,)
        )
        found = load(request).module
        assert type(found) is Computes
        assert same(dict(found.state_dict()), module)
        assert ("weight_norm computes 1 tensor before each use (conv.weight)" in caplog.text) == (module is plain)
        caplog.clear()


def test_two_networks_that_both_fit_are_a_question(tmp_path: Path) -> None:
    student, teacher = seeded(1), seeded(2)
    content = {"student": student.state_dict(), "teacher": teacher.state_dict()}
    with pytest.raises(
        LoadError, match="2 sets of weights that fit and differ: student, teacher; choose one with --weig"
    ):
        loaded(tmp_path, content)
    assert same(loaded(tmp_path, content, "teacher"), teacher)
    with pytest.raises(UsageError, match="no weights 'techer'; did you mean 'teacher'.*takes student, teacher"):
        loaded(tmp_path, content, "techer")
    assert same(loaded(tmp_path, {"a": student.state_dict(), "b": student.state_dict()}), student)  # no question


def test_two_networks_under_prefixes(tmp_path: Path) -> None:
    query, momentum = seeded(1), seeded(2)
    state = {f"encoder_q.{name}": value for name, value in query.state_dict().items()}
    state |= {f"encoder_k.{name}": value for name, value in momentum.state_dict().items()}
    with pytest.raises(LoadError, match=r"fit and differ: state_dict.encoder_q, state_dict.encoder_k"):
        loaded(tmp_path, {"state_dict": state})
    assert same(loaded(tmp_path, {"state_dict": state}, "state_dict.encoder_k"), momentum)


def test_weights_key_without_a_file() -> None:
    with pytest.raises(UsageError, match="--weights-key goes with a checkpoint file"):
        load(Request(ARCH, weights_key="ema"))


def test_pruned_by_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = seeded(1)
    prune.l1_unstructured(module.conv, "weight", 0.5)
    found = loaded(tmp_path, module.state_dict())
    prune.remove(module.conv, "weight")
    assert same(found, module)
    assert "conv.weight computed from its original and its mask (torch.nn.utils.prune)" in caplog.text


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_weight_norm(tmp_path: Path, norm: Any) -> None:
    module = seeded(1)
    plain = module.state_dict()["conv.weight"].clone()
    norm(module.get_submodule("conv"))
    assert torch.allclose(loaded(tmp_path, module.state_dict())["conv.weight"], plain, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_quantised(tmp_path: Path) -> None:
    module = torch.ao.quantization.quantize_dynamic(seeded(1).eval(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(LoadError, match=r"holds quantised weights \(head\..*give the checkpoint that was quantised"):
        loaded(tmp_path, module.state_dict())


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_lora_is_named_for_what_it_is(tmp_path: Path, prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in seeded(1).state_dict().items()}
    adapter = {
        f"{prefix}head.lora_A.default.weight": torch.ones(2, 8),
        f"{prefix}head.lora_B.default.weight": torch.ones(4, 2),
    }
    inside = {name.replace("head.weight", "head.base_layer.weight"): value for name, value in state.items()}
    for content in (adapter, state | adapter, inside | adapter):  # alone, beside the weights, and as PEFT wraps a layer
        with pytest.raises(LoadError, match=r"holds a LoRA adapter \(.*head\.(lora_A|base_layer).*merge_and_unload"):
            loaded(tmp_path, content)


def test_float64_is_converted_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = seeded(1)
    assert same(
        loaded(tmp_path, {name: v.double() if v.is_floating_point() else v for name, v in module.state_dict().items()}),
        module,
    )
    assert "model.pt: 8 weights are float64 (the first is conv.weight); converted to float32" in caplog.text


def test_a_state_dict_without_counts_of_batches(tmp_path: Path) -> None:
    module = seeded(1)
    old = OrderedDict((k, v) for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked"))
    assert same(loaded(tmp_path, old), module)
    with_prefix = OrderedDict((f"module.{name}", value) for name, value in old.items())
    assert same(loaded(tmp_path, {"state_dict": with_prefix}), module)
    new = module.state_dict()  # its version says that the count was there
    del new["norm.num_batches_tracked"]
    with pytest.raises(LoadError, match=r"1 missing: norm.num_batches_tracked"):
        loaded(tmp_path, new)


def test_buffers_that_are_no_longer_saved(tmp_path: Path) -> None:
    module = seeded(1)
    assert same(loaded(tmp_path, {**module.state_dict(), "index": torch.arange(8)}), module)
    with pytest.raises(LoadError, match="1 unexpected: index"):
        loaded(tmp_path, {**module.state_dict(), "index": torch.arange(8) + 1})


def test_torchscript_names_the_way_out(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # tracing is deprecated
        torch.jit.save(torch.jit.trace(seeded(1).eval(), torch.zeros(2, 1, 8, 8)), tmp_path / "script.pt")
    with pytest.raises(LoadError, match=r"is a TorchScript archive.*torch.jit.load\('script.pt'\).state_dict\(\)"):
        load(Request(str(tmp_path / "script.pt"), arch=ARCH))


def test_a_renamed_layer_is_named_under_any_prefix(tmp_path: Path) -> None:
    """All names were listed as missing, and all under the prefix as unexpected."""
    state = {f"net.backbone.{name}": value for name, value in seeded(1).state_dict().items()}
    state["net.backbone.fc.weight"] = state.pop("net.backbone.head.weight")
    with pytest.raises(LoadError, match="1 missing: head.weight; 1 unexpected: fc.weight. Check"):
        loaded(tmp_path, state)


def test_copies_that_are_not_finite_are_copies(tmp_path: Path) -> None:
    """NaN differs from itself, so the error asked for a choice between two equal sets."""
    state = seeded(1).state_dict()
    state["head.bias"] = state["head.bias"] * float("nan")
    with pytest.raises(LoadError, match=r"head.bias has 4 of 4 values that are NaN"):
        loaded(tmp_path, {"student": state, "copy": dict(state)})
