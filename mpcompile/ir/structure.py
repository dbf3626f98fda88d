"""A model's tensors by name, and the hash of everything else in it."""

import re
from dataclasses import replace

from torch import Tensor

from mpcompile.ir.model import Model
from mpcompile.system.hashing import sha256
from mpcompile.system.tensor_hashing import sha256_of

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def tensors_of(model: Model) -> dict[str, Tensor]:
    """All tensors of a model by name: `weight/` parameters and buffers, `mask/`, `permutation/`, `scale/` by layer."""
    graph = model.graph
    named = (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    tensors: dict[str, Tensor] = {f"weight/{name}": value for name, value in named}
    for name, plan in model.plan.items():
        if plan.mask is not None:
            tensors[f"mask/{name}"] = plan.mask
        if plan.permutation is not None:
            tensors[f"permutation/{name}"] = plan.permutation
        if plan.scale is not None:
            tensors[f"scale/{name}"] = plan.scale
    return tensors


def structure_of(model: Model) -> str:
    """The hash of a model without its values: nodes, modules, tied weights, dtypes, shapes, source, example, head."""
    # Without the names of files, which have several paths: weights are hashed elsewhere, preprocessing by its values.
    examples = " ".join(map(sha256_of, model.example_inputs))
    lines = [f"{examples} {replace(model.source, name='', preprocessing='')!r} {model.head!r} {model.around!r}"]
    for node in model.graph.graph.nodes:
        target = node.target
        if callable(target):
            target = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"
        lines.append(f"{node.op} {node.name} {target} {node.args} {node.kwargs}")
    for name, module in model.graph.named_modules():
        lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {module.extra_repr()}")
    first: dict[int, str] = {}
    for name, value in tensors_of(model).items():
        if name.startswith("weight/"):
            lines.append(f"{name} {first.setdefault(id(value), name)} {value.dtype} {tuple(value.shape)}")
    return sha256(*(ADDRESS.sub("", line) for line in lines))
