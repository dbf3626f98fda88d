"""Artifact: an output folder, its files, and the check that they are unchanged since they were written.

recipe.yaml         the recipe with every default written out
model.safetensors   the compressed weights under the names of the original class, which loads them
masks.safetensors   the masks (True where a weight is kept); the patterns are in its metadata
model.onnx          the compressed model               (+ model.onnx.data over 2 GB)
dense.onnx          the dense model in the same precision, in fp32 if that is int8 or fp8 (+ dense.onnx.data over 2 GB)
dense_int8.onnx     the dense model through the pass quantize alone, in int8; dense_fp8.onnx in fp8. It is absent if
                    quantize is the only pass that changes the model: model.onnx is then that file
model.native.onnx   the compressed model with N:M kernels for the CPU, if these are faster
*.engine .json .log files that the target built from the ONNX files, if it builds files
report.json .md     passes, measurements and results, with the hashes of the files above
report.html         the same report as one page, for the browser and for printing
report.sha256       the hashes of the three files of the report, in the format of sha256sum
tried/N.yaml        the recipe of row N of a search (--tune), for each recipe that it measured
passes/             the result of each pass (--keep-passes), for --from
bench/TARGET/       results of a later `mpcompile bench`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Literal, overload

import torch
from torch import nn

from mpcompile.data.transform import Transform, evaluation_transform
from mpcompile.driver.load_artifact import (
    Engine,
    OrtEngine,
    Runtime,
    captured_again,
    module_of,
    onnx_engine,
    target_engine,
)
from mpcompile.driver.read_report import read_report
from mpcompile.driver.run_plan import runtime_named
from mpcompile.driver.weight_files import MASKS, WEIGHTS, as_in_graph, read_masks
from mpcompile.errors import LoadError, MaskError, MpcompileError, UsageError, cause_of
from mpcompile.export.mask_check import ProvenMask, verify_masks
from mpcompile.export.onnx_export import Exported
from mpcompile.frontend.call_inputs import InputSpec
from mpcompile.frontend.stored_weights import layer_weight
from mpcompile.ir.precision import QUANTIZED
from mpcompile.ir.weight_groups import pattern_violation
from mpcompile.recipe.schema import Recipe, read_recipe
from mpcompile.report.report_hashes import require_unchanged
from mpcompile.report.schema import FileRow, Report
from mpcompile.runtimes import LoadsFile, RunsGraph
from mpcompile.system.hashing import file_sha256
from mpcompile.system.safetensors_io import read_tensors

RECIPE, COMPRESSED, DENSE, PASSES = "recipe.yaml", "model.onnx", "dense.onnx", "passes"
WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# The forms that `load` returns, and the arguments that each form accepts.
FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch": ("model", "allow_factory"),
        "onnx": ("threads",),
        "engine": ("runtime", "threads", "batches", "model", "allow_factory"),
    }
)


@dataclass(frozen=True)
class Artifact:
    """An output folder of `compile` and its report."""

    folder: Path
    report: Report

    @classmethod
    def open(cls, folder: str | Path) -> "Artifact":
        """The artifact in a folder. Raises LoadError if files are missing or the report cannot be read."""
        folder = Path(folder)
        needed = (RECIPE, WEIGHTS, MASKS, COMPRESSED, DENSE, "report.json")
        try:
            missing = [name for name in needed if not (folder / name).is_file()]
        except (OSError, ValueError) as error:  # too long, no permission, or a byte that names cannot have
            raise LoadError(f"{folder} cannot be looked up: {error}") from error
        if missing:
            raise LoadError(f"{folder} is not an output folder of mpcompile: {', '.join(missing)} missing")
        return cls(folder, read_report(folder))

    def _repr_html_(self) -> str:
        """The artifact in a Jupyter notebook: its report, and where the files are."""
        where = f"Files in {self.folder}; the whole report is report.html."
        return f"{self.report._repr_html_()}<p>{escape(where)}</p>"

    @property
    def recipe(self) -> Recipe:
        """The recipe that the artifact was compiled with, from recipe.yaml. Raises UsageError if it is invalid."""
        return read_recipe(self.folder / RECIPE)

    @property
    def onnx(self) -> Path:
        """The path of the compressed ONNX file."""
        return self.folder / COMPRESSED

    @property
    def dense_onnx(self) -> Path:
        """The path of the dense ONNX file: in the recipe's precision, or in fp32 if that is int8 or fp8."""
        return self.folder / DENSE

    @property
    def dense_quantized_onnx(self) -> Path | None:
        """The path of the dense model in int8 or fp8; None if the folder has no such file."""
        name = dense_quantized_file(self.report.recipe)
        return self.folder / name if any(row.name == name for row in self.report.files) else None

    def transform(self) -> Transform:
        """The preprocessing that the model was compiled with: PIL image in RGB or L -> float32 (c, h, w)."""
        return evaluation_transform(self.report.model)

    def exported(self, file: Path, masks: tuple[ProvenMask, ...] = ()) -> Exported:
        """An ONNX file of the folder with the facts that a runtime needs; `masks` are those that `verify` returned."""
        recipe, source = self.report.recipe, self.report.model
        in_float = recipe.precision in QUANTIZED and file == self.dense_onnx
        captured = self.report.captured
        names: dict[str, tuple[str, ...]] = {}
        if captured is not None:
            names["input_names"] = tuple(row.name for row in captured.inputs)
            names["output_names"] = tuple(row.name for row in captured.outputs)
        return Exported(
            onnx=file,
            arch=source.arch,
            image_shape=self.report.image_shape,
            precision="fp32" if in_float else recipe.precision,
            batch=recipe.batch,
            masks=masks,
            merges=file == self.onnx and self.report.merges_tokens(),
            **names,
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
        """The compressed model, ready to run. No pickled code is executed.

        `"torch"`: a module of the original class with the compressed weights, in evaluation mode. Its outputs are
        compared with model.onnx on noise. A timm model is built anew. A model of `pkg.mod:factory` is built anew only
        with `allow_factory`, because the report then names code to run. If the model was given in Python, pass a new
        instance as `model`; it is not changed. This form is refused if tokens are merged, or in int8 and fp8: the
        original class neither merges tokens nor quantises activations.

        `"onnx"`: ONNX Runtime on the CPU. It runs model.native.onnx if that file and the N:M kernel are available, else
        model.onnx; `.file` is the file that runs. A bfloat16 file runs in float32 on its rounded weights. Calls are
        thread-safe.

        `"engine"`: an engine of the recipe's target, or of `runtime`, for `batches` (by default the recipe's). `model`
        and `allow_factory` are used as above if the target runs the graph and not a file (`eager`).

        The last two forms take images (b, c, h, w) and return logits (b, outputs), NumPy arrays of float32. Images have
        to be preprocessed by `transform()`. Raises a MpcompileError; RuntimeMissing names the package
        to install.
        """
        arguments: dict[str, object] = {"model": model, "allow_factory": allow_factory, "runtime": runtime}
        arguments |= {"threads": threads, "batches": batches}
        if form not in FORMS:
            raise UsageError(f"load({form!r}) is unknown; the forms are {', '.join(FORMS)}")
        excess = [name for name, value in arguments.items() if value not in (None, False) and name not in FORMS[form]]
        if excess:
            raise UsageError(f"load({form!r}) takes no {', '.join(excess)}")
        exported = self.exported(self.onnx)
        inputs = () if self.report.captured is None else self.report.captured.inputs[1:]
        others = {row.name: InputSpec(row.shape, row.dtype) for row in inputs}
        if form == "torch":
            part = self.report.part
            return module_of(self.folder / WEIGHTS, self.report.model, exported, model, allow_factory, others, part)
        if form == "onnx":
            return onnx_engine(exported, threads)
        if runtime is None:
            runtime = runtime_named(self.report.recipe.target)
            if isinstance(runtime, LoadsFile):
                return runtime.load_file(exported, threads)
        captured = None
        if isinstance(runtime, RunsGraph):
            part = self.report.part
            module = module_of(self.folder / WEIGHTS, self.report.model, exported, model, allow_factory, others, part)
            captured = captured_again(module, self.report.model, exported.output_names[0], others, part)
        else:
            exported = self.exported(self.onnx, self.verify())
        return target_engine(runtime, exported, threads, batches or self.report.recipe.timed_batches, captured)

    def verify(self) -> tuple[ProvenMask, ...]:
        """The masks, checked in the weights and in the ONNX file; then the SHA-256 of every file is checked.

        The files of the report are checked against report.sha256. If the folder has none, they are not protected
        (`mpcompile.report.report_hashes.is_protected`).

        Raises MaskError, which names the layer, if a mask does not hold, and LoadError if a file is missing, damaged or
        changed.
        """
        import onnx

        plans, weights = read_masks(self.folder / MASKS), read_tensors(self.folder / WEIGHTS)
        for name, plan in plans.items():
            assert plan.mask is not None
            weight = layer_weight(name, weights)
            if weight is None or weight.shape != plan.mask.shape:
                raise MaskError(f"{name}: {WEIGHTS} has no weight of the mask's shape {tuple(plan.mask.shape)}")
            if weight.dtype not in WEIGHT_TYPES or weight.ndim < 2:
                kind = str(weight.dtype).removeprefix("torch.")
                raise LoadError(
                    f"{name}: {WEIGHTS} has {kind} {tuple(weight.shape)}; a weight is floating point, of 2 axes or more"
                )
            if plan.pattern and (broken := pattern_violation(plan.mask, plan.pattern)):
                raise MaskError(f"{name}: the mask itself is not {plan.pattern}: {broken}")
            nonzero = int((weight[~plan.mask] != 0).sum())
            if nonzero:
                raise MaskError(f"{name}: {nonzero} weights that the mask zeroes are not zero in {WEIGHTS}")
        try:
            file = onnx.load(self.onnx)
        except Exception as error:  # protobuf's DecodeError, or OSError
            raise LoadError(f"{self.onnx} cannot be read as an ONNX file: {error}") from error
        try:
            rows = verify_masks(file, *as_in_graph(plans, weights))
            size = tuple(axis.dim_value for axis in file.graph.input[0].type.tensor_type.shape.dim[1:])
        except MpcompileError:
            raise
        except Exception as error:  # a graph that no exporter writes: missing inputs, cycles, missing axes …
            raise LoadError(f"{self.onnx} is damaged, so its masks cannot be checked: {cause_of(error)}") from error
        if size != self.report.image_shape:
            raise LoadError(f"{self.onnx} takes images of {size}, but its report says {self.report.image_shape}")
        unlisted = {RECIPE, WEIGHTS, MASKS, COMPRESSED, DENSE} - {row.name for row in self.report.files}
        if unlisted:
            raise LoadError(
                f"{self.folder / 'report.json'} lists no hash of {', '.join(sorted(unlisted))}; compile again"
            )
        for row in self.report.files:
            path = self.folder / row.name
            if not path.is_file():
                raise LoadError(f"{path} is missing")
            if file_sha256(path) != row.sha256:
                raise LoadError(f"{path} was changed: its SHA-256 differs from the one in the report")
        require_unchanged(self.folder)
        return rows


def dense_quantized_file(recipe: Recipe) -> str:
    """The name of the dense model in the recipe's precision, if that is int8 or fp8."""
    return f"dense_{recipe.precision}.onnx"


def file_rows(folder: Path) -> tuple[FileRow, ...]:
    """Path, size and SHA-256 of every file in a folder and its subfolders."""
    return tuple(
        FileRow(name=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
