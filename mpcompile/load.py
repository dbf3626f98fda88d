"""A trained model from a file or a name, without running pickled code.

What a model may be, told by content and not by suffix:

- safetensors, or a state dict saved by torch (bare, or under a training checkpoint's usual keys), with `arch`: a
  timm name or `pkg.mod:factory`. A timm checkpoint names its architecture, as does a timm `config.json` beside
  the file;
- `timm:NAME`, with the weights of the hub only where `pretrained` asks for them;
- `pkg.mod:factory`, a callable that returns the module;
- a pickled module, only with `allow_pickle`: loading one runs whatever code it names.
"""

import argparse
import contextlib
import importlib
import json
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpcompile.checkpoint import file_sha256, first_line, read, state_dict_in, state_sha256
from mpcompile.errors import LoadError, UsageError
from mpcompile.model import Source

log = logging.getLogger(__name__)

PREFIXES = ("module.", "model.", "_orig_mod.")
LARGEST_SIDE = 65536
NAMING_FILES = {"checkpoint_path", "cache_dir"}  # arguments of timm.create_model


@dataclass(frozen=True, slots=True)
class Request:
    """Which model is wanted and how it may be built."""

    model: str
    arch: str | None = None
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    allow_pickle: bool = False
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    leaves: tuple[str, ...] = ()  # modules that capture keeps whole


@dataclass(frozen=True, slots=True)
class Loaded:
    """A module with its weights, in evaluation mode, and where it came from."""

    module: nn.Module
    source: Source


def load(request: Request) -> Loaded:
    """The module that was asked for. Raises LoadError or UsageError."""
    if request.model.startswith("timm:"):
        name = request.model.removeprefix("timm:")
        module = _create_timm(name, request.arch_args, pretrained=request.pretrained)
        if not request.pretrained:
            log.warning("timm:%s has random weights; --pretrained fetches the hub's", name)
        return _finish(module, request, arch=name, sha256=state_sha256(module))
    path = Path(request.model)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # too long, no permission, or a byte that names cannot have
        raise LoadError(f"{request.model} cannot be looked up: {error}") from error
    if is_factory(request.model) and not exists:
        module = _call_factory(request.model, request.arch_args)
        return _finish(module, request, arch=request.model, sha256=state_sha256(module))
    if request.pretrained:
        raise UsageError("--pretrained goes with timm:NAME; a file brings its own weights")
    if not exists:
        raise LoadError(f"{path} does not exist; a model is a file, timm:NAME or pkg.mod:factory")
    if path.is_dir():
        raise LoadError(f"{path} is a folder; name the file in it")
    if not path.is_file():
        raise LoadError(f"{path} is a pipe or a device; a model is a file, timm:NAME or pkg.mod:factory")
    return _load_file(path, request)


def _load_file(path: Path, request: Request) -> Loaded:
    """A model from a file of weights."""
    content, config = read(path, request.allow_pickle), _timm_config(path)
    sha256 = file_sha256(path)
    if isinstance(content, nn.Module):
        loaded = _finish(content, request, arch=type(content).__name__, sha256=sha256)
        return replace(loaded, source=replace(loaded.source, arch_args=None))  # its class is known by name alone
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
            f"{path} holds weights and no architecture; name it with --arch (a timm name or pkg.mod:factory)"
        )
    if request.arch is None:
        _require_named_safely(arch, arch_args, path)
    state = state_dict_in(content, path)
    module = _build_for(arch, arch_args, state, pretrained_cfg)
    _fill(module, state, path, arch)
    return _finish(module, request, arch=arch, sha256=sha256, arch_args=arch_args)


def _require_named_safely(arch: str, arch_args: Mapping[str, Any], path: Path) -> None:
    """Raises where a file itself names code to call or other files to open: that is only for who runs the command."""
    if is_factory(arch):
        raise LoadError(
            f"{path} names the code {arch} as its architecture, which was not run; pass --arch if you trust it"
        )
    named = sorted(NAMING_FILES & arch_args.keys())
    if named:
        raise LoadError(
            f"{path} gives its architecture {', '.join(named)}, which names other files; pass --arch yourself"
        )


def _timm_config(path: Path) -> dict[str, Any] | None:
    """The timm `config.json` beside a file of weights, if there is one."""
    beside = path.with_name("config.json")
    if not beside.is_file():
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{beside} is not JSON that can be read: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config:
        return None
    for key in ("model_args", "pretrained_cfg"):
        if not isinstance(config.get(key) or {}, dict):
            raise LoadError(f"{beside}: {key} is {type(config[key]).__name__}; needed is a mapping")
    return config


def _timm_training_args(args: object) -> dict[str, Any]:
    """What a timm training checkpoint's command line says about building the model."""
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    found = {
        "num_classes": options.get("num_classes"),
        "in_chans": options.get("in_chans"),
        "img_size": options.get("img_size"),
    }
    more = options.get("model_kwargs")
    return {**{k: v for k, v in found.items() if v is not None}, **(more if isinstance(more, Mapping) else {})}


