"""Preprocessing in a JSON file: by the names of Source, by timm's, or a Hugging Face `preprocessor_config.json`."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpcompile.errors import MpcompileError, UsageError
from mpcompile.frontend.preprocessing import Preprocessing, check_asked

log = logging.getLogger(__name__)

MAX_BYTES = 1_000_000
KEYS = ("size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "resize", "channel_order")
CROP_MODES = ("center", "squash", "border")
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers
# Keys of Hugging Face files that begin with do_ and change pixels in a way that is understood, or not at all.
UNDERSTOOD = {
    "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_flip_channel_order", "do_convert_rgb",
    "do_reduce_labels", "do_convert_annotations",
}  # fmt: skip
# Image processors that read a size of one number as the shorter side; the others in SQUARE resize both sides to it.
SHORTER_SIDE = ("CLIP", "ChineseCLIP", "ConvNext", "MobileNetV1", "MobileNetV2", "PoolFormer", "Bit")
# Image processors that normalise only if the file says so, although they write a mean.
NOT_NORMALIZED = ("MobileViT",)
SQUARE = ("ViT", "DeiT", "Beit", "Siglip", "Swin2SR", "EfficientNet", "Blip")


def read_preset(path: Path, sized: bool = False, asked: str = "--preprocess ") -> Preprocessing:
    """The preprocessing in a JSON file. Raises a UsageError that says what it cannot use.

    Args:
        path: the file.
        sized: whether the size of the images is known otherwise, for a file that keeps their ratio.
        asked: the option that named the file, for errors.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{asked}{path}: there is no such file; give a .json file, or a name such as imagenet")
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{asked}{path} has more than {MAX_BYTES:,} bytes; give a preprocessor_config.json")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{asked}{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{asked}{path} holds {type(content).__name__}; needed is a mapping with mean and std")
    try:
        found = _read(content, sized)
        check_asked(found)
    except MpcompileError as error:
        raise UsageError(f"{asked}{path}: {error}") from error
    except Exception as error:  # a value of another type than its key needs
        raise UsageError(f"{asked}{path} has a value of the wrong type: {type(error).__name__}: {error}") from error
    return found


def _read(content: Mapping[str, Any], sized: bool) -> Preprocessing:
    if isinstance(content.get("image_processor"), dict):  # a processor_config.json: images beside text
        content = content["image_processor"]
    if isinstance(content.get("pretrained_cfg"), dict):  # timm's config.json
        return _of_timm(content["pretrained_cfg"])
    if "image_mean" in content or any(key.startswith("do_") for key in content):
        return _of_hugging_face(content, sized)
    if "input_size" in content:
        return _of_timm(content)
    unknown = sorted(content.keys() - set(KEYS))
    if unknown or not content:
        raise UsageError(f"the keys {', '.join(unknown) or 'are missing'}; needed are some of {', '.join(KEYS)}")
    return _of_timm({**content, "input_size": content.get("size")})


def _of_timm(content: Mapping[str, Any]) -> Preprocessing:
    """Preprocessing by timm's keys; `resize` and `channel_order` as in Source."""
    size, resize, crop_pct = (content.get(key) for key in ("input_size", "resize", "crop_pct"))
    crop_mode = content.get("crop_mode")
    if crop_mode is not None and crop_mode not in CROP_MODES:
        raise UsageError(f"crop_mode is {crop_mode!r}; needed is one of {', '.join(CROP_MODES)}")
    if size is not None and not (len(size) == 3 and all(isinstance(side, int) for side in size)):
        raise UsageError(f"the size is {size}; needed are channels, height and width, such as [3, 224, 224]")
    return Preprocessing(
        size=None if size is None else (size[0], size[1], size[2]),
        mean=_numbers(content.get("mean")),
        std=_numbers(content.get("std")),
        interpolation=_text(content.get("interpolation")),
        crop_pct=None if crop_pct is None else float(crop_pct),
        crop_mode=crop_mode,
        resize=None if resize is None else (resize,) if isinstance(resize, int) else tuple(map(int, resize)),
        channel_order=_text(content.get("channel_order")),
    )


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(float, [values] if isinstance(values, int | float) else values))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _of_hugging_face(content: Mapping[str, Any], sized: bool) -> Preprocessing:
    """Preprocessing of a `preprocessor_config.json`, with transformers' rules. Raises UsageError."""
    if content.get("do_resize", True) and _keeps_ratio(content.get("size")):
        return _of_ratio(content, sized)
    others = [key for key, value in content.items() if key.startswith("do_") and value and key not in UNDERSTOOD]
    others += [key for key in ("rescale_offset",) if content.get(key)]  # EfficientNet's other range of pixels
    if others:
        raise UsageError(f"{', '.join(others)} is not supported; give the values by --mean, --std, --resize")
    mean, std = _statistics(content)
    resample = content.get("resample", 2)
    if resample not in RESAMPLE:
        raise UsageError(f"resample is {resample!r}; needed is one of PIL's numbers 0 to 5")
    resize = _resized(content) if content.get("do_resize", True) else None
    crop = _sides(content["crop_size"]) if content.get("crop_size") and content.get("do_center_crop", True) else None
    inner = crop or (None if resize is None else resize if len(resize) == 2 else resize * 2)
    if content.get("crop_pct") and resize is not None:  # ConvNext: the size is that after cropping
        side = resize[0]
        resize = (int(side / float(content["crop_pct"])),) if side < 384 else (side, side)
        inner = (side, side)
    return Preprocessing(
        size=None if inner is None else (3, inner[0], inner[1]),
        mean=mean,
        std=std,
        interpolation=RESAMPLE[resample],
        resize=resize,
        crop_pct=1.0 if resize is None else None,
        crop_mode="center" if resize is None else None,
        channel_order="bgr" if content.get("do_flip_channel_order") else "rgb",
    )


