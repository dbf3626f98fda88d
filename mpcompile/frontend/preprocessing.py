"""The preprocessing that a model was trained with (input size, mean, std, crop), as timm or its file records it."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from mpcompile.errors import LoadError
from mpcompile.frontend.label_names import labels_of
from mpcompile.ir.model import Source


def source_of(
    module: nn.Module, *, name: str, arch: str, sha256: str, arch_args: Mapping[str, Any] | None = None
) -> Source:
    """A Source with the preprocessing that timm recorded in the module; ImageNet's if there is none.

    Args:
        module: the model.
        name: its file or name, as the user gave it.
        arch: its architecture.
        sha256: hash of the file or of the weights.
        arch_args: arguments it was built with. `img_size` and `in_chans` in it override the recorded input size. They
            are kept in the Source if they can be written as JSON.

    Raises LoadError if the recorded preprocessing is invalid.
    """
    try:
        return _recorded(module, name, arch, sha256, arch_args)
    except Exception as error:  # a config.json may hold anything as mean, std, input_size …
        raise LoadError(f"{name}: the preprocessing recorded for {arch} cannot be read: {error}") from error


def _recorded(module: nn.Module, name: str, arch: str, sha256: str, arch_args: Mapping[str, Any] | None) -> Source:
    from timm.data import resolve_model_data_config

    args = arch_args or {}
    try:
        recorded = None if arch_args is None else json.loads(json.dumps(dict(arch_args)))
    except (TypeError, ValueError):  # not JSON: a class or a function, such as norm_layer
        recorded = None
    cfg = resolve_model_data_config(module)
    side = args.get("img_size", cfg["input_size"][1:])
    height, width = (side, side) if isinstance(side, int) else side
    channels = args.get("in_chans", cfg["input_size"][0])
    mean, std = (
        values if len(values) == channels else (sum(values) / len(values),) * channels
        for values in (tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"])))
    )
    labels = labels_of(module)
    texts = {"interpolation": cfg["interpolation"], "crop_mode": cfg["crop_mode"]}
    for key, value in (*texts.items(), *(("label_names", label) for label in labels)):
        if not isinstance(value, str):
            raise TypeError(f"{key} has {value!r}, which is not text")
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
        arch_args=recorded,
    )
