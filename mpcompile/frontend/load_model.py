"""Loads a trained model from a file or a name, without running pickled code.

A file's content, not its suffix, decides its format. Accepted:

- safetensors, or a state dict saved by torch (bare, or under a training checkpoint's usual keys), with `arch`: a
  timm name, `hf:CLASS` or `pkg.mod:factory`. A timm checkpoint names its architecture, as does a `config.json` of
  timm or transformers beside the file;
- a folder that transformers' save_pretrained wrote (or timm's save_for_hf), also in several shards;
- `hf:ORG/NAME`, such a folder of the Hugging Face hub, which is downloaded unless it is in the cache;
- `timm:NAME`, with the hub's weights only if `pretrained` is set;
- `pkg.mod:factory`, a callable that returns the module;
- a `.pt2` file of torch.export.save, read without running what it holds; with `arch`, only its weights are taken;
- a pickled module, only with `allow_pickle`: loading it runs the code that it names.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.architectures import build_architecture, call_factory, classes_in, create_timm, is_factory
from mpcompile.frontend.call_inputs import InputSpec
from mpcompile.frontend.checkpoint_weights import WeightSet, chosen_weights
from mpcompile.frontend.claimed_accuracy import claimed_accuracy
from mpcompile.frontend.exported import exported_weights, is_exported_file, load_exported
from mpcompile.frontend.hugging_face import is_hugging_face, names_of, with_weights
from mpcompile.frontend.hugging_face_folder import recorded_preprocessing, weights_in
from mpcompile.frontend.hugging_face_hub import fetched
from mpcompile.frontend.label_names import labels_beside
from mpcompile.frontend.module_kinds import plain_module
from mpcompile.frontend.named_architecture import (
    NamedArchitecture,
    named_architecture,
    timm_config,
    timm_training_preprocessing,
)
from mpcompile.frontend.plain_copy import computed_weights, plain_copy
from mpcompile.frontend.preprocessing import Preprocessing, check_asked, source_of, with_preprocessing
from mpcompile.frontend.presets import preset_named
from mpcompile.frontend.sharded_weights import weights_sha256
from mpcompile.frontend.state_dict import load_state, mismatch
from mpcompile.frontend.weights_file import module_in, read, require_plain
from mpcompile.ir.source import Source
from mpcompile.system.hashing import file_sha256
from mpcompile.system.tensor_hashing import state_sha256

log = logging.getLogger(__name__)

MODELS = "a file, a folder of save_pretrained, hf:ORG/NAME, timm:NAME or pkg.mod:factory"


@dataclass(frozen=True, slots=True)
class Request:
    """Which model to load, and how it may be built.

    Attributes:
        model: a weights file, a `.pt2` file, a folder, `hf:ORG/NAME`, `timm:NAME`, or `pkg.mod:factory`.
        arch: architecture of a weights file: a timm name, `hf:CLASS` or `pkg.mod:factory`; None if the file names it.
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
    inputs: Mapping[str, InputSpec] = field(default_factory=dict)  # inputs beside the images, by forward's names
    output_name: str | None = None  # path of the primary output, such as "logits"; None: the one with a usual name

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that the options ask for, without that of the preset."""
        return Preprocessing(
            self.input_size, self.mean, self.std, self.interpolation, self.crop_pct, None, self.resize,
            self.channel_order,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loaded:
    """A module with its weights, in evaluation mode, its Source, and the accuracy in [0, 1] that its file records.

    `processor` is the file of a Hugging Face image processor if the Source follows it in everything.
    """

    module: nn.Module
    source: Source
    claimed: float | None = None
    processor: Path | None = None


def load(request: Request) -> Loaded:
    """Loads the requested model, in evaluation mode. Raises LoadError or UsageError."""
    check_asked(request.preprocessing)
    if request.preprocess is not None:
        preset_named(request.preprocess, request.input_size is not None)  # before the weights are read
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
    path = fetched(request.model) if is_hugging_face(request.model) else Path(request.model)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # name too long, no permission, or a null byte
        raise LoadError(f"{request.model} cannot be looked up: {error}") from error
    if not exists and is_factory(request.model):
        _require_no_weights_key(request)
        module = plain_module(call_factory(request.model, request.arch_args), request.model)
        return _finish(module, request, arch=request.model, sha256=state_sha256(module))
    if request.pretrained:
        raise UsageError("--pretrained needs timm:NAME; hf:ORG/NAME and files have their own weights")
    if not exists:
        raise LoadError(f"{path} does not exist; a model is {MODELS}")
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise LoadError(f"{path} is a pipe or a device; a model is {MODELS}")
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
    sha256 = weights_sha256(path)
    if isinstance(content, Mapping) and (module := module_in(content, path, request.weights_key)) is not None:
        content = module
    if isinstance(content, nn.Module):
        timm_config(path)  # raises for one that cannot be read
        content = plain_module(content, request.model)
        loaded = _finish(content, request, arch=type(content).__name__, sha256=sha256)
        return replace(
            loaded, source=replace(loaded.source, arch_args=None)
        )  # its class cannot be rebuilt from its name
    named = named_architecture(path, content, request.arch, request.arch_args)
    if is_hugging_face(named.arch):
        return _load_hugging_face(path, content, named, request, sha256)
    arch, arch_args, pretrained_cfg = named.arch, named.arch_args, named.pretrained_cfg
    module = plain_module(build_architecture(arch, arch_args, pretrained_cfg), arch)
    module, weights, notes = _with_its_weights(module, content, path, request.weights_key)
    require_plain(weights.state, path)
    if "num_classes" not in arch_args and (classes := classes_in(arch, module, weights.state)) is not None:
        module = build_architecture(arch, {**arch_args, "num_classes": classes}, pretrained_cfg)  # a timm module
    load_state(module, weights.state, path, arch)
    _tell(path, weights.name, notes)
    record = pretrained_cfg if pretrained_cfg is not None else timm_training_preprocessing(content.get("args"))
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
        size={} if size is None else {"in_chans": size[0], "img_size": size[1:]},
    )
    return replace(loaded, source=replace(loaded.source, arch_args=None))  # no name to build it from


def _with_its_weights(
    module: nn.Module, content: Mapping[Any, Any], path: Path, key: str | None
) -> tuple[nn.Module, WeightSet, tuple[str, ...]]:
    """The module, and the weights of a checkpoint for it, with sentences about the choice.

    If the module computes weights (weight_norm and others) and the file holds plain ones, as model.safetensors of an
    output folder does, the module is returned with plain weights.
    """
    weights, notes = chosen_weights(content, module.state_dict().keys(), path, key)
    if not any(True for _ in computed_weights(module)) or mismatch(module, weights.state) is None:
        return module, weights, notes
    plain, folded = plain_copy(module)
    found, said = chosen_weights(content, plain.state_dict().keys(), path, key)
    return (module, weights, notes) if mismatch(plain, found.state) else (plain, found, (*said, *folded))


def _load_hugging_face(
    path: Path, content: Mapping[Any, Any], named: NamedArchitecture, request: Request, sha256: str
) -> Loaded:
    """A model of transformers: weights under the names of its modules, or under those of save_pretrained."""
    own, saved = names_of(named.arch, named.arch_args)
    weights, notes = chosen_weights(content, own, path, request.weights_key, (saved,))
    require_plain(weights.state, path)
    module, arch_args, unused = with_weights(named.arch, named.arch_args, weights.state, str(path))
    _tell(path, weights.name, notes + unused)
    sized = request.input_size is not None or "img_size" in named.size
    read_file = named.beside and request.preprocess is None
    recorded, file = (recorded_preprocessing(path, sized) if read_file else None) or (None, None)
    loaded = _finish(
        module, request, arch=named.arch, sha256=sha256, arch_args=arch_args, size=named.size, recorded=recorded
    )
    unchanged = request.preprocessing == Preprocessing()
    return replace(loaded, claimed=claimed_accuracy(content), processor=file if unchanged else None)


def _tell(path: Path, taken: str, notes: tuple[str, ...]) -> None:
    if taken:
        log.warning("weights taken from %r of %s", taken, path.name)
    for note in notes:
        log.warning("%s", note)


def _finish(
    module: nn.Module,
    request: Request,
    *,
    arch: str,
    sha256: str,
    arch_args: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    published: bool = False,
    size: Mapping[str, Any] | None = None,
    recorded: Preprocessing | None = None,
) -> Loaded:
    """The module with its Source; options of the request override recorded preprocessing.

    `size` has `in_chans` and `img_size` for an architecture whose arguments have other names. `recorded` is the
    preprocessing in a file beside the weights, instead of `record`. Raises UsageError, or LoadError for a module that
    `plain_module` refuses.
    """
    args = arch_args or request.arch_args
    source = source_of(
        module,
        name=request.model,
        arch=arch,
        sha256=sha256,
        arch_args=args if size is None else size,
        record=record,
        published=published,
    )
    if size is not None:
        source = replace(source, arch_args=dict(args))
    preset, name = recorded, None if recorded is None else "recorded"
    if request.preprocess is not None:
        preset, name = preset_named(request.preprocess, request.input_size is not None), request.preprocess
    return Loaded(module.eval(), with_preprocessing(source, request.preprocessing, preset, name))
