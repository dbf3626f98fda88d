"""Loads a trained model from a file or a name, without running pickled code.

A file's content, not its suffix, decides its format. Accepted:

- safetensors, or a state dict saved by torch (bare, or under a training checkpoint's usual keys), with `arch`: a
  timm name or `pkg.mod:factory`. A timm checkpoint names its architecture, as does a timm `config.json` beside
  the file;
- `timm:NAME`, with the hub's weights only if `pretrained` is set;
- `pkg.mod:factory`, a callable that returns the module;
- a `.pt2` file of torch.export.save, read without running what it holds; with `arch`, only its weights are taken;
- a pickled module, only with `allow_pickle`: loading it runs the code that it names.
"""

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.architectures import build_architecture, call_factory, classes_in, create_timm, is_factory
from mpcompile.frontend.checkpoint_weights import chosen_weights
from mpcompile.frontend.claimed_accuracy import claimed_accuracy
from mpcompile.frontend.exported import exported_weights, is_exported_file, load_exported
from mpcompile.frontend.label_names import labels_beside
from mpcompile.frontend.module_kinds import plain_module
from mpcompile.frontend.preprocessing import ASSUMABLE, Preprocessing, check_asked, source_of, with_preprocessing
from mpcompile.frontend.presets import preset_named
from mpcompile.frontend.state_dict import load_state
from mpcompile.frontend.weights_file import module_in, read, require_plain
from mpcompile.ir.model import Source
from mpcompile.system.hashing import file_sha256, state_sha256

log = logging.getLogger(__name__)

NAMING_FILES = {"checkpoint_path", "cache_dir"}  # arguments of timm.create_model that name files