def _stripped(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The state dict without wrapper prefixes that all keys share, as far as that helps to match."""
    best = dict(state)
    while (prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in best)), None)) is not None:
        shorter = {name.removeprefix(prefix): value for name, value in best.items()}
        if len(wanted & best.keys()) > len(wanted & shorter.keys()):
            break
        best = shorter
    return best


def _fill(module: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Loads the weights; a mismatch lists the first few keys of each kind."""
    state = _stripped(state, set(module.state_dict()))
    if listed := misfit(module, state):
        raise LoadError(f"{path} does not fit {arch}: {listed}. Is --arch right, and are its --arch-arg?")
    module.load_state_dict(state)


def misfit(module: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Why weights do not fit a module, the first few names of each kind, or None."""
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} against {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    types = [
        f"{name} {str(state[name].dtype).removeprefix('torch.')}"
        for name in own
        if name in state and own[name].is_floating_point() and not state[name].is_floating_point()
    ]
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
        ("not floating-point", types),
    )
    return "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in kinds if names) or None


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def is_factory(text: str) -> bool:
    """Whether a text is `pkg.mod:name`."""
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _build_for(
    arch: str, arch_args: Mapping[str, Any], state: Mapping[str, Tensor], pretrained_cfg: Mapping[str, Any] | None
) -> nn.Module:
    """The architecture, with as many classes as the weights have where nobody said."""
    if is_factory(arch):
        return _call_factory(arch, arch_args)
    name = arch.removeprefix("timm:")
    module = _create_timm(name, arch_args, pretrained_cfg=pretrained_cfg)
    if "num_classes" not in arch_args:
        classifier = (getattr(module, "pretrained_cfg", None) or {}).get("classifier")
        key = f"{classifier[0] if isinstance(classifier, tuple | list) else classifier}.weight"
        own, given = module.state_dict(), _stripped(state, set(module.state_dict()))
        if key in own and key in given and own[key].shape[0] != given[key].shape[0]:
            args = {**arch_args, "num_classes": given[key].shape[0]}
            module = _create_timm(name, args, pretrained_cfg=pretrained_cfg)
    return module


def _create_timm(
    name: str,
    arch_args: Mapping[str, Any],
    *,
    pretrained: bool = False,
    pretrained_cfg: Mapping[str, Any] | None = None,
) -> nn.Module:
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UsageError(f"timm knows no architecture {name!r}{hint}")
    try:
        module: nn.Module = timm.create_model(
            name, pretrained=pretrained, pretrained_cfg=dict(pretrained_cfg) if pretrained_cfg else None, **arch_args
        )
    except Exception as error:
        what = "fetched" if pretrained else "built"
        raise LoadError(f"timm:{name} could not be {what} with {dict(arch_args)}: {first_line(error)}") from error
    return module


def _call_factory(name: str, arch_args: Mapping[str, Any]) -> nn.Module:
    """The module that `pkg.mod:factory` returns; the working folder can be imported from, as with python -m."""
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # results alone belong on standard output
            factory = getattr(importlib.import_module(module_name), attribute)
            module = factory(**arch_args)
    except (Exception, SystemExit) as error:  # a script without a main guard exits when imported
        raise LoadError(f"{name} could not be called: {type(error).__name__}: {first_line(error)}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not isinstance(module, nn.Module):
        raise LoadError(f"{name} returned a {type(module).__name__}; needed is a torch.nn.Module")
    return module


def _finish(
    module: nn.Module, request: Request, *, arch: str, sha256: str, arch_args: Mapping[str, Any] | None = None
) -> Loaded:
    args = arch_args or request.arch_args
    source = source_of(module, name=request.model, arch=arch, sha256=sha256, arch_args=args)
    source = replace(
        source,
        size=request.input_size or source.size,
        mean=request.mean or source.mean,
        std=request.std or source.std,
    )
    if not all(isinstance(side, int) and 0 < side <= LARGEST_SIDE for side in source.size):
        raise UsageError(
            f"images of {source.size} (channels, height, width): each is 1 to {LARGEST_SIDE:,} (--input-size)"
        )
    if not all(map(math.isfinite, source.mean + source.std)) or min(source.std) <= 0:
        raise UsageError(f"means {source.mean} and deviations {source.std} must be finite, and deviations above 0")
    if not len(source.mean) == len(source.std) == source.size[0]:
        raise UsageError(
            f"images of {source.size[0]} channels need as many means and deviations; there are {len(source.mean)} and "
            f"{len(source.std)} (--mean, --std)"
        )
    return Loaded(module.eval(), source)


def source_of(
    module: nn.Module, *, name: str, arch: str, sha256: str, arch_args: Mapping[str, Any] | None = None
) -> Source:
    """A Source with the preprocessing that timm recorded in the module, or ImageNet's.

    `img_size` and `in_chans` among the arguments of the architecture win over what was recorded. Raises LoadError.
    """
    try:
        return _recorded(module, name, arch, sha256, arch_args)
    except Exception as error:  # what a config.json may say of mean, std, input_size …
        raise LoadError(f"{name}: the preprocessing recorded for {arch} cannot be read: {error}") from error


def _recorded(module: nn.Module, name: str, arch: str, sha256: str, arch_args: Mapping[str, Any] | None) -> Source:
    from timm.data import resolve_model_data_config

    args = arch_args or {}
    try:
        recorded = None if arch_args is None else json.loads(json.dumps(dict(arch_args)))
    except (TypeError, ValueError):  # a class or a function, as norm_layer may be
        recorded = None
    cfg = resolve_model_data_config(module)
    side = args.get("img_size", cfg["input_size"][1:])
    height, width = (side, side) if isinstance(side, int) else side
    channels = args.get("in_chans", cfg["input_size"][0])
    mean, std = (
        values if len(values) == channels else (sum(values) / len(values),) * channels
        for values in (tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"])))
    )
    labels = tuple((getattr(module, "pretrained_cfg", None) or {}).get("label_names") or ())
    texts = {"interpolation": cfg["interpolation"], "crop_mode": cfg["crop_mode"]}
    for key, value in (*texts.items(), *(("label_names", label) for label in labels)):
        if not isinstance(value, str):
            raise TypeError(f"{key} has {value!r}, which is no text")
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
