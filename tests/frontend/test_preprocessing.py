"""The preprocessing that a model records, that options ask for, and that is assumed."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mpcompile.errors import UsageError
from mpcompile.frontend.load_model import Request, load
from mpcompile.frontend.preprocessing import ASSUMABLE, assumption, source_of
from mpcompile.ir.source import Source

ARCH = "mobilenetv3_small_050"


def recorded(**cfg: object) -> Source:
    module = nn.Flatten()
    module.pretrained_cfg = cfg  # type: ignore[assignment]
    return source_of(module, name="m", arch="Flatten", sha256="")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A state dict without any record."""
    torch.save(timm.create_model(ARCH, num_classes=10).state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_what_is_not_recorded_is_assumed_and_named() -> None:
    source = source_of(nn.Flatten(), name="m", arch="Flatten", sha256="")
    assert (source.preprocessing, source.assumed, source.keep_exact) == ("assumed", ASSUMABLE, True)
    assert (assumption(source) or "").startswith(
        "preprocessing is not recorded in the model: assumed ImageNet's usual values, mean (0.485, 0.456, 0.406), "
        "standard deviation (0.229, 0.224, 0.225), bicubic interpolation, crop_pct 0.875 (images of 224x224 pixels are "
        "neither resized nor cropped); give --preprocess"
    )


def test_a_record_in_part() -> None:
    source = recorded(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert source.assumed == ("interpolation", "crop_pct")
    assert "assumed ImageNet's usual values, bicubic interpolation, crop_pct 0.875" in (assumption(source) or "")
    assert assumption(source, pixels_only=True) is None  # arrays are neither resized nor cropped
    whole = recorded(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
    assert (whole.preprocessing, whole.assumed, assumption(whole)) == ("recorded", (), None)


def test_weights_without_a_record_take_the_architectures_and_say_so(weights: Path) -> None:
    source = load(Request(str(weights), arch=ARCH)).source
    timms = load(Request(f"timm:{ARCH}")).source
    assert (source.mean, source.std, source.crop_pct) == (timms.mean, timms.std, timms.crop_pct)
    assert (source.preprocessing, source.assumed) == ("architecture", ASSUMABLE)
    assert f"assumed timm's configuration of {ARCH}, mean" in (assumption(source) or "")
    assert timms.preprocessing == "recorded"


def test_the_command_line_in_a_timm_checkpoint_is_a_record(tmp_path: Path) -> None:
    args = argparse.Namespace(mean=[0.1, 0.2, 0.3], std=None, crop_pct=1.0, interpolation="", num_classes=10)
    state = timm.create_model(ARCH, num_classes=10).state_dict()
    torch.save({"arch": ARCH, "args": vars(args), "state_dict": state}, tmp_path / "last.pth.tar")
    source = load(Request(str(tmp_path / "last.pth.tar"))).source
    assert (source.mean, source.crop_pct, source.assumed) == ((0.1, 0.2, 0.3), 1.0, ("std", "interpolation"))


def test_a_config_beside_the_weights_is_a_record(tmp_path: Path) -> None:
    save_file(timm.create_model(ARCH, num_classes=10).state_dict(), tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    config = {"architecture": ARCH, "num_classes": 10, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(Request(str(tmp_path / "model.safetensors"))).source.preprocessing == "recorded"
    del cfg["crop_pct"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = load(Request(str(tmp_path / "model.safetensors"))).source
    assert (source.assumed, source.keep_exact) == (("crop_pct",), True)


def test_options_win_over_presets_and_presets_over_the_record() -> None:
    request = Request(f"timm:{ARCH}", preprocess="cifar10", mean=(0.1, 0.2, 0.3), interpolation="lanczos")
    source = load(request).source
    assert (source.mean, source.std, source.crop_pct) == ((0.1, 0.2, 0.3), (0.2470, 0.2435, 0.2616), 1.0)
    assert (source.interpolation, source.preprocessing, source.channel_order) == ("lanczos", "cifar10", "rgb")
    assert load(replace(request, crop_pct=0.9)).source.crop_pct == 0.9
    resized = load(replace(request, resize=(256,))).source
    assert (resized.resize, resized.preprocessing) == ((256,), "cifar10")
    cropped = load(Request(f"timm:{ARCH}", preprocess="torchvision:ResNet50_Weights.IMAGENET1K_V2", crop_pct=0.9))
    assert (cropped.source.resize, cropped.source.crop_pct) == (None, 0.9)


def test_what_is_given_is_not_assumed(weights: Path) -> None:
    request = Request(str(weights), arch=ARCH, input_size=(3, 32, 32), mean=(0.5,) * 3)
    source = load(request).source
    assert (source.assumed, source.keep_exact) == (("std", "interpolation", "crop_pct"), True)
    given = load(replace(request, resize=(36,), preprocess="clip")).source
    assert (given.assumed, given.keep_exact, assumption(given)) == ((), False, None)
    assert not load(replace(request, crop_pct=0.875)).source.keep_exact


def test_a_preset_for_a_model_of_grey_images() -> None:
    source = load(Request("timm:vit_tiny_patch16_224", arch_args={"in_chans": 1}, preprocess="cifar10")).source
    assert source.mean == pytest.approx((0.47337,), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resize": (256,), "crop_pct": 0.9}, "--resize and --crop-pct contradict each other"),
        ({"resize": (100,)}, r"--resize 100 is smaller than the model's input \(224x224\)"),
        ({"resize": (224, 100)}, "--resize 224x100 is smaller"),
        ({"interpolation": "area"}, "interpolation 'area' is unknown; give one of nearest, bilinear"),
        ({"channel_order": "gbr"}, "channel order 'gbr' is unknown; give rgb or bgr"),
        ({"crop_pct": 0.0}, "crop_pct 0 is not a share of the image above 0 and up to 1"),
        ({"crop_pct": float("nan")}, "crop_pct nan is not a share"),
        ({"crop_pct": 1.5}, "crop_pct 1.5 is not a share"),
        ({"resize": (0,)}, r"resize \(0,\) is not one or two numbers"),
        ({"preprocess": "imagnet"}, "--preprocess 'imagnet' is unknown; give imagenet, cifar10, clip, dinov2"),
        ({"channel_order": "bgr", "input_size": (1, 224, 224), "mean": (0.5,), "std": (0.5,)}, "is for images of 3"),
        (
            {"preprocess": "torchvision:ResNet50_Weights.IMAGENET1K_V2", "input_size": (3, 32, 32)},
            "the preprocessing resizes to 232 for an input of 224x224, but --input-size is 3x32x32; give --resize or",
        ),
    ],
)
def test_preprocessing_that_contradicts_itself(options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        load(Request(f"timm:{ARCH}", **options))  # type: ignore[arg-type]
