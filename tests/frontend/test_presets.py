"""Preprocessing by name, from torchvision's weights and from JSON files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from mpcompile.cli.choices import CHANNEL_ORDERS, INTERPOLATIONS, PREPROCESSING
from mpcompile.data.transform import evaluation_transform
from mpcompile.errors import UsageError
from mpcompile.frontend.load_model import Request, load
from mpcompile.frontend.presets import PRESETS, preset_named
from mpcompile.ir import model

VIT = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}  # fmt: skip
CLIP = {
    "feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 224, "do_center_crop": True, "do_normalize": True,
    "do_resize": True, "image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.26, 0.27], "resample": 3, "size": 224,
}  # fmt: skip
DINO = {
    "image_processor_type": "BitImageProcessor", "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "do_convert_rgb": True,
    "size": {"shortest_edge": 256},
}  # fmt: skip


def written(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_the_names_in_help_are_those_of_the_code() -> None:
    assert list(PREPROCESSING) == list(PRESETS)
    assert tuple(INTERPOLATIONS) == model.INTERPOLATIONS
    assert set(CHANNEL_ORDERS) == {"rgb", "bgr"}


@pytest.mark.parametrize("name", ["ResNet50_Weights.IMAGENET1K_V2", "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1"])
def test_torchvisions_weights_give_torchvisions_pixels(name: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 600, 3), np.uint8))
    source = load(Request("timm:resnet18", preprocess=f"torchvision:{name}")).source
    expected = torchvision.models.get_weight(name).transforms()(image)
    assert torch.equal(evaluation_transform(source)(image), expected)


def test_a_file_of_hugging_face(tmp_path: Path) -> None:
    vit = preset_named(written(tmp_path, VIT))
    assert (vit.size, vit.resize, vit.interpolation, vit.mean) == ((3, 224, 224), (224, 224), "bilinear", (0.5,) * 3)
    clip = preset_named(written(tmp_path, CLIP))
    assert (clip.size, clip.resize, clip.interpolation) == ((3, 224, 224), (224,), "bicubic")
    dino = preset_named(written(tmp_path, DINO))
    assert (dino.size, dino.resize, dino.channel_order) == ((3, 224, 224), (256,), "rgb")
    source = load(Request("timm:resnet18", preprocess=written(tmp_path, DINO))).source
    assert (source.resize, source.interpolation, source.assumed) == ((256,), "bicubic", ())


@pytest.mark.parametrize(
    ("changes", "mean", "std", "order"),
    [
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3, "rgb"),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51] * 3}, (0.5,) * 3, (0.2,) * 3, "rgb"),
        ({"rescale_factor": 2 / 255}, (0.25,) * 3, (0.25,) * 3, "rgb"),
        ({"include_top": True}, (0.5,) * 3, (0.25,) * 3, "rgb"),  # EfficientNet: divided by the deviation again
        ({"do_flip_channel_order": True, "image_mean": [0.1, 0.2, 0.3]}, (0.1, 0.2, 0.3), (0.5,) * 3, "bgr"),
    ],
)
def test_the_scale_of_pixels_in_a_file_of_hugging_face(
    tmp_path: Path, changes: dict[str, object], mean: tuple[float, ...], std: tuple[float, ...], order: str
) -> None:
    found = preset_named(written(tmp_path, VIT | changes))
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(std)
    assert found.channel_order == order


def test_convnext_resizes_by_its_crop_pct_below_384_pixels(tmp_path: Path) -> None:
    convnext = DINO | {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875, "crop_size": None}
    small = preset_named(written(tmp_path, convnext | {"size": {"shortest_edge": 224}}))
    assert (small.size, small.resize) == ((3, 224, 224), (256,))
    large = preset_named(written(tmp_path, convnext | {"size": {"shortest_edge": 384}}))
    assert (large.size, large.resize) == ((3, 384, 384), (384, 384))


def test_levit_enlarges_its_size(tmp_path: Path) -> None:
    """Transformers resizes the shorter side to 256/224 of the size; here it was the size, one zoom too close."""
    levit = DINO | {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 224}}
    assert preset_named(written(tmp_path, levit)).resize == (256,)


def test_images_that_keep_their_ratio_need_a_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    detr = VIT | {"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_pad": True}
    with pytest.raises(UsageError, match="images keep their ratio .*--input-size 3x800x1088"):
        preset_named(written(tmp_path, detr))
    source = load(Request("timm:resnet18", preprocess=written(tmp_path, detr), input_size=(3, 64, 96))).source
    assert (source.size, source.crop_mode, source.crop_pct, source.resize) == ((3, 64, 96), "squash", 1.0, None)
    assert "here both sides are resized" in caplog.text


def test_the_processor_of_a_model_of_images_and_text(tmp_path: Path) -> None:
    assert preset_named(written(tmp_path, {"processor_class": "CLIPProcessor", "image_processor": CLIP})).resize == (
        224,
    )


def test_a_file_by_the_names_of_source_or_of_timm(tmp_path: Path) -> None:
    own = preset_named(written(tmp_path, {"size": [3, 32, 32], "mean": [0.1] * 3, "std": [0.2] * 3, "resize": 36}))
    assert (own.size, own.mean, own.std, own.resize) == ((3, 32, 32), (0.1,) * 3, (0.2,) * 3, (36,))
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "crop_pct": 0.9, "crop_mode": "squash", "classifier": "fc"}
    for content in (cfg, {"architecture": "resnet18", "pretrained_cfg": cfg}):
        timms = preset_named(written(tmp_path, content))
        assert (timms.size, timms.crop_pct, timms.crop_mode) == ((3, 64, 64), 0.9, "squash")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1], "holds list; needed is a mapping"),
        ({}, "the keys are missing; needed are some of size, mean"),
        ({"average": 3}, "the keys average; needed are some of size, mean"),
        ({"mean": ["a"]}, "a value of the wrong type"),
        ({"size": [32, 32]}, r"the size is \[32, 32\]; needed are channels, height and width"),
        ({"crop_mode": "corner"}, "crop_mode is 'corner'; needed is one of center"),
        ({"interpolation": 3}, "interpolation '3' is unknown"),
        (VIT | {"do_align_long_axis": True}, "do_align_long_axis is not supported"),
        (VIT | {"rescale_offset": True}, "rescale_offset is not supported"),
        (VIT | {"resample": 9}, "resample is 9; needed is one of PIL's numbers"),
        (VIT | {"image_std": None}, "image_mean and image_std are missing"),
        (VIT | {"size": 224, "image_processor_type": "Mine"}, "size 224 is of the shorter side or of both, and Mine"),
        (VIT | {"size": {"max_pixels": 3}}, "is not understood; needed are height and width"),
        (VIT | {"size": {"longest_edge": 3}}, "images keep their ratio .longest_edge 3., and a compressed model takes"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: object, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        preset_named(written(tmp_path, content))


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file; give a .json file, or a name"):
        preset_named(str(tmp_path / "no.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        preset_named(str(tmp_path / "bad.json"))
    with pytest.raises(UsageError, match="torchvision has no weights 'ResNet50_Weights.V9'"):
        preset_named("torchvision:ResNet50_Weights.V9")
    with pytest.raises(UsageError, match="are not weights of an image classifier"):
        preset_named("torchvision:FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1")
