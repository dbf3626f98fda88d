"""Builds the module for a state dict: a timm architecture, a class of transformers, or a function `pkg.mod:name`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mpcompile.errors import LoadError, UsageError, did_you_mean, first_line
from mpcompile.frontend.hugging_face import build, is_hugging_face
from mpcompile.system.user_functions import imported_function, working_folder_importable


def is_factory(text: str) -> bool:
    """Whether a text has the form `pkg.mod:name`; `timm:` and `hf:` name no packages."""
    module, colon, name = text.partition(":")
    return (
        bool(colon)
        and module not in ("timm", "hf")
        and name.isidentifier()
        and all(part.isidentifier() for part in module.split("."))
    )


def build_architecture(arch: str, arch_args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any] | None) -> nn.Module:
    """Builds an architecture. Raises UsageError for an unknown name, LoadError if it cannot be built."""
    if is_factory(arch):
        return call_factory(arch, arch_args)
    if is_hugging_face(arch):
        return build(arch, arch_args)
    return create_timm(arch.removeprefix("timm:"), arch_args, pretrained_cfg=pretrained_cfg)


def classes_in(arch: str, module: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes of the weights, if it is not that of a timm module's classifier; else None."""
    if is_factory(arch):
        return None
    classifier = (getattr(module, "pretrained_cfg", None) or {}).get("classifier")
    key = f"{classifier[0] if isinstance(classifier, tuple | list) else classifier}.weight"
    own = module.state_dict()
    if key in own and key in state and state[key].ndim and own[key].shape[0] != state[key].shape[0]:
        return state[key].shape[0]
    return None


def create_timm(
    name: str,
    arch_args: Mapping[str, Any],
    *,
    pretrained: bool = False,
    pretrained_cfg: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model by name. Raises UsageError for an unknown name, LoadError if it cannot be built."""
    import timm

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture}*")[:3]
        hint = f"; near it: {', '.join(near)}" if near else did_you_mean(architecture, timm.list_models())
        raise UsageError(f"timm has no architecture {name!r}{hint}")
    try:
        module: nn.Module = timm.create_model(
            name, pretrained=pretrained, pretrained_cfg=dict(pretrained_cfg) if pretrained_cfg else None, **arch_args
        )
    except Exception as error:
        what = "fetched" if pretrained else "built"
        raise LoadError(f"timm:{name} could not be {what} with {dict(arch_args)}: {first_line(error)}") from error
    return module


def call_factory(name: str, arch_args: Mapping[str, Any]) -> nn.Module:
    """The module that the function `pkg.mod:factory` returns for these arguments.

    The working folder is importable, as with `python -m`. Raises LoadError if the function cannot be imported or
    raises, or returns no nn.Module.
    """
    factory = imported_function(name)
    try:
        with working_folder_importable():
            module = factory(**arch_args)
    except (Exception, SystemExit) as error:
        raise LoadError(f"{name} could not be called: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise LoadError(f"{name} returned a {type(module).__name__}; it must return a torch.nn.Module")
    return module
