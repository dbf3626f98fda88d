"""Vision models of the transformers package: `hf:ViTForImageClassification` with the content of a `config.json`.

Only classes of the installed package are built. Code that a hub folder brings along (`auto_map`) is never run, and
what a config says about files, kernels or other models to fetch is removed or refused.
"""

import contextlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import LoadError, RuntimeMissing, UsageError, did_you_mean, first_line
from mpcompile.frontend.hugging_face_config import without_foreign_names

log = logging.getLogger(__name__)

PREFIX = "hf:"
INSTALL = "transformers is not installed: pip install 'mpcompile[hf]'"
FEW = 3  # names that an error lists


def missing() -> str | None:
    """Why Hugging Face models cannot be loaded here; None if they can."""
    return None if importlib.util.find_spec("transformers") else INSTALL


def is_hugging_face(arch: str) -> bool:
    """Whether an architecture is a class of transformers, such as `hf:ViTForImageClassification`."""
    return arch.startswith(PREFIX)


def vision_class(arch: str, custom_code: bool = False) -> Any:
    """The class of transformers that `hf:NAME` names, which takes images and no text.

    `custom_code`: whether the folder brings code of its own, for the error. Raises RuntimeMissing, UsageError if there
    is no such class, and LoadError if it is for another kind of input.
    """
    if reason := missing():
        raise RuntimeMissing(f"{arch}: {reason}")
    import transformers

    name = arch.removeprefix(PREFIX)
    try:
        found: Any = getattr(transformers, name, None)
    except Exception as error:  # a class whose own dependencies are not installed
        raise LoadError(f"{arch} cannot be imported from transformers: {first_line(error)}") from error
    is_model = inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or found.config_class is None:
        if custom_code:
            raise LoadError(
                f"{arch} is not in transformers {transformers.__version__}, and the folder's own code (auto_map) was "
                "not run. If you trust that code, load the model in a function of yours: package.module:function"
            )
        classes = [known for known in dir(transformers) if known[0].isupper() and ("For" in known or "Model" in known)]
        raise UsageError(
            f"transformers {transformers.__version__} has no model class {name!r}{did_you_mean(name, classes)}; give "
            "--arch hf:CLASS, or install the version that has it"
        )
    if not _takes_images_only(found):
        raise LoadError(
            f"{arch} takes {_inputs_of(found)}, and mpcompile compresses models of images; {_instead(found)}"
        )
    return found


def _takes_images_only(kind: Any) -> bool:
    names = inspect.signature(kind.forward).parameters
    return "pixel_values" in names and "input_ids" not in names


def _inputs_of(kind: Any) -> str:
    names = inspect.signature(kind.forward).parameters
    if "input_ids" in names:
        return "text and images" if "pixel_values" in names else "text"
    return f"the input {next((name for name in names if name != 'self'), 'none')}"


def _instead(kind: Any) -> str:
    """What to give instead of a class that takes text: the classes of the same file that take images only."""
    import transformers

    family = vars(sys.modules[kind.__module__])
    parts = [
        name
        for name, other in family.items()
        if inspect.isclass(other)
        and issubclass(other, transformers.PreTrainedModel)
        and other.__module__ == kind.__module__
        and hasattr(transformers, name)
        and _takes_images_only(other)
    ]
    if not parts:
        return "give a model of images, such as a ViTForImageClassification"
    return f"give its vision part: --arch {' or '.join(PREFIX + part for part in parts[:FEW])}"


def build(arch: str, values: Mapping[str, Any]) -> nn.Module:
    """The model of a class and the content of its config, with random weights in float32. Raises as `vision_class`."""
    kind = vision_class(arch)
    config, options = _config(kind, values, arch)
    with _quiet(), _explained(arch, values):
        module: nn.Module = kind._from_config(
            config, dtype=torch.float32, attn_implementation=_attention(kind), **options
        )
    return module.eval()


