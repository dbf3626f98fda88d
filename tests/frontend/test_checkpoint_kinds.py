"""Kinds of checkpoints: the right weights are loaded and named, or the cause of the refusal is."""

import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.load_model import Request, load

ARCH = "norm_model:Normed"


class Normed(nn.Module):
    """A convolution, a batch norm and a head, with a table that the state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.register_buffer("index", torch.arange(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(x)).mean((2, 3)))
        return out


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "norm_model", sys.modules[__name__])


def seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Normed()


def loaded(path: Path, content: Any, key: str | None = None) -> dict[str, Tensor]:
    torch.save(content, path / "model.pt")
    request = Request(str(path / "model.pt"), arch=ARCH, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,), weights_key=key)
    return dict(load(request).module.state_dict())


def same(found: dict[str, Tensor], module: nn.Module) -> bool:
    return all(torch.equal(value, found[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "net_g", "weights"])
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


def test_a_part_that_torch_compile_wrapped(tmp_path: Path) -> None:
    module = seeded(1)
    state = {key.replace("conv.", "conv._orig_mod."): value for key, value in module.state_dict().items()}
    assert "conv._orig_mod.weight" in state
    assert same(loaded(tmp_path, {"state_dict": state}), module)


class Computes(Normed):
    """A class whose layers compute their weights."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)
        nn.utils.parametrizations.spectral_norm(self.head)


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


def test_shards_name_the_cause(tmp_path: Path) -> None:
    state = seeded(1).state_dict()
    part = dict(list(state.items())[:2])
    path = tmp_path / "pytorch_model-00001-of-00003.bin"
    torch.save(part, path)
    with pytest.raises(
        LoadError, match=r"is shard 1 of 3, and holds only a part of the weights \(.*missing: .*one file"
    ):
        load(Request(str(path), arch=ARCH))
    torch.save(dict(state), tmp_path / "model-00001-of-00001.bin")
    request = Request(
        str(tmp_path / "model-00001-of-00001.bin"), arch=ARCH, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,)
    )
    load(request)  # the only one
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(
        LoadError, match="is the index of a model in several shards, which are not read; save the model"
    ):
        load(Request(str(index), arch=ARCH))


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
