"""The preprocessing of a model's images: what the model records, what was asked for, and what had to be assumed."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.hugging_face_config import size_of
from mpcompile.frontend.label_names import labels_of
from mpcompile.ir.model import INTERPOLATIONS
from mpcompile.ir.source import Source

LARGEST_SIDE = 65536  # pixels
ASSUMABLE = ("mean", "std", "interpolation", "crop_pct")  # fields of Source that have a usual value


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Preprocessing that is asked for, by options, a name or a file. The fields are those of Source; None: not asked.

    `resize` and `crop_pct` exclude each other.
    """

    size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    resize: tuple[int, ...] | None = None
    channel_order: str | None = None

    def over(self, other: "Preprocessing") -> "Preprocessing":
        """This preprocessing, completed by the other where this one asks for nothing.

        Raises UsageError if the other's `resize` was meant for another input size than this one's.
        """
        if self.resize is not None or self.crop_pct is not None:
            other = replace(other, resize=None, crop_pct=None)
            other = replace(other, crop_mode=None) if self.resize is not None else other
        if other.resize and self.size and other.size and self.size[1:] != other.size[1:]:
            raise UsageError(
                f"the preprocessing resizes to {'x'.join(map(str, other.resize))} for an input of "
                f"{other.size[1]}x{other.size[2]}, but --input-size is {'x'.join(map(str, self.size))}; give --resize "
                "or --crop-pct too"
            )
        return Preprocessing(
            **{row.name: _first(getattr(self, row.name), getattr(other, row.name)) for row in fields(self)}
        )


def _first(value: Any, other: Any) -> Any:
    return other if value is None else value


def source_of(
    module: nn.Module,
    *,
    name: str,
    arch: str,
    sha256: str,
    arch_args: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    published: bool = False,
) -> Source:
    """A Source with the preprocessing that the model records; where it records none, timm's default: ImageNet's.

    Args:
        module: its `pretrained_cfg`, timm's record, gives the values.
        name: the Source's.
        arch: the Source's.
        sha256: the Source's.
        arch_args: `img_size` and `in_chans` in it take precedence over the record, and over a config of transformers.
        record: what the file of the weights records, by timm's keys; None if `pretrained_cfg` is the whole record.
        published: whether `pretrained_cfg` describes the published weights of the architecture, and the module has
            others. `record` takes precedence over it, and its values count as assumed.

    Raises LoadError if the record is invalid.
    """
    try:
        return _recorded(module, name, arch, sha256, arch_args, record, published)
    except Exception as error:  # a config.json may hold anything as mean, std, input_size …
        raise LoadError(f"{name}: the preprocessing recorded for {arch} cannot be read: {error}") from error


def _recorded(
    module: nn.Module,
    name: str,
    arch: str,
    sha256: str,
    arch_args: Mapping[str, Any] | None,
    record: Mapping[str, Any] | None,
    published: bool,
) -> Source:
    from timm.data import resolve_data_config

    args = {**size_of(module), **(arch_args or {})}
    try:
        recorded_args = None if arch_args is None else json.loads(json.dumps(dict(arch_args)))
    except (TypeError, ValueError):  # not JSON: a class or a function, such as norm_layer
        recorded_args = None
    of_module = getattr(module, "pretrained_cfg", None) or {}
    known = of_module if record is None else record
    own = {key: known[key] for key in ASSUMABLE if known.get(key)} if published else {}
    in_chans = args.get("in_chans", (of_module.get("input_size") or (3,))[0])
    cfg = resolve_data_config({"in_chans": in_chans, **own}, pretrained_cfg=of_module)
    recorded_size = cfg["input_size"][1:]
    side = args.get("img_size", recorded_size)
    height, width = (side, side) if isinstance(side, int) else side
    channels = args.get("in_chans", cfg["input_size"][0])
    mean, std = (per_channel(tuple(map(float, cfg[key])), channels) for key in ("mean", "std"))
    labels = labels_of(module)
    texts = {"interpolation": cfg["interpolation"], "crop_mode": cfg["crop_mode"]}
    for key, value in (*texts.items(), *(("label_names", label) for label in labels)):
        if not isinstance(value, str):
            raise TypeError(f"{key} has {value!r}, which is not text")
    assumed = tuple(key for key in ASSUMABLE if not known.get(key))
    from_architecture = published and all(of_module.get(key) for key in assumed)
    same_size = (height, width) == tuple(recorded_size)
    return Source(
        name=name,
        sha256=sha256,
        arch=arch,
        size=(channels, height, width),
        mean=mean,
        std=std,
        **texts,
        crop_pct=float(cfg["crop_pct"]),
        labels=labels,
        arch_args=recorded_args,
        keep_exact="crop_pct" in assumed and not (from_architecture and same_size),
        preprocessing="recorded" if not assumed else "architecture" if from_architecture else "assumed",
        assumed=assumed,
    )


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value for each channel: the values themselves, or their mean if there are more or fewer of them."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def with_preprocessing(source: Source, asked: Preprocessing, preset: Preprocessing | None, name: str | None) -> Source:
    """The source with the preprocessing that is asked for, completed by that of a preset with this name.

    If the input's size changes, a crop that was taken from the architecture's configuration holds for other images:
    images that already have the new size are then neither resized nor cropped. Raises UsageError for values that
    contradict each other or cannot be.
    """
    channels = (asked.size or source.size)[0]
    if preset is not None:
        mean, std = (values and per_channel(values, channels) for values in (preset.mean, preset.std))
        size = preset.size and (channels, *preset.size[1:])
        asked = asked.over(replace(preset, mean=mean, std=std, size=size))
    given = {row.name: value for row in fields(asked) if (value := getattr(asked, row.name)) is not None}
    if "resize" in given and "crop_pct" in given:
        raise UsageError("--resize and --crop-pct contradict each other; give one of them")
    cropped = "resize" in given or "crop_pct" in given
    assumed = tuple(key for key in source.assumed if key not in given and not (key == "crop_pct" and cropped))
    changed = replace(source, **given)
    result = replace(
        changed,
        keep_exact="crop_pct" in assumed and (source.keep_exact or changed.size[1:] != source.size[1:]),
        assumed=assumed,
        preprocessing=name or source.preprocessing,
    )
    _require_possible(result)
    return result


