"""The evaluation transform: timm's where the model records it, and what is done to images of the input's size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from mpcompile.data.loading import load_data
from mpcompile.data.npz import ArrayImages
from mpcompile.data.transform import evaluation_transform
from mpcompile.errors import LoadError
from mpcompile.frontend.load_model import Request, load
from mpcompile.frontend.preprocessing import Preprocessing, source_of, with_preprocessing
from mpcompile.ir.source import Source
from mpcompile.passes.distill.augmentation import Augmentation, training_transform

SOURCE = Source(name="m", sha256="", arch="m", size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 1.0))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def normalized(image: Image.Image, source: Source) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(source.mean)[:, None, None]) / torch.tensor(source.std)[:, None, None]


def unrecorded(size: tuple[int, int, int]) -> Source:
    """The Source of a module that records nothing, with the input size of an option."""
    source = source_of(nn.Flatten(), name="m", arch="m", sha256="")
    return with_preprocessing(source, Preprocessing(size=size), None, None)


def test_images_of_the_input_size_are_not_touched_if_the_model_records_no_preprocessing(tmp_path: Path) -> None:
    """They were enlarged to 36 and cropped to 32, which cost a ResNet-20 5.2 points on CIFAR-10."""
    for index in range(4):
        (tmp_path / "cat").mkdir(exist_ok=True)
        picture(32, 32, index).save(tmp_path / "cat" / f"{index}.png")
    source = unrecorded((3, 32, 32))
    images = load_data(tmp_path, source, outputs=1, calibration=1).held_out
    [(pixels, _)] = list(images.batches())
    for row, index in zip(pixels, images.order, strict=True):
        torch.testing.assert_close(row, normalized(picture(32, 32, index), source), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(33, 32), (40, 40), (32, 64), (300, 200)])
def test_other_images_are_resized_and_cropped_as_timm_does(height: int, width: int) -> None:
    source, image = unrecorded((3, 32, 32)), picture(height, width)
    timms = create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.875)
    assert torch.equal(evaluation_transform(source)(image), timms(image))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_recorded_preprocessing_is_timms_bit_for_bit(name: str) -> None:
    module = timm.create_model(name)
    source = source_of(module, name=name, arch=name, sha256="")
    timms = create_transform(**resolve_model_data_config(module))
    for image in (picture(224, 224), picture(300, 260)):
        assert torch.equal(evaluation_transform(source)(image), timms(image))
    assert (source.preprocessing, source.assumed, source.keep_exact) == ("recorded", (), False)


def test_a_crop_that_is_asked_for_is_made_of_images_of_the_input_size_too() -> None:
    source = with_preprocessing(unrecorded((3, 32, 32)), Preprocessing(crop_pct=0.875), None, None)
    timms = create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.875)
    assert torch.equal(evaluation_transform(source)(picture(32, 32)), timms(picture(32, 32)))


def test_resize_to_a_number_of_pixels() -> None:
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    image, bilinear = picture(60, 80), InterpolationMode.BILINEAR
    for resize, argument in (((40,), 40), ((32, 32), (32, 32)), ((40, 36), (40, 36))):
        source = replace(SOURCE, resize=resize, interpolation="bilinear")
        expected = normalized(CenterCrop(32)(Resize(argument, bilinear)(image)), source)
        torch.testing.assert_close(evaluation_transform(source)(image), expected, rtol=0, atol=1e-6)


def test_bgr_reverses_the_channels_before_mean_and_deviation(tmp_path: Path) -> None:
    image, source = picture(32, 32), replace(SOURCE, channel_order="bgr", crop_pct=1.0)
    bgr = Image.fromarray(np.asarray(image)[..., ::-1].copy())
    torch.testing.assert_close(evaluation_transform(source)(image), normalized(bgr, source), rtol=0, atol=1e-6)
    arrays = ArrayImages(
        np.array(image)[None], np.array([0]), 1, torch.tensor(source.mean), torch.tensor(source.std), "bgr"
    )
    torch.testing.assert_close(arrays[0][0], normalized(bgr, source), rtol=0, atol=1e-6)
    still = Augmentation(scale=1.0, flip=0.0, policy=None, erasing=0.0)
    grey_ramp = Image.new("RGB", (32, 32), (10, 120, 250))  # one colour: a random crop changes nothing
    trained = training_transform(still, source)(grey_ramp)
    torch.testing.assert_close(trained, evaluation_transform(source)(grey_ramp), rtol=0, atol=1e-6)


def test_an_interpolation_that_pil_has_not_is_refused_when_images_are_read() -> None:
    with pytest.raises(LoadError, match="names the interpolation 'area', which PIL has not; give --interpolation"):
        evaluation_transform(replace(SOURCE, interpolation="area"))


def test_an_architecture_whose_input_size_is_changed_keeps_images_of_that_size(tmp_path: Path) -> None:
    """The crop that timm records was chosen for images of 224 × 224 pixels."""
    torch.save(timm.create_model("resnet18", num_classes=10).state_dict(), tmp_path / "m.pt")
    request = Request(str(tmp_path / "m.pt"), arch="resnet18")
    changed = load(replace(request, input_size=(3, 32, 32))).source
    image = picture(32, 32)
    torch.testing.assert_close(evaluation_transform(changed)(image), normalized(image, changed), rtol=0, atol=1e-6)
    assert not load(request).source.keep_exact
