"""The parts of a folder that save_pretrained wrote: weights, class and config, size of the images, preprocessing."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.config_file import config_beside
from mpcompile.frontend.hugging_face import PREFIX, vision_class
from mpcompile.frontend.hugging_face_config import part_of_config
from mpcompile.frontend.preprocessing import Preprocessing
from mpcompile.frontend.preset_file import read_preset

log = logging.getLogger(__name__)

# In the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
ADAPTER = "adapter_config.json"


def weights_in(folder: Path) -> Path:
    """The weights file of a folder, or the index of its shards. Raises LoadError if there is none.

    A folder without the usual names may hold one other file of weights.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if (folder / ADAPTER).is_file():
        raise LoadError(
            f"{folder} holds an adapter (PEFT), which changes a model and is none; merge it into its model: "
            "model.merge_and_unload().save_pretrained('merged'), and give that folder"
        )
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if len(found) == 1 and (folder / "config.json").is_file():
        return found[0]
    others = ", ".join(path.name for path in found[:3]) + (", …" if len(found) > 3 else "")
    raise LoadError(
        f"{folder} is a folder without {WEIGHTS[0]}; "
        + (f"name one of the files in it: {others}" if found else "give one that save_pretrained wrote, or a file")
    )


def read_config(weights: Path) -> Mapping[str, Any] | None:
    """The `config.json` of transformers beside a file of weights; None if there is none. Raises LoadError."""
    config = config_beside(weights)
    if config is None or "architecture" in config:  # the latter is timm's
        return None
    return config if "architectures" in config or "model_type" in config else None


def architecture_of(config: Mapping[str, Any], asked: str | None, folder: Path) -> tuple[str, dict[str, Any]]:
    """The class, as `hf:NAME`, and its part of the config. `asked` overrides the class that the config names.

    Raises UsageError, LoadError or RuntimeMissing.
    """
    named = config.get("architectures")
    if asked is None and not (isinstance(named, list) and named and isinstance(named[0], str)):
        raise UsageError(
            f"{folder / 'config.json'} names no class in its architectures; name it, such as --arch "
            "hf:ViTForImageClassification"
        )
    arch = asked or PREFIX + named[0]  # type: ignore[index]
    custom = bool(config.get("auto_map"))
    kind = vision_class(arch, custom)
    if asked is None and len(named) > 1:  # type: ignore[arg-type]
        log.warning("%s names %d classes; %s was taken, --arch takes another", folder, len(named), arch)  # type: ignore[arg-type]
    if custom:
        log.warning("%s brings code of its own (auto_map), which was not run; %s is that of transformers", folder, arch)
    return arch, part_of_config(kind, config)


def recorded_preprocessing(weights: Path, sized: bool) -> tuple[Preprocessing, Path] | None:
    """The preprocessing in the folder's `preprocessor_config.json` or `processor_config.json`, and that file; or None.

    `sized`: whether the size of the images is known otherwise. Raises LoadError if the file cannot be used.
    """
    for name in PROCESSORS:
        path = weights.with_name(name)
        if not path.is_file() or (name == PROCESSORS[1] and '"image_processor"' not in path.read_text("utf-8")):
            continue
        try:
            return read_preset(path, sized, asked=""), path
        except UsageError as error:
            raise LoadError(
                f"{error}. --preprocess gives another preprocessing, such as --preprocess imagenet"
            ) from error
    return None
