"""What is read in a config of transformers, and what in it is not followed."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mpcompile.errors import LoadError

# Keys of a config that say where its code, its files or its kernels come from, at any depth. None of them is followed.
IGNORED = {
    "auto_map", "custom_pipelines", "_name_or_path", "name_or_path", "transformers_weights", "fusion_config",
    "use_pretrained_backbone", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "_attn_implementation_autoset", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "dtype", "torch_dtype", "device_map", "distributed_config", "tp_plan",
}  # fmt: skip
NAMES_FILES = {"checkpoint_path", "cache_dir"}  # of timm.create_model, which some classes call
NAMES_TIMM = {"architecture", "backbone"}  # keys whose text such classes give to timm.create_model


def without_foreign_names(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A config without the keys in IGNORED, at any depth. Raises LoadError if it names files or quantised weights."""
    if values.get("quantization_config"):
        method = values["quantization_config"]
        kind = method.get("quant_method", "unknown") if isinstance(method, Mapping) else "unknown"
        raise LoadError(
            f"{name} holds quantised weights (quantization_config: {kind}), and masks are chosen on floating-point "
            "ones; give the checkpoint that was quantised"
        )
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key in NAMES_FILES or (key in NAMES_TIMM and isinstance(value, str) and ":" in value):
            raise LoadError(f"{name}: its config gives {key} {value!r}, which names other files; it was not opened")
        if key not in IGNORED:
            kept[key] = without_foreign_names(value, name) if isinstance(value, Mapping) else value
    return kept


def part_of_config(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that is for this class: `vision_config` of a CLIP config for CLIPVisionModel."""
    config_class = kind.config_class
    inside = values.get(config_class.base_config_key) if config_class.base_config_key else None
    if isinstance(inside, Mapping):
        return dict(inside)
    if values.get("model_type") != config_class.model_type:
        for value in values.values():
            if isinstance(value, Mapping) and value.get("model_type") == config_class.model_type:
                return dict(value)
    return dict(values)


def size_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """`in_chans` and `img_size` as the config gives them, without those that it does not give."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    channels = next((one["num_channels"] for one in parts if isinstance(one.get("num_channels"), int)), None)
    side = next((one["image_size"] for one in parts if _is_size(one.get("image_size"))), None)
    given = {"in_chans": channels, "img_size": tuple(side) if isinstance(side, list | tuple) else side}
    return {key: value for key, value in given.items() if value}


def _is_size(value: object) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int) for side in value)
    return pair or (isinstance(value, int) and not isinstance(value, bool))


def size_of(module: nn.Module) -> dict[str, Any]:
    """`size_in` of a module's own config; empty for a module that is not of transformers."""
    config = getattr(module, "config", None)
    if config is None or type(config).__module__.partition(".")[0] != "transformers":
        return {}
    return size_in(config.to_dict())
