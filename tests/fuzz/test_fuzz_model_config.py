"""Random config.json files beside weights, and paths that are no model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzed_models import BASES, STATE, VIT, loaded, torch_file
from hypothesis import given
from mutations import altered, answer, deep, share
from safetensors.torch import save

from mpcompile.errors import LoadError, MpcompileError
from mpcompile.frontend.load_model import Request, load

pytestmark = pytest.mark.filterwarnings("default")  # warnings are errors in the suite, and not where it is used


ARGS = {"img_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 1, "num_classes": 3, "in_chans": 3}


CONFIG = {"architecture": VIT, "num_classes": 3, "model_args": {k: v for k, v in ARGS.items() if k != "num_classes"},
          "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                             "crop_pct": 0.9, "crop_mode": "center", "classifier": "head",
                             "first_conv": "patch_embed.proj",
                             "label_names": ["a", "b", "c"]}}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.pt"


def vit_state() -> dict[str, torch.Tensor]:
    import timm

    state: dict[str, torch.Tensor] = timm.create_model(VIT, **ARGS).state_dict()
    return state


def test_a_file_cannot_name_code_to_call(path: Path) -> None:
    """`arch` of a checkpoint and `architecture` of a config.json are data: only --arch may name a callable."""
    canary, beside = path.parent / "canary", path.with_name("config.json")
    call = {"cmd": f"touch {canary}"}
    request = Request(str(path))
    path.write_bytes(torch_file({"arch": "subprocess:getoutput", "args": {"model_kwargs": call}, "state_dict": STATE}))
    with pytest.raises(LoadError, match="names the code subprocess:getoutput as its architecture, which was not run"):
        load(request)
    path.write_bytes(BASES["safetensors"])
    beside.write_text(json.dumps({"architecture": "subprocess:getoutput", "model_args": call}))
    with pytest.raises(LoadError, match="names the code subprocess:getoutput as its architecture, which was not run"):
        load(request)
    beside.write_text(json.dumps({"architecture": VIT, "model_args": {"checkpoint_path": "other.pt"}}))
    with pytest.raises(LoadError, match="checkpoint_path, which names other files"):
        load(request)
    beside.unlink()
    assert not canary.exists()


@share(60, 1500)
@given(altered(CONFIG))
def test_configs(path: Path, config: Any) -> None:
    beside = path.with_name("config.json")
    path.write_bytes(VIT_BYTES)
    try:
        text = json.dumps(config, default=repr)
        if "embed_dim" in text and any(size in text for size in ("00000000", "1000000000000", "2147483648")):
            return  # building an architecture of that size is what was asked for
        beside.write_text(text, errors="surrogateescape")
        loaded(path, Request(""))
    finally:
        beside.unlink(missing_ok=True)


VIT_BYTES = save(vit_state())


@pytest.mark.parametrize("text", ["", "[", "[]", "null", deep("[", "]", 50_000), '{"architecture": 3}',
'{"architecture": null}', "\udcff",
                                  '{"architecture": "resnet18", "model_args": [1]}',
                                  '{"architecture": "resnet18", "pretrained_cfg": "x"}',
                                  '{"architecture": "x:y"}', '{"architecture": "hf-hub:a/b"}',
                                  '{"architecture": "local-dir:/tmp"}'])  # fmt: skip
def test_configs_that_are_none(path: Path, text: str) -> None:
    beside = path.with_name("config.json")
    path.write_bytes(VIT_BYTES)
    beside.write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        assert isinstance(loaded(path, Request("")), MpcompileError)
    finally:
        beside.unlink()


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = (
        tmp_path,
        tmp_path / "fifo",
        tmp_path / "dangling",
        tmp_path / "loop",
        "/dev/zero",
        "/dev/null",
        "x" * 5000,
        "a\0b",
        "",
    )
    for name in names:
        found = answer(lambda name=name: load(Request(str(name), arch="resnet18")))  # type: ignore[misc]
        assert isinstance(found, LoadError), name