@dataclass(frozen=True, slots=True)
class Request:
    """Which model to load, and how it may be built.

    Attributes:
        model: a weights file, a `.pt2` file, `timm:NAME`, or `pkg.mod:factory`.
        arch: architecture of a weights file: a timm name or `pkg.mod:factory`; None if the file names it.
        arch_args: arguments of the architecture.
        pretrained: download the hub's weights of `timm:NAME`.
        allow_pickle: load a pickled module, which runs the code that the file names.
        input_size: (channels, height, width); None for the recorded preprocessing. The same holds for `mean` and `std`.
        mean: per channel, for pixels in [0, 1].
        std: per channel, for pixels in [0, 1].
        leaves: qualified names of modules that capture keeps whole.
        interpolation, crop_pct, resize, channel_order: override the recorded preprocessing. `resize` is in pixels: of
            the shorter side, or (height, width).
        preprocess: name of a preset (mpcompile/frontend/presets.py), which completes the other options.
    """

    model: str
    arch: str | None = None
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    allow_pickle: bool = False
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    leaves: tuple[str, ...] = ()
    preprocess: str | None = None
    resize: tuple[int, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    channel_order: str | None = None
    weights_key: str | None = None  # which weights of a checkpoint that holds several; None: chosen

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that the options ask for, without that of the preset."""
        return Preprocessing(
            self.input_size, self.mean, self.std, self.interpolation, self.crop_pct, None, self.resize,
            self.channel_order,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loaded:
    """A module with its weights, in evaluation mode, its Source, and the accuracy in [0, 1] that its file records."""

    module: nn.Module
    source: Source
    claimed: float | None = None


def load(request: Request) -> Loaded:
    """Loads the requested model, in evaluation mode. Raises LoadError or UsageError."""
    check_asked(request.preprocessing)
    if request.preprocess is not None:
        preset_named(request.preprocess)  # before the weights are read
    try:
        request.model.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LoadError(f"{request.model} is not UTF-8, and the report holds the name; rename the file") from error
    if request.model.startswith("timm:"):
        _require_no_weights_key(request)
        name = request.model.removeprefix("timm:")
        module = create_timm(name, request.arch_args, pretrained=request.pretrained)
        if not request.pretrained:
            log.warning("timm:%s has random weights; --pretrained downloads the hub's", name)
        return _finish(module, request, arch=name, sha256=state_sha256(module))
    path = Path(request.model)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # name too long, no permission, or a null byte
        raise LoadError(f"{request.model} cannot be looked up: {error}") from error
    if is_factory(request.model) and not exists:
        _require_no_weights_key(request)
        module = plain_module(call_factory(request.model, request.arch_args), request.model)
        return _finish(module, request, arch=request.model, sha256=state_sha256(module))
    if request.pretrained:
        raise UsageError("--pretrained needs timm:NAME; a file has its own weights")
    if not exists:
        raise LoadError(f"{path} does not exist; a model is a file, timm:NAME or pkg.mod:factory")
    if path.is_dir():
        raise LoadError(f"{path} is a folder; name the file in it")
    if not path.is_file():
        raise LoadError(f"{path} is a pipe or a device; a model is a file, timm:NAME or pkg.mod:factory")
    loaded = _load_file(path, request)
    labels = loaded.source.labels or labels_beside(path)
    return replace(loaded, source=replace(loaded.source, labels=labels))


def _require_no_weights_key(request: Request) -> None:
    if request.weights_key is not None:
        raise UsageError(f"--weights-key goes with a checkpoint file, and {request.model} is none; leave it out")


def _load_file(path: Path, request: Request) -> Loaded:
    """A model from a file: a pickled module, or weights for an architecture."""
    is_program = is_exported_file(path)
    if is_program and request.arch is None:
        return _load_program(path, request)
    content: Any = exported_weights(path, request.allow_pickle) if is_program else read(path, request.allow_pickle)
    config, sha256 = _timm_config(path), file_sha256(path)
    if isinstance(content, Mapping) and (module := module_in(content, path, request.weights_key)) is not None:
        content = module
    if isinstance(content, nn.Module):
        content = plain_module(content, request.model)
        loaded = _finish(content, request, arch=type(content).__name__, sha256=sha256)
        return replace(
            loaded, source=replace(loaded.source, arch_args=None)
        )  # its class cannot be rebuilt from its name
    arch, arch_args, pretrained_cfg = request.arch, dict(request.arch_args), None
    if arch is None and config is not None:
        arch = str(config["architecture"])
        arch_args = {**(config.get("model_args") or {}), **arch_args}
        arch_args.setdefault("num_classes", config.get("num_classes", 1000))
        pretrained_cfg = config.get("pretrained_cfg") or None
    if arch is None and isinstance(content.get("arch"), str):
        arch = content["arch"]
        arch_args = {**_timm_training_args(content.get("args")), **arch_args}
    if arch is None:
        raise UsageError(
            f"{path} holds weights but no architecture; name it with --arch (a timm name or pkg.mod:factory)"
        )
    if request.arch is None:
        _require_named_safely(arch, arch_args, path)
    module = plain_module(build_architecture(arch, arch_args, pretrained_cfg), arch)
    weights, notes = chosen_weights(content, module.state_dict().keys(), path, request.weights_key)
    require_plain(weights.state, path)
    if "num_classes" not in arch_args and (classes := classes_in(arch, module, weights.state)) is not None:
        module = build_architecture(arch, {**arch_args, "num_classes": classes}, pretrained_cfg)  # a timm module
    load_state(module, weights.state, path, arch)
    if weights.name:
        log.warning("weights taken from %r of %s", weights.name, path.name)
    for note in notes:
        log.warning("%s", note)
    record = pretrained_cfg if pretrained_cfg is not None else _timm_training_preprocessing(content.get("args"))
    loaded = _finish(
        module, request, arch=arch, sha256=sha256, arch_args=arch_args, record=record, published=pretrained_cfg is None
    )
    return replace(loaded, claimed=claimed_accuracy(content))


def _load_program(path: Path, request: Request) -> Loaded:
    """The model of a .pt2 file, for images of the size that it was exported for."""
    _require_no_weights_key(request)
    found = load_exported(path, request.allow_pickle)
    module = plain_module(found.module, request.model)
    size = found.image_size
    loaded = _finish(
        module,
        request,
        arch="torch.export program",
        sha256=file_sha256(path),
        arch_args=None if size is None else {"in_chans": size[0], "img_size": size[1:]},
    )
    return replace(loaded, source=replace(loaded.source, arch_args=None))  # no name to build it from


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


def _timm_config(path: Path) -> dict[str, Any] | None:
    """The timm `config.json` beside a file of weights; None if there is none. Raises LoadError."""
    beside = path.with_name("config.json")
    if not beside.is_file():
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{beside} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config:
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


def _timm_training_preprocessing(args: object) -> dict[str, Any]:
    """Preprocessing in the command line that a timm training checkpoint holds, by timm's keys."""
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    return {key: options[key] for key in ASSUMABLE if options.get(key) is not None}


def _finish(
    module: nn.Module,
    request: Request,
    *,
    arch: str,
    sha256: str,
    arch_args: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    published: bool = False,
) -> Loaded:
    """The module with its Source; options of the request override recorded preprocessing.

    Raises UsageError, or LoadError for a module that `plain_module` refuses.
    """
    args = arch_args or request.arch_args
    source = source_of(
        module, name=request.model, arch=arch, sha256=sha256, arch_args=args, record=record, published=published
    )
    preset = None if request.preprocess is None else preset_named(request.preprocess)
    return Loaded(module.eval(), with_preprocessing(source, request.preprocessing, preset, request.preprocess))
