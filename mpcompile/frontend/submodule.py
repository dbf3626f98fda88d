"""Which part of a model a shell pattern names: the module, its share of the parameters, and whether it stands alone."""

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase

from torch import Tensor, nn

from mpcompile.errors import UsageError, did_you_mean

SHOWN = 6  # candidates in an error
LEAST_SHARE = 0.02  # of the parameters, for a candidate
SUGGESTED_SHARE = 0.2  # of the parameters, for a part to compress in place of the model


def submodule_named(module: nn.Module, pattern: str) -> str:
    """The qualified name of the one module that a shell pattern matches; of nested ones, the outermost.

    Raises UsageError, which lists the largest parts with their shares of the parameters, if it matches none or several
    modules side by side, or if the part shares a weight with the rest of the model.
    """
    kind = type(module).__name__
    names = [name for name, _ in module.named_modules() if name]
    matched = [name for name in names if fnmatchcase(name, pattern)]
    outermost = [name for name in matched if not any(name.startswith(f"{other}.") for other in matched)]
    if not outermost:
        raise UsageError(
            f"--submodule {pattern!r} matches no module of {kind}; give one of its parts: {candidates(module)}"
            f"{did_you_mean(pattern, names)}"
        )
    if len(outermost) > 1:
        listed = ", ".join(_with_share(module, name) for name in outermost[:SHOWN])
        more = f" and {len(outermost) - SHOWN} more" if len(outermost) > SHOWN else ""
        raise UsageError(
            f"--submodule {pattern!r} matches {len(outermost)} modules of {kind} side by side: {listed}{more}; name "
            "one of them, or the module around them"
        )
    name: str = outermost[0]
    if (shared := _shared_weight(module, name)) is not None:
        raise UsageError(
            f"--submodule {name}: its weight {shared[0]} is also {shared[1]}, outside of it, and would change there "
            f"too; give a part that holds both: {candidates(module)}"
        )
    return name


def candidates(module: nn.Module) -> str:
    """The largest parts of a model that have a forward, with their shares of the parameters."""
    shares = {name: parameter_share(module, name) for name, part in module.named_modules() if name and _runs(part)}
    large = [name for name, share in shares.items() if share >= LEAST_SHARE and name.count(".") < 3]
    largest = sorted(large, key=lambda name: -shares[name])[:SHOWN]
    return ", ".join(_with_share(module, name) for name in largest) or "none has parameters"


def suggestion(module: nn.Module, around: Collection[str] = ()) -> str:
    """The option that compresses a large part of a model that cannot be compressed whole, as the end of a sentence.

    `around` are the modules that cannot be captured. Empty if no part outside of them is large. A backbone is preferred
    to a larger part.
    """
    parts = [name for name, part in module.named_modules() if name and name not in around and _runs(part)]
    shares = {name: parameter_share(module, name) for name in parts if name.count(".") < 3}
    large = sorted((name for name in shares if shares[name] >= SUGGESTED_SHARE), key=lambda name: -shares[name])
    large.sort(key=lambda name: name.rpartition(".")[2] != "backbone")
    if not large:
        return ""
    return (
        f"compress only its part {large[0]}, which has {shares[large[0]]:.0%} of the parameters: --submodule {large[0]}"
    )


def parameter_share(module: nn.Module, name: str) -> float:
    """The share of a model's parameters that belong to one of its modules, in [0, 1]; shared ones count once."""
    total = parameter_count(module)
    return parameter_count(module.get_submodule(name)) / total if total else 0.0


def parameter_count(module: nn.Module) -> int:
    """The number of parameters of a module; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _with_share(module: nn.Module, name: str) -> str:
    return f"{name} ({parameter_share(module, name):.1%} of the parameters)"


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward; ModuleList and ModuleDict have none."""
    return type(module).forward is not nn.Module.forward


def _shared_weight(module: nn.Module, name: str) -> tuple[str, str] | None:
    """Two names of one parameter or buffer, the first inside the part and the second outside; None if there is none."""
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    for tensor_name, tensor in _tensors(module):
        side = inside if tensor_name.startswith(f"{name}.") else outside
        side.setdefault(id(tensor), tensor_name)
    return next(((own, outside[key]) for key, own in inside.items() if key in outside), None)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
