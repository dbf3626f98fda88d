"""A checkpoint as a file: what a pass changed in weights, buffers and plan, as safetensors, and read back."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import Tensor

from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.results import Certificate, Epoch, Spectrum
from mpcompile.pipeline.fingerprint import structure_of, tensors_of
from mpcompile.pipeline.pass_manager import PassRecord
from mpcompile.system.hashing import sha256, sha256_of

KEY = "mpcompile.frontend.weights_file"


class Entry(BaseModel):
    """What a checkpoint says beside its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    facts: dict[str, str]
    record: PassRecord
    result: str  # the hash of the model after the pass
    rebuilt: bool  # whether the pass changed the graph, and so has to be run again
    rest: dict[str, Any]
    gone: tuple[str, ...]  # tensors that the model had before the pass and not after it


@dataclass(frozen=True, slots=True)
class State:
    """A model as hashes."""

    structure: str
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, model: Model) -> "State":
        """The hashes of a model."""
        return cls(structure_of(model), {name: sha256_of(value) for name, value in tensors_of(model).items()})

    def result(self, rest: Mapping[str, Any]) -> str:
        """One hash of them and of what a model is besides."""
        return sha256(self.structure, repr(sorted(self.tensors.items())), json.dumps(rest, sort_keys=True))


def link(old: Path, new: Path) -> None:
    """The file under a second name, or a copy of it where the disk knows no such thing."""
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def read_entry(path: Path) -> Entry | None:
    """What a checkpoint says, or None where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return Entry.model_validate(json.loads((file.metadata() or {})[KEY]))
    except (SafetensorError, OSError, ValueError, KeyError):
        return None


def rest_of(model: Model) -> dict[str, Any]:
    """What a model is beside its graph and its tensors, as JSON has it."""
    rest = {
        "plan": {name: _plan_rest(plan) for name, plan in model.plan.items()},
        "certificate": None if model.certificate is None else asdict(model.certificate),
        "epochs": [asdict(epoch) for epoch in model.epochs],
    }
    found: dict[str, Any] = json.loads(json.dumps(rest))  # tuples as lists, as they come back
    return found


def _plan_rest(plan: LayerPlan) -> dict[str, Any]:
    """A layer's plan, its tensors by whether they are there."""
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    values |= {name: values[name] is not None for name in ("mask", "permutation")}
    return values | {
        "pattern": None if plan.pattern is None else str(plan.pattern),
        "spectrum": None if plan.spectrum is None else asdict(plan.spectrum),
    }


def restored(model: Model, rest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    """The model with these tensors, written into its graph, and the rest."""
    own = tensors_of(model)
    with torch.no_grad():
        for name, value in tensors.items():
            if name.startswith("weight/"):
                own[name].copy_(value)
    now = own | {name: value for name, value in tensors.items() if not name.startswith("weight/")}
    plan = {}
    for name, values in rest["plan"].items():
        given: dict[str, Any] = {key: now[f"{key}/{name}"] if values[key] else None for key in ("mask", "permutation")}
        pattern, spectrum = values["pattern"], values["spectrum"]
        given["pattern"] = NM.parse(pattern) if pattern else None
        given["spectrum"] = Spectrum(**spectrum) if spectrum else None
        plan[name] = LayerPlan(**{**values, **given})
    certificate = rest["certificate"]
    return replace(
        model,
        plan=MappingProxyType(plan),
        certificate=None if certificate is None else TypeAdapter(Certificate).validate_python(certificate),
        epochs=tuple(Epoch(**epoch) for epoch in rest["epochs"]),
    )
