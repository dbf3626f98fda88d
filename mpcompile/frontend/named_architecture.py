"""The architecture of a file of weights: the one that the user, the config beside the file, or the file names."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.architectures import is_factory
from mpcompile.frontend.config_file import config_beside
from mpcompile.frontend.hugging_face import is_hugging_face
from mpcompile.frontend.hugging_face_config import size_in
from mpcompile.frontend.hugging_face_folder import architecture_of, read_config
from mpcompile.frontend.preprocessing import ASSUMABLE

NAMING_FILES = {"checkpoint_path", "cache_dir"}  # arguments of timm.create_model that name files


@dataclass(frozen=True, slots=True)
class NamedArchitecture:
    """An architecture and its arguments.

    Attributes:
        arch: a timm name, `hf:CLASS` or `pkg.mod:factory`.
        arch_args: its arguments; for `hf:CLASS` the content of a config.
        pretrained_cfg: timm's record of the preprocessing in a `config.json`; None if there is none.
        size: `in_chans` and `img_size` in a config of transformers.
        beside: whether a config of transformers beside the file was used, so that its preprocessing holds too.
    """

    arch: str
    arch_args: dict[str, Any]
    pretrained_cfg: Mapping[str, Any] | None = None
    size: Mapping[str, Any] = field(default_factory=dict)
    beside: bool = False


def named_architecture(
    path: Path, content: Mapping[Any, Any], asked: str | None, asked_args: Mapping[str, Any]
) -> NamedArchitecture:
    """The architecture that the user asks for, else that of the `config.json` beside the file, else the file's own.

    Raises UsageError if there is none, and LoadError if the file itself names code to call or other files to open.
    """
    arch, args, pretrained_cfg = asked, dict(asked_args), None
    theirs = read_config(path) if asked is None or is_hugging_face(asked) else None
    if theirs is not None:
        arch, values = architecture_of(theirs, asked, path.parent)
        return NamedArchitecture(arch, {**values, **args}, None, size_in({**theirs, **values, **args}), True)
    if asked is not None and is_hugging_face(asked):
        return NamedArchitecture(asked, args, None, size_in(args))
    config = timm_config(path)
    if arch is None and config is not None:
        arch = str(config["architecture"])
        args = {**(config.get("model_args") or {}), **args}
        args.setdefault("num_classes", config.get("num_classes", 1000))
        pretrained_cfg = config.get("pretrained_cfg") or None
    if arch is None and isinstance(content.get("arch"), str):
        arch = str(content["arch"])
        args = {**_timm_training_args(content.get("args")), **args}
    if arch is None:
        raise UsageError(
            f"{path} holds weights but no architecture; name it with --arch (a timm name, hf:CLASS or pkg.mod:factory)"
        )
    if asked is None:
        _require_named_safely(arch, args, path)
    return NamedArchitecture(arch, args, pretrained_cfg)


def _require_named_safely(arch: str, arch_args: Mapping[str, Any], path: Path) -> None:
    """Raises LoadError if the file itself names code to call or other files to open; only the user may do that."""
    if is_factory(arch):
        raise LoadError(
            f"{path} names the code {arch} as its architecture, which was not run; pass --arch if you trust it"
        )
    named = sorted(NAMING_FILES & arch_args.keys())
    if named:
        raise LoadError(
            f"{path} gives its architecture {', '.join(named)}, which names other files; pass --arch and --arch-arg "
            "if you trust it"
        )


def timm_config(path: Path) -> dict[str, Any] | None:
    """The timm `config.json` beside a file of weights; None if there is none. Raises LoadError."""
    beside = path.with_name("config.json")
    config = config_beside(path)
    if config is None or "architecture" not in config:
        return None
    for key in ("model_args", "pretrained_cfg"):
        if not isinstance(config.get(key) or {}, dict):
            raise LoadError(f"{beside}: {key} is {type(config[key]).__name__}; it must be a mapping")
    return config


def _timm_training_args(args: object) -> dict[str, Any]:
    """Arguments of the architecture in the command line that a timm training checkpoint holds."""
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    found = {
        "num_classes": options.get("num_classes"),
        "in_chans": options.get("in_chans"),
        "img_size": options.get("img_size"),
    }
    more = options.get("model_kwargs")
    return {**{k: v for k, v in found.items() if v is not None}, **(more if isinstance(more, Mapping) else {})}


def timm_training_preprocessing(args: object) -> dict[str, Any]:
    """Preprocessing in the command line that a timm training checkpoint holds, by timm's keys."""
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    return {key: options[key] for key in ASSUMABLE if options.get(key) is not None}
