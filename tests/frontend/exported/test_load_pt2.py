"""A .pt2 file as a model: found by content, without --arch, or as weights of an architecture."""

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pt2_files import WEIGHTS, fixed_file, pickled, saved, small, small_file, with_json, with_members
from torch import Tensor, nn

from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request, load

MODULE = """
from pt2_files import small

def build():
    return small()
"""


@pytest.mark.parametrize("name", ["model.pt2", "model.bin"])
@pytest.mark.parametrize("content", [small_file, fixed_file])
def test_a_program_is_a_model_whatever_its_name(name: str, content: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content())
    loaded = load(Request(str(path)))
    assert loaded.source.size == (3, 8, 8)
    assert loaded.source.preprocessing == "assumed"
    assert loaded.source.arch_args is None
    model = capture(loaded.module, loaded.source)
    images = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(model(images), small()(images))
    assert load(Request(str(path), mean=(0.1, 0.2, 0.3))).source.mean == (0.1, 0.2, 0.3)


def test_its_weights_fit_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model.pt2").write_bytes(fixed_file())
    loaded = load(Request(str(tmp_path / "model.pt2"), arch="own_model:build", input_size=(3, 8, 8)))
    assert type(loaded.module) is nn.Sequential
    assert torch.equal(loaded.module.state_dict()["0.weight"], small().state_dict()["0.weight"])


def test_weights_key_goes_with_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(small_file())
    with pytest.raises(UsageError, match="--weights-key"):
        load(Request(str(tmp_path / "model.pt2"), weights_key="ema"))


def test_allow_pickle_passes_a_refusal_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def edit(config: Any) -> None:
        config["config"]["5.bias"].update(use_pickle=True, path_name="weight_77")

    bias = nn.Parameter(torch.ones(4))
    content = with_members(with_json(fixed_file(), WEIGHTS, edit), data__weights__weight_77=pickled(bias))
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"holds 5\.bias as a pickle"):
        load(Request(str(path)))
    with caplog.at_level(logging.WARNING):
        loaded = load(Request(str(path), allow_pickle=True))
    assert any("loaded by torch.export.load" in record.message for record in caplog.records)
    assert torch.equal(loaded.module.state_dict()["5.bias"], torch.ones(4))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(LoadError):
        load(Request(str(path), allow_pickle=True))


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, pixels: Tensor) -> Answer:
        y = self.net(pixels)
        return Answer(logits=y, hidden=y.relu())


def test_a_dataclass_becomes_a_dict_of_its_fields(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a Hugging Face ModelOutput: no class is looked up, so it does not matter what is imported."""
    torch.export.register_dataclass(Answer, serialized_type_name="somewhere.Answer")
    (tmp_path / "model.pt2").write_bytes(saved(Answers().eval(), (torch.zeros(1, 3, 8, 8),)))
    with caplog.at_level(logging.WARNING):
        module = load(Request(str(tmp_path / "model.pt2"))).module
    found, images = module(pixels=torch.ones(2, 3, 8, 8)), torch.ones(2, 3, 8, 8)
    assert list(found) == ["logits", "hidden"]
    torch.testing.assert_close(found["logits"], small()(images))
    assert "out_spec of the program is somewhere.Answer; it is read as a dict of logits, hidden" in caplog.text


def test_a_torchscript_file_names_both_ways_out(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # tracing is deprecated
        torch.jit.save(torch.jit.trace(small(), torch.zeros(2, 3, 8, 8)), tmp_path / "script.pt")
    with pytest.raises(LoadError, match=r"TorchScript archive.*torch\.export\.save, or .*--arch pkg\.mod:factory"):
        load(Request(str(tmp_path / "script.pt")))
