"""Loading: every kind of file by content, nothing pickled is run, and each mistake gets one clear line."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_model import ARCH, build
from torch import nn

from mpcompile.errors import LoadError, MpcompileError, UsageError
from mpcompile.frontend.load_model import Request, load
from mpcompile.system.tensor_hashing import state_sha256


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(1)
    return build()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return state_sha256(a) == state_sha256(b)


# ---- what loads


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_safetensors_by_content(module: nn.Module, tmp_path: Path, suffix: str) -> None:
    save_file(module.state_dict(), tmp_path / f"model{suffix}")
    loaded = load(Request(str(tmp_path / f"model{suffix}"), arch=ARCH))
    assert same_weights(loaded.module, module)
    assert not loaded.module.training
    assert loaded.source.size == (3, 224, 224)
    assert len(loaded.source.sha256) == 64


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_state_dict_by_content(module: nn.Module, tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert same_weights(load(Request(str(path), arch=ARCH)).module, module)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."])
def test_prefixes_of_wrappers_are_taken_off(module: nn.Module, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "model.pt"
    torch.save({prefix + name: value for name, value in module.state_dict().items()}, path)
    assert same_weights(load(Request(str(path), arch=ARCH)).module, module)


def test_timm_training_checkpoint_names_its_architecture(tmp_path: Path) -> None:
    module, average = build(num_classes=7), build(num_classes=7)
    path = tmp_path / "last.pth.tar"
    args = argparse.Namespace(model=ARCH, num_classes=7)
    state = {"epoch": 3, "arch": ARCH, "state_dict": module.state_dict(), "args": args}
    torch.save(state, path)
    loaded = load(Request(str(path)))
    assert same_weights(loaded.module, module)
    assert loaded.source.arch == ARCH
    torch.save({**state, "state_dict_ema": average.state_dict()}, path)
    assert same_weights(load(Request(str(path))).module, average)  # as timm does


def test_the_number_of_classes_is_read_from_the_weights(tmp_path: Path) -> None:
    module = build(num_classes=7)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    assert same_weights(load(Request(str(tmp_path / "model.pt"), arch=ARCH)).module, module)


def test_timm_config_beside_the_weights(example: Path) -> None:
    loaded = load(Request(str(example / "model.safetensors")))
    assert loaded.source.size == (1, 28, 28)
    assert loaded.source.mean == (0.286,)
    assert loaded.source.labels[0] == "t-shirt"
    assert next(loaded.module.parameters()).dtype == torch.float32  # stored as fp16


def test_factories(module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(
        f"import timm\ndef small(**kw):\n    return timm.create_model({ARCH!r}, **kw)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load(Request("own_models:small", arch_args={"num_classes": 3})).module.get_classifier().out_features == 3  # type: ignore[operator]
    torch.save(module.state_dict(), tmp_path / "model.pt")
    assert same_weights(load(Request(str(tmp_path / "model.pt"), arch="own_models:small")).module, module)


def test_timm_names_warn_that_weights_are_random(caplog: pytest.LogCaptureFixture) -> None:
    assert load(Request(f"timm:{ARCH}")).source.arch == ARCH
    assert "random weights" in caplog.text


def test_a_pickled_module_only_where_allowed(module: nn.Module, tmp_path: Path) -> None:
    torch.save(module, tmp_path / "whole.pt")
    with pytest.raises(LoadError, match="holds pickled code.*--allow-pickle"):
        load(Request(str(tmp_path / "whole.pt")))
    loaded = load(Request(str(tmp_path / "whole.pt"), allow_pickle=True))
    assert same_weights(loaded.module, module)
    torch.save({"epoch": 1, "model": module}, tmp_path / "inside.pt")
    assert same_weights(load(Request(str(tmp_path / "inside.pt"), allow_pickle=True)).module, module)


def test_preprocessing_can_be_given(tmp_path: Path) -> None:
    source = load(Request(f"timm:{ARCH}", input_size=(3, 96, 96), mean=(0.5,) * 3, std=(0.25,) * 3)).source
    assert (source.size, source.mean, source.std) == ((3, 96, 96), (0.5,) * 3, (0.25,) * 3)


def test_size_and_channels_follow_the_arguments_of_the_architecture() -> None:
    request = Request("timm:vit_tiny_patch16_224", arch_args={"img_size": 64, "in_chans": 1})
    source = load(request).source
    assert (source.size, source.mean, source.std) == ((1, 64, 64), (0.5,), (0.5,))
    with pytest.raises(UsageError, match="images of 1 channels need as many means"):
        load(Request("timm:vit_tiny_patch16_224", arch_args={"in_chans": 1}, mean=(0.5,) * 3))


# ---- what is refused


def test_a_wrong_architecture_lists_keys_of_each_kind(module: nn.Module, tmp_path: Path) -> None:
    torch.save(module.state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        LoadError, match=r"does not fit resnet18: \d+ missing: conv1.weight, .*, …; \d+ unexpected: conv_stem"
    ):
        load(Request(str(tmp_path / "model.pt"), arch="resnet18"))
    with pytest.raises(LoadError, match=r"of another shape: conv_stem.weight \(16, 3, 3, 3\) against"):
        load(Request(str(tmp_path / "model.pt"), arch="mobilenetv3_small_050", arch_args={"in_chans": 1}))


@pytest.mark.parametrize(
    ("request_", "kind", "text"),
    [
        (
            Request("nowhere.pt"),
            LoadError,
            "nowhere.pt does not exist; a model is a file, a folder of save_pretrained, hf:ORG/NAME, timm:NAME or pkg",
        ),
        (Request("timm:vit_tinny_patch16_224"), UsageError, "timm has no architecture 'vit_tinny_patch16_224'"),
        (Request("timm:vit_tiny_patch16"), UsageError, "near it: vit_tiny_patch16_224"),
        (Request(f"timm:{ARCH}", arch_args={"wings": 2}), LoadError, "could not be built with {'wings': 2}"),
        (Request("no_such_package.models:make"), LoadError, "could not be imported: ModuleNotFoundError"),
        (Request("builtins:dict"), LoadError, "returned a dict; it must return a torch.nn.Module"),
    ],
)
def test_other_mistakes(request_: Request, kind: type[MpcompileError], text: str) -> None:
    with pytest.raises(kind, match=text):
        load(request_)


def test_code_that_exits_or_prints_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "prints.py").write_text(
        "import torch\ndef make():\n    print('building')\n    return torch.nn.Linear(2, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match="could not be imported: SystemExit"):
        load(Request("exits:make"))
    load(Request("prints:make"))
    assert capsys.readouterr() == ("", "building\n")


def test_a_config_without_arguments(module: nn.Module, tmp_path: Path) -> None:
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(f'{{"architecture": "{ARCH}", "model_args": null}}')
    assert same_weights(load(Request(str(tmp_path / "model.safetensors"))).module, module)


@pytest.mark.parametrize("changes", [{"std": (0.0,) * 3}, {"mean": (float("nan"),) * 3}, {"std": (-1.0,) * 3}])
def test_preprocessing_that_cannot_be(changes: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(UsageError, match="must be finite, and standard deviations above 0"):
        load(Request(f"timm:{ARCH}", **changes))  # type: ignore[arg-type]


def test_weights_without_an_architecture(module: nn.Module, tmp_path: Path) -> None:
    torch.save(module.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="holds weights but no architecture; name it with --arch"):
        load(Request(str(tmp_path / "model.pt")))
    with pytest.raises(LoadError, match="is a folder"):
        load(Request(str(tmp_path)))
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "empty.pt")
    with pytest.raises(LoadError, match=r"holds no tensors \(its keys: epoch, lr\)"):
        load(Request(str(tmp_path / "empty.pt"), arch=ARCH))


def test_a_config_whose_preprocessing_is_an_empty_list(module: nn.Module, example: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((example / "model.safetensors").read_bytes())
    config = json.loads((example / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": []}))
    loaded = load(Request(str(weights), input_size=(1, 28, 28), mean=(0.5,), std=(0.5,)))
    assert loaded.source.arch == config["architecture"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("label_names", ["boot", ["bag"]]), ("interpolation", 3), ("crop_mode", ["center"]), ("crop_pct", "all")],
)
def test_a_config_whose_preprocessing_is_of_other_types(example: Path, tmp_path: Path, key: str, value: object) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((example / "model.safetensors").read_bytes())
    config = json.loads((example / "config.json").read_text())
    config["pretrained_cfg"] = {**config["pretrained_cfg"], key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="the preprocessing recorded for .* cannot be read: "):
        load(Request(str(weights)))
