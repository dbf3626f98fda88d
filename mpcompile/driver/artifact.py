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
passes/             what each pass changed (--keep-passes), for --from
bench/TARGET/       what `mpcompile bench` measured later
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, overload

import torch
from pydantic import ValidationError
from torch import nn

from mpcompile.driver.load_artifact import Engine, OrtEngine, Runtime, module_of, onnx_engine, target_engine
from mpcompile.driver.run_plan import runtime_named
from mpcompile.errors import LoadError, MaskError, MpcompileError, UsageError, cause_of
from mpcompile.export.mask_check import ProvenMask, verify_masks
from mpcompile.export.onnx_export import Exported
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import pattern_violation
from mpcompile.recipe.schema import Recipe, explained, read_recipe
from mpcompile.report.schema import FileRow, Report
from mpcompile.system.hashing import file_sha256
from mpcompile.system.safetensors_io import read_tensors, tensor_bytes

RECIPE, WEIGHTS, MASKS, COMPRESSED, DENSE, PASSES = (
    "recipe.yaml", "model.safetensors", "masks.safetensors", "model.onnx", "dense.onnx", "passes",
)  # fmt: skip


WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The forms in which a model is loaded, and which arguments each takes.
FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch": ("model", "allow_factory"),
        "onnx": ("threads",),
        "engine": ("runtime", "threads", "batches", "model", "allow_factory"),
    }
)


@dataclass(frozen=True)
class Artifact:
    """An output folder and its report."""

    folder: Path
    report: Report

    @classmethod
    def open(cls, folder: str | Path) -> "Artifact":
        """The artifact in a folder. Raises LoadError where it is none."""
        folder = Path(folder)
        needed = (RECIPE, WEIGHTS, MASKS, COMPRESSED, DENSE, "report.json")
        try:
            missing = [name for name in needed if not (folder / name).is_file()]
        except (OSError, ValueError) as error:  # too long, no permission, or a byte that names cannot have
            raise LoadError(f"{folder} cannot be looked up: {error}") from error
        if missing:
            raise LoadError(f"{folder} is not an output folder of mpcompile: {', '.join(missing)} missing")
        try:
            return cls(folder, Report.read(folder))
        except ValidationError as error:
            raise LoadError(f"{folder / 'report.json'} is not a report of this version: {explained(error)}") from error
        except (OSError, ValueError) as error:
            raise LoadError(f"{folder / 'report.json'} cannot be read: {error}") from error

    @property
    def recipe(self) -> Recipe:
        """The recipe it was made by."""
        return read_recipe(self.folder / RECIPE)

    @property
    def onnx(self) -> Path:
        """The compressed model."""
        return self.folder / COMPRESSED

    @property
    def dense_onnx(self) -> Path:
        """The dense model in the same precision."""
        return self.folder / DENSE

    def exported(self, file: Path, masks: tuple[ProvenMask, ...] = ()) -> Exported:
        """What a runtime has to know of `onnx`, or of `dense_onnx`; `masks` are those proven in it."""
        recipe, source = self.report.recipe, self.report.model
        return Exported(
            onnx=file,
            arch=source.arch,
            image_shape=source.size,
            precision=recipe.precision,
            batch=recipe.batch,
            masks=masks,
            merges=file == self.onnx and self.report.merges_tokens(),
        )

    @overload
    def load(
        self, form: Literal["torch"], *, model: nn.Module | None = None, allow_factory: bool = False
    ) -> nn.Module: ...

    @overload
    def load(self, form: Literal["onnx"], *, threads: int | None = None) -> OrtEngine: ...

    @overload
    def load(
        self,
        form: Literal["engine"],
        *,
        runtime: Runtime | None = None,
        threads: int | None = None,
        batches: Sequence[int] | None = None,
        model: nn.Module | None = None,
        allow_factory: bool = False,
    ) -> Engine: ...

    def load(
        self,
        form: Literal["torch", "onnx", "engine"],
        *,
        model: nn.Module | None = None,
        allow_factory: bool = False,
        runtime: Runtime | None = None,
        threads: int | None = None,
        batches: Sequence[int] | None = None,
    ) -> nn.Module | Engine:
        """The compressed model, ready to run. No pickled code is run for it.

        `"torch"`: a module of the original class with the compressed weights, in evaluation mode, compared with
        model.onnx on noise. timm's models are built again; so are those of `pkg.mod:factory`, where `allow_factory`
        says that the report may name code to run; for one given in Python give a new instance as `model`, which is left
        as it was. Refused where tokens are merged, which the original class does not do.

        `"onnx"`: ONNX Runtime on the CPU, on model.native.onnx where that is there and the N:M kernel works here, else
        on model.onnx; `.file` says on which. A bfloat16 file runs in float32 on its rounded weights. Calls are
        thread-safe.

        `"engine"`: what the recipe's target, or `runtime`, makes of the file here, for `batches` (by default the
        recipe's); `model` and `allow_factory` are for target `eager`, as above.

        The last two take images (b, c, h, w) and return logits (b, outputs), both NumPy arrays of float32; images are
        normalised as `report.model` says. Raises a MpcompileError: RuntimeMissing says what to install.
        """
        given: dict[str, object] = {"model": model, "allow_factory": allow_factory, "runtime": runtime}
        given |= {"threads": threads, "batches": batches}
        if form not in FORMS:
            raise UsageError(f"a model is loaded as one of {', '.join(FORMS)}; {form!r} is none of them")
        excess = [name for name, value in given.items() if value not in (None, False) and name not in FORMS[form]]
        if excess:
            raise UsageError(f"load({form!r}) takes no {', '.join(excess)}")
        exported = self.exported(self.onnx)
        if form == "torch":
            return module_of(self.folder / WEIGHTS, self.report.model, exported, model, allow_factory)
        target = self.report.recipe.target
        if form == "onnx" or (runtime is None and target == "ort"):
            return onnx_engine(exported, threads)
        runtime = runtime or runtime_named(target)
        captured = None
        if runtime.name == "eager":
            module = module_of(self.folder / WEIGHTS, self.report.model, exported, model, allow_factory)
            captured = capture(module, self.report.model)
        else:
            exported = self.exported(self.onnx, self.verify())
        return target_engine(runtime, exported, threads, batches or self.report.recipe.timed_batches, captured)

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
            if weight.dtype not in WEIGHT_TYPES or weight.ndim < 2:
                what = str(weight.dtype).removeprefix("torch.")
                raise LoadError(f"{name}: {WEIGHTS} holds {what} {tuple(weight.shape)}; that is no weight of a layer")
            if plan.pattern and (broken := pattern_violation(plan.mask, plan.pattern)):
                raise MaskError(f"{name}: the mask itself is not {plan.pattern}: {broken}")
            filled = int((weight[~plan.mask] != 0).sum())
            if filled:
                raise MaskError(f"{name}: {filled} weights that the mask zeroes are not zero in {WEIGHTS}")
        try:
            file = onnx.load(self.onnx)
        except Exception as error:  # protobuf's DecodeError and OSError alike
            raise LoadError(f"{self.onnx} is not an ONNX file that can be read: {error}") from error
        try:
            rows = verify_masks(file, plans, weights)
            size = tuple(axis.dim_value for axis in file.graph.input[0].type.tensor_type.shape.dim[1:])
        except MpcompileError:
            raise
        except Exception as error:  # a graph that no exporter writes: inputs missing, cycles, axes that are not there …
            raise LoadError(f"{self.onnx} is not the file of these masks, and is damaged: {cause_of(error)}") from error
        if size != self.report.model.size:
            raise LoadError(f"{self.onnx} takes images of {size}, and its report says {self.report.model.size}")
        unlisted = {RECIPE, WEIGHTS, MASKS, COMPRESSED, DENSE} - {row.name for row in self.report.files}
        if unlisted:
            raise LoadError(
                f"{self.folder / 'report.json'} does not list {', '.join(sorted(unlisted))}, so proves nothing of it"
            )
        for row in self.report.files:
            path = self.folder / row.name
            if not path.is_file():
                raise LoadError(f"{path} is missing")
            if file_sha256(path) != row.sha256:
                raise LoadError(f"{path} is not the file that was proven: its SHA-256 differs from the report's")
        return rows