def names_of(arch: str, values: Mapping[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    """The names of a model's weights: those of its modules, and those under which save_pretrained writes them."""
    kind = vision_class(arch)
    config, options = _config(kind, values, arch)
    with _quiet(), _explained(arch, values), torch.device("meta"):
        module = kind._from_config(config, dtype=torch.float32, attn_implementation=_attention(kind), **options)
    own = module.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion

        saved = revert_weight_conversion(module, dict(own))
    except Exception:  # transformers' own function, which may change; then only the modules' names are known
        log.debug("names in saved files are not known for %s", arch, exc_info=True)
        saved = own
    return frozenset(own), frozenset(saved)


def with_weights(
    arch: str, values: Mapping[str, Any], state: Mapping[str, Tensor], name: str
) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """The model with its weights in float32, the config that builds it anew, and sentences on what was not used.

    transformers' own rules rename the weights of older versions. Raises LoadError for weights that are missing, which
    transformers would fill with random numbers, or that have other shapes.
    """
    kind = vision_class(arch)
    module, info = _loaded(kind, values, state, arch)
    lacks, notes = sorted(info["missing_keys"]), list[str]()
    if lacks and all(one.startswith("pooler.") for one in lacks) and "add_pooling_layer" in _options_of(kind):
        values = {**values, "add_pooling_layer": False}
        module, info = _loaded(kind, values, state, arch)
        lacks = sorted(info["missing_keys"])
        notes.append(f"{name} has no weights of the pooler, so {kind.__name__} was built without it")
    shapes = sorted(info["mismatched_keys"])
    if lacks or shapes:
        listed = [_listed("missing", lacks)] if lacks else []
        texts = [f"{key} {tuple(found)} against {tuple(needed)}" for key, found, needed in shapes]
        listed += [_listed("of another shape", texts)] if texts else []
        raise LoadError(
            f"{name} does not fit {arch}: {'; '.join(listed)}. transformers would fill these with random numbers; give "
            "the class that was trained with --arch hf:CLASS, and changes of its config with --arch-arg"
        )
    if unused := sorted(info["unexpected_keys"]):
        notes.append(f"{name}: {arch} does not use {_listed('weights', unused)}")
    return module.eval(), without_foreign_names(values, arch), tuple(notes)


def _loaded(
    kind: Any, values: Mapping[str, Any], state: Mapping[str, Tensor], arch: str
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model with the weights that fit, and transformers' account of the others."""
    config, options = _config(kind, values, arch)
    with _quiet(), _explained(arch, values):
        module, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=torch.float32,
            attn_implementation=_attention(kind),
            ignore_mismatched_sizes=True,  # listed with the missing ones
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    if info["error_msgs"]:
        raise LoadError(f"{arch}: transformers cannot load the weights: {info['error_msgs'][0]}")
    return module, info


def _config(kind: Any, values: Mapping[str, Any], arch: str) -> tuple[Any, dict[str, Any]]:
    """The config object, and the arguments of the class's constructor that stand among the values."""
    plain = without_foreign_names(values, arch)
    options = {key: plain.pop(key) for key in _options_of(kind) & plain.keys()}
    with _quiet(), _explained(arch, values):
        return kind.config_class.from_dict(plain), options


def _options_of(kind: Any) -> set[str]:
    """Arguments of the constructor beside the config, such as `add_pooling_layer`."""
    every = inspect.signature(kind.__init__).parameters.values()
    return {one.name for one in every if one.kind is one.POSITIONAL_OR_KEYWORD} - {"self", "config"}


def _attention(kind: Any) -> str:
    """The implementation of attention: torch's scaled_dot_product_attention if the class has it."""
    return "sdpa" if kind._supports_sdpa else "eager"


@contextlib.contextmanager
def _explained(arch: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Raises LoadError for any error of transformers in the block."""
    try:
        yield
    except Exception as error:
        version = values.get("transformers_version")
        import transformers

        other = f" (written by version {version}, here is {transformers.__version__})" if version else ""
        raise LoadError(
            f"transformers cannot build {arch} from this config{other}: {type(error).__name__}: {first_line(error)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' progress bars and its log, whose content is told in our own errors and warnings."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _listed(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind}: {', '.join(names[:FEW])}" + (", …" if len(names) > FEW else "")