def _require_possible(source: Source) -> None:
    """Raises UsageError if the preprocessing of a source cannot be."""
    if not all(isinstance(side, int) and 0 < side <= LARGEST_SIDE for side in source.size):
        raise UsageError(
            f"images of {source.size} (channels, height, width): each is 1 to {LARGEST_SIDE:,} (--input-size)"
        )
    if not all(map(math.isfinite, source.mean + source.std)) or min(source.std) <= 0:
        raise UsageError(
            f"means {source.mean} and standard deviations {source.std} must be finite, and standard deviations above 0"
        )
    if not len(source.mean) == len(source.std) == source.size[0]:
        raise UsageError(
            f"images of {source.size[0]} channels need as many means and standard deviations; there are "
            f"{len(source.mean)} and {len(source.std)} (--mean, --std)"
        )
    if source.channel_order == "bgr" and source.size[0] != 3:
        raise UsageError(f"--channel-order bgr is for images of 3 channels, and the model takes {source.size[0]}")
    if source.resize is not None:
        sides = source.resize if len(source.resize) == 2 else source.resize * 2
        if not all(have >= need for have, need in zip(sides, source.size[1:], strict=True)):
            raise UsageError(
                f"--resize {'x'.join(map(str, source.resize))} is smaller than the model's input "
                f"({source.size[1]}x{source.size[2]}); give at least that size"
            )


def check_asked(asked: Preprocessing) -> None:
    """Raises UsageError if an option has a value that no model allows."""
    if asked.interpolation is not None and asked.interpolation not in INTERPOLATIONS:
        raise UsageError(f"interpolation {asked.interpolation!r} is unknown; give one of {', '.join(INTERPOLATIONS)}")
    if asked.channel_order is not None and asked.channel_order not in ("rgb", "bgr"):
        raise UsageError(f"channel order {asked.channel_order!r} is unknown; give rgb or bgr")
    if asked.crop_pct is not None and not 0 < asked.crop_pct <= 1:
        raise UsageError(f"crop_pct {asked.crop_pct:g} is not a share of the image above 0 and up to 1; give 0.875")
    if asked.resize is not None and not (
        len(asked.resize) in (1, 2) and all(0 < side <= LARGEST_SIDE for side in asked.resize)
    ):
        raise UsageError(f"resize {asked.resize} is not one or two numbers from 1 to {LARGEST_SIDE:,}; give 256")


def assumption(source: Source, pixels_only: bool = False) -> str | None:
    """A sentence on what was assumed about the preprocessing; None if nothing was.

    `pixels_only`: the images have the input's size already, as in an .npz file, so that only mean and deviation matter.
    """
    used = [key for key in source.assumed if not pixels_only or key in ("mean", "std")]
    if not used:
        return None
    height, width = source.size[1:]
    values = {
        "mean": f"mean {_listed(source.mean)}",
        "std": f"standard deviation {_listed(source.std)}",
        "interpolation": f"{source.interpolation} interpolation",
        "crop_pct": f"crop_pct {source.crop_pct:g}"
        + (f" (images of {height}x{width} pixels are neither resized nor cropped)" if source.keep_exact else ""),
    }
    origins = {"architecture": f"timm's configuration of {source.arch}, ", "assumed": "ImageNet's usual values, "}
    return (
        f"preprocessing is not recorded in the model: assumed {origins.get(source.preprocessing, '')}"
        f"{', '.join(values[key] for key in used)}; give --preprocess if it was trained otherwise, or let "
        "mpcompile doctor MODEL --data find it"
    )


def _listed(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"