def write_weights(folder: Path, module: nn.Module, model: Model) -> None:
    """Writes the compressed weights under the original module's names, and the masks."""
    new = model.graph.state_dict()
    aliases = _aliases(module)
    weights = {}
    for name, old in module.state_dict().items():
        known = next((alias for alias in (name, *aliases.get(name, ())) if alias in new), None)
        weights[name] = old if known is None else new[known]
    source = {"format": "pt", "arch": model.source.arch, "source_sha256": model.source.sha256}
    (folder / WEIGHTS).write_bytes(tensor_bytes(weights, source))
    patterns = {name: str(pattern) for name, pattern in model.patterns().items()}
    (folder / MASKS).write_bytes(tensor_bytes(model.masks(), {"patterns": json.dumps(patterns)}))


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """For each parameter and buffer, every name it has: the graph knows a module used twice by one of its names."""
    names: dict[int, list[str]] = {}
    for own in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, value in own:
            names.setdefault(id(value), []).append(name)
    return {name: same for same in names.values() for name in same}


def read_masks(path: Path) -> Mapping[str, LayerPlan]:
    """The masked layers of a masks.safetensors. Raises LoadError."""
    from safetensors import safe_open

    masks = read_tensors(path)
    try:
        with safe_open(path, "pt") as file:
            patterns = json.loads((file.metadata() or {}).get("patterns", "{}"))
        parsed = {str(name): NM.parse(str(text)) for name, text in patterns.items()}
    except Exception as error:  # SafetensorError, and all that JSON can be in place of patterns
        raise LoadError(f"{path} names no patterns that can be read: {cause_of(error)}") from error
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.ndim < 2:
            kind = str(mask.dtype).removeprefix("torch.")
            raise LoadError(f"{path}: {name} is {kind} {tuple(mask.shape)}; a mask is bool, of two axes or more")
    return {name: LayerPlan(pattern=parsed.get(name), mask=mask) for name, mask in masks.items()}


def file_rows(folder: Path) -> tuple[FileRow, ...]:
    """Name, size and hash of every file in a folder and below it."""
    return tuple(
        FileRow(name=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