def _statistics(content: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation: (factor * pixel - mean) / std for pixels of 0 to 255, written for pixels of 0 to 1."""
    factor = 255 * float(content.get("rescale_factor", 1 / 255)) if content.get("do_rescale", True) else 255.0
    factor = 1.0 if abs(factor - 1) < 1e-6 else factor
    mean, std = _numbers(content.get("image_mean")), _numbers(content.get("image_std"))
    if not content.get("do_normalize", mean is not None and not _kind(content).startswith(NOT_NORMALIZED)):
        mean, std = (0.0,) * 3, (1.0,) * 3
    if mean is None or std is None:
        raise UsageError("image_mean and image_std are missing; give them, or do_normalize: false")
    again = _numbers(content.get("image_std")) if content.get("include_top") else None  # EfficientNet divides twice
    std = std if again is None else tuple(one * other for one, other in zip(std, again, strict=True))
    return tuple(value / factor for value in mean), tuple(value / factor for value in std)


def _keeps_ratio(size: object) -> bool:
    """Whether images are resized to a range of sides, so that each has another size: `longest_edge`, `max_height`."""
    return isinstance(size, Mapping) and bool({"longest_edge", "max_height", "max_width"} & size.keys())


def _of_ratio(content: Mapping[str, Any], sized: bool) -> Preprocessing:
    """Preprocessing of a model that takes images of any size, for one size: both sides are resized to it."""
    edges = ", ".join(f"{key} {value}" for key, value in content["size"].items())
    if not sized:
        raise UsageError(
            f"images keep their ratio ({edges}), and a compressed model takes one size; give it, such as "
            "--input-size 3x800x1088"
        )
    log.warning(
        "transformers resizes each image within %s; here both sides are resized to the model's input size", edges
    )
    fixed = {key: value for key, value in content.items() if key not in ("size", "do_pad", "pad_size")}
    read = _of_hugging_face({**fixed, "do_resize": False}, sized)
    return replace(read, crop_mode="squash")


def _resized(content: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The pixels that images are resized to: of the shorter side, or (height, width). Raises UsageError."""
    size = content.get("size")
    if size is None:
        return None
    if isinstance(size, Mapping) and "shortest_edge" in size and "longest_edge" not in size:
        # LeViT's image processor enlarges the side, as for a crop of 224 from 256 pixels.
        return (int(size["shortest_edge"] * (256 / 224 if _kind(content).startswith("Levit") else 1)),)
    if isinstance(size, int):
        kind = _kind(content)
        if kind.startswith(SHORTER_SIDE):
            return (size,)
        if not kind.startswith(SQUARE):
            raise UsageError(
                f"size {size} is of the shorter side or of both, and {kind or 'no image_processor_type'} does not "
                f'say which; write {{"shortest_edge": {size}}} or {{"height": {size}, "width": {size}}}'
            )
    return _sides(size)


def _kind(content: Mapping[str, Any]) -> str:
    """The class of the image processor; empty if the file does not say."""
    return str(content.get("image_processor_type") or content.get("feature_extractor_type") or "")


def _sides(size: Any) -> tuple[int, int]:
    """Height and width in a size of one number, two numbers, or a mapping. Raises UsageError."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    if isinstance(size, list) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise UsageError(f"the size {size} is not understood; needed are height and width, or shortest_edge")
