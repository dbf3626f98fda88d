"""The checkpoint file format: the tensors that a pass changed, as safetensors, and the rest of the model as JSON."""

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
from mpcompile.ir.results import Certificate, Epoch, Polished, Spectrum
from mpcompile.ir.structure import structure_of, tensors_of
from mpcompile.pipeline.pass_record import PassRecord
from mpcompile.system.hashing import sha256
from mpcompile.system.tensor_hashing import sha256_of

PLAN_TENSORS = ("mask", "permutation", "scale")  # the fields of LayerPlan that are tensors
KEY = "mpcompile.checkpoint"  # the metadata key of a checkpoint's entry; part of the file format


class Entry(BaseModel):
    """The JSON part of a checkpoint file: everything about the pass's result except tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    facts: dict[str, str]  # hashes of everything that the pass's result depends on (mpcompile/pipeline/fingerprint.py)
    record: PassRecord
    result: str  # the hash of the model after the pass
    rebuilt: bool  # whether the pass changed the graph; it is then run again on resume
    rest: dict[str, Any]  # plan, certificate and epochs of the model after the pass
    gone: tuple[str, ...]  # names of the tensors that the pass removed


@dataclass(frozen=True, slots=True)
class State:
    """The hashes of a model: of its structure, and of each tensor by name."""

    structure: str
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, model: Model) -> "State":
        """The state of a model."""
        return cls(structure_of(model), {name: sha256_of(value) for name, value in tensors_of(model).items()})

    def result(self, rest: Mapping[str, Any]) -> str:
        """One hash of structure, tensors and `rest`, the JSON that `rest_of` returns."""
        return sha256(self.structure, repr(sorted(self.tensors.items())), json.dumps(rest, sort_keys=True))


def link(old: Path, new: Path) -> None:
    """Makes `new` a hard link to `old`, or a copy if the file system has no hard links; replaces an existing file."""
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def read_entry(path: Path) -> Entry | None:
    """The JSON part of a checkpoint file, or None if the file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return Entry.model_validate(json.loads((file.metadata() or {})[KEY]))
    except (SafetensorError, OSError, ValueError, KeyError):
        return None


def rest_of(model: Model) -> dict[str, Any]:
    """Plan, certificate and epochs of a model as JSON values; the plan's tensors are replaced by presence flags."""
    rest = {
        "plan": {name: _plan_rest(plan) for name, plan in model.plan.items()},
        "certificate": None if model.certificate is None else asdict(model.certificate),
        "epochs": [asdict(epoch) for epoch in model.epochs],
        "polished": None if model.polished is None else asdict(model.polished),
    }
    as_json: dict[str, Any] = json.loads(json.dumps(rest))  # turns tuples into lists, as a file is read back
    return as_json


def _plan_rest(plan: LayerPlan) -> dict[str, Any]:
    """A LayerPlan as JSON values; tensors are replaced by presence flags."""
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    values |= {name: values[name] is not None for name in PLAN_TENSORS}
    return values | {
        "pattern": None if plan.pattern is None else str(plan.pattern),
        "spectrum": None if plan.spectrum is None else asdict(plan.spectrum),
    }


def restored(model: Model, rest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    """The model after a pass, from its checkpoint.

    `model` is the model before the pass, `rest` what `rest_of` returned, `tensors` the tensors that the pass changed.
    Weights and buffers are copied into the graph of `model` in place. Masks and permutations come from `tensors`, or
    from `model` if the pass did not change them; plan, certificate and epochs come from `rest`.
    """
    current = tensors_of(model)
    with torch.no_grad():
        for name, value in tensors.items():
            if name.startswith("weight/"):
                current[name].copy_(value)
    available = current | {name: value for name, value in tensors.items() if not name.startswith("weight/")}
    plan = {}
    for name, values in rest["plan"].items():
        decoded: dict[str, Any] = {key: available[f"{key}/{name}"] if values[key] else None for key in PLAN_TENSORS}
        pattern, spectrum = values["pattern"], values["spectrum"]
        decoded["pattern"] = NM.parse(pattern) if pattern else None
        decoded["spectrum"] = TypeAdapter(Spectrum).validate_python(spectrum) if spectrum else None
        plan[name] = LayerPlan(**{**values, **decoded})
    certificate, polished = rest["certificate"], rest.get("polished")
    return replace(
        model,
        plan=MappingProxyType(plan),
        certificate=None if certificate is None else TypeAdapter(Certificate).validate_python(certificate),
        epochs=tuple(Epoch(**epoch) for epoch in rest["epochs"]),
        polished=None if polished is None else TypeAdapter(Polished).validate_python(polished),
    )
