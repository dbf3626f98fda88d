"""Files of weights: pickled code is not run, damaged files are refused in one line."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_model import ARCH, build
from torch import nn

from mpcompile.errors import LoadError, MpcompileError
from mpcompile.frontend.load_model import Request, load


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(1)
    return build()


class Payload:
    """Pickles into a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", ["alone", "in a state dict"])
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, zipped: bool, inside: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "model.pt"
    content = Payload(victim) if inside == "alone" else {"weight": torch.zeros(2), "extra": Payload(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(LoadError, match="holds pickled code besides tensors, which was not run"):
        load(Request(str(path), arch=ARCH))
    assert not victim.exists()
    with pytest.raises(MpcompileError):
        load(Request(str(path), arch=ARCH, allow_pickle=True))
    # The payload does work: what kept it from running is the loader.
    assert victim.exists()


def test_a_bare_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Payload(victim)))
    with pytest.raises(LoadError):
        load(Request(str(path), arch=ARCH))
    assert not victim.exists()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"")
    return path


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        (b"<!doctype html><html>404</html>", "is none of safetensors, torch state dict or torch checkpoint"),
        (b"\x08\x07\x12\x07pytorch", "for an ONNX model give the PyTorch model"),
        (b"PK\x03\x04" + b"\0" * 60, "cut short or damaged"),
        (b"\x80\x02garbage that is no pickle", "damaged|cannot be unpickled|pickled code"),
        ((10**6).to_bytes(8, "little") + b'{"weight":{"dtype":', "not a valid safetensors file"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, content: bytes, text: str) -> None:
    with pytest.raises(LoadError, match=text) as error:
        load(Request(str(write(tmp_path / "model.pt", content)), arch=ARCH))
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_files_cut_short(module: nn.Module, tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "model"
    if kind == "safetensors":
        save_file(module.state_dict(), path)
    else:
        torch.save(module.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    write(path, path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(LoadError, match="cut short|damaged|cannot be unpickled"):
        load(Request(str(path), arch=ARCH))


def test_other_torch_archives(tmp_path: Path) -> None:
    for names, text in (
        (("m/code/x.py", "m/data.pkl"), "TorchScript"),
        (("m/archive_format", "m/models/model.json"), "torch.export"),
        (("readme.txt",), "without torch data"),
    ):
        with pytest.raises(LoadError, match=text):
            load(Request(str(archive(tmp_path / "m.pt", *names)), arch=ARCH))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(module: nn.Module, tmp_path: Path, value: float) -> None:
    state = {name: weight.clone() for name, weight in module.state_dict().items()}
    state["conv_head.weight"][0, 0] = value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"conv_head.weight has 1 of \d+ values that are NaN or infinite"):
        load(Request(str(tmp_path / "model.safetensors"), arch=ARCH))


def test_other_types_of_weights(module: nn.Module, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    torch.save(state | {"conv_head.weight": state["conv_head.weight"].to(torch.int8)}, tmp_path / "model.pt")
    with pytest.raises(LoadError, match="1 not floating-point: conv_head.weight int8"):
        load(Request(str(tmp_path / "model.pt"), arch=ARCH))
    eight = {
        name: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value for name, value in state.items()
    }
    torch.save(eight, tmp_path / "model.pt")
    load(Request(str(tmp_path / "model.pt"), arch=ARCH))  # as precise as it is


def test_an_archive_that_claims_to_span_disks(module: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(module.state_dict(), path)
    locator = b"PK\x06\x07" + bytes(12) + (7).to_bytes(4, "little")  # the end of an archive on seven disks
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    path.write_bytes(content[: end - len(locator)] + locator + content[end:])
    with pytest.raises(LoadError, match="cut short or damaged"):
        load(Request(str(path), arch="mpcompile.testing:TinyMLP"))


def test_keys_that_are_no_text(tmp_path: Path) -> None:
    torch.save({3: {"": 1}, 4: 2.0}, tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"holds no tensors \(its keys: 3, 4\)"):
        load(Request(str(tmp_path / "model.pt"), arch="mpcompile.testing:TinyMLP"))
