"""Artifact: the output folder, what is in it, and the check that it still is what was proven.

recipe.yaml         the recipe, every default written out
model.safetensors   the compressed weights under their own names; loads into the original class
masks.safetensors   the masks (True where kept), the patterns in its metadata
model.onnx          the compressed model          (+ model.onnx.data over 2 GB)
dense.onnx          the model it is compared with (+ dense.onnx.data over 2 GB)
model.native.onnx   the compressed model for the CPU's N:M kernel, where that is faster
*.engine .json .log what the target built of them, where it builds files
report.json .md     what was done and measured; the hashes of the files above
report.html         the same as one page, to look at and to print
bench/TARGET/       what `mpcompile bench` measured later
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mpcompile.checkpoint import file_sha256
from mpcompile.errors import LoadError, MaskError
from mpcompile.masks import pattern_violation
from mpcompile.model import NM, LayerPlan, Model
from mpcompile.proof import ProvenMask, prove
from mpcompile.recipe import Recipe
from mpcompile.report import FileRow, Report

RECIPE, WEIGHTS, MASKS, COMPRESSED, DENSE = (
    "recipe.yaml", "model.safetensors", "masks.safetensors", "model.onnx", "dense.onnx",
)  # fmt: skip


@dataclass(frozen=True)
class Artifact:
    """An output folder and its report."""

    folder: Path
    report: Report

    @classmethod
    def open(cls, folder: Path) -> "Artifact":
        """The artifact in a folder. Raises LoadError where it is none."""
        needed = (RECIPE, WEIGHTS, MASKS, COMPRESSED, DENSE, "report.json")
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            raise LoadError(f"{folder} is not an output folder of mpcompile: {', '.join(missing)} missing")
        try:
            return cls(folder, Report.read(folder))
        except ValueError as error:
            raise LoadError(f"{folder / 'report.json'} is not a report of this version: {error}") from error

    @property
    def recipe(self) -> Recipe:
        """The recipe it was made by."""
        return Recipe.from_yaml((self.folder / RECIPE).read_text(encoding="utf-8"), str(self.folder / RECIPE))

    @property
    def onnx(self) -> Path:
        """The compressed model."""
        return self.folder / COMPRESSED

    @property
    def dense_onnx(self) -> Path:
        """The dense model in the same precision."""
        return self.folder / DENSE

    def verify(self) -> tuple[ProvenMask, ...]:
        """The masks, found again in the weights and in the ONNX file; then every file by its hash.

        Raises MaskError, with the layer's name, where a mask does not hold, and LoadError where a file was changed
        in another way.
        """
        import onnx

        plans, weights = read_masks(self.folder / MASKS), read_tensors(self.folder / WEIGHTS)
        for name, plan in plans.items():
            assert plan.mask is not None
            weight = weights.get(f"{name}.weight")
            if weight is None or weight.shape != plan.mask.shape:
                raise MaskError(f"{name}: {WEIGHTS} holds no weight of the mask's shape {tuple(plan.mask.shape)}")
            if plan.pattern and (broken := pattern_violation(plan.mask, plan.pattern)):
                raise MaskError(f"{name}: the mask itself is not {plan.pattern}: {broken}")
            filled = int((weight[~plan.mask] != 0).sum())
            if filled:
                raise MaskError(f"{name}: {filled} weights that the mask zeroes are not zero in {WEIGHTS}")
        try:
            file = onnx.load(self.onnx)
        except Exception as error:  # protobuf's DecodeError and OSError alike
            raise LoadError(f"{self.onnx} is not an ONNX file that can be read: {error}") from error
        rows = prove(file, plans, weights)
        for row in self.report.files:
            path = self.folder / row.name
            if not path.is_file():
                raise LoadError(f"{path} is missing")
            if file_sha256(path) != row.sha256:
                raise LoadError(f"{path} is not the file that was proven: its SHA-256 differs from the report's")
        return rows


def write_weights(folder: Path, module: nn.Module, model: Model) -> None:
    """Writes the compressed weights under the original module's names, and the masks."""
    from safetensors.torch import save

    new = model.graph.state_dict()
    aliases = _aliases(module)
    weights = {}
    for name, old in module.state_dict().items():
        known = next((alias for alias in (name, *aliases.get(name, ())) if alias in new), None)
        # Cloned, since safetensors refuses tensors that share memory.
        weights[name] = (old if known is None else new[known]).detach().clone().contiguous()
    source = {"format": "pt", "arch": model.source.arch, "source_sha256": model.source.sha256}
    (folder / WEIGHTS).write_bytes(save(weights, metadata=source))
    masks = {name: plan.mask.contiguous() for name, plan in model.plan.items() if plan.mask is not None}
    patterns = {name: str(plan.pattern) for name, plan in model.plan.items() if plan.mask is not None and plan.pattern}
    (folder / MASKS).write_bytes(save(masks, metadata={"patterns": json.dumps(patterns)}))


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """For each parameter and buffer, every name it has: the graph knows a module used twice by one of its names."""
    names: dict[int, list[str]] = {}
    for own in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, value in own:
            names.setdefault(id(value), []).append(name)
    return {name: same for same in names.values() for name in same}


def read_masks(path: Path) -> Mapping[str, LayerPlan]:
    """The masked layers of a masks.safetensors. Raises LoadError."""
    from safetensors import SafetensorError, safe_open

    masks = read_tensors(path)
    try:
        with safe_open(path, "pt") as file:
            patterns = json.loads((file.metadata() or {}).get("patterns", "{}"))
    except (SafetensorError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    return {
        name: LayerPlan(pattern=NM.parse(patterns[name]) if name in patterns else None, mask=mask.to(torch.bool))
        for name, mask in masks.items()
    }


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file. Raises LoadError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise LoadError(f"{path} is not a sound safetensors file: {error}") from error
    return tensors


def file_rows(folder: Path) -> tuple[FileRow, ...]:
    """Name, size and hash of every file in a folder."""
    return tuple(
        FileRow(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in sorted(folder.iterdir())
        if path.is_file()
    )
