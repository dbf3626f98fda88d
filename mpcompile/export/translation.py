"""Translation: a graph as torch.onnx translates it, before optimization, from which files with other weights are made.

Translating takes seconds and does not depend on the values of weights. A run writes several files whose models differ
in values only: the dense and the compressed one, and those that a search tries. The values are put into a copy of the
translation, which is then optimized as torch.onnx would have done.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpcompile.errors import BuildError, cause_of
from mpcompile.export.output_names import are_unique, provisional, rename_outputs
from mpcompile.export.split_sizes import with_piece_sizes
from mpcompile.export.translations import translations
from mpcompile.ir.model import Model
from mpcompile.ir.structure import structure_of
from mpcompile.system.hashing import sha256

PLAIN = (bool, int, float, str, type(None))  # attributes of modules that a translation may depend on


@dataclass(frozen=True, slots=True)
class Translation:
    """A model's graph in ONNX without optimization.

    Attributes:
        key: the hash of what it depends on: structure, batch, opset.
        program: the ONNXProgram of torch.onnx.
        output_names: the names that the outputs have in the program.
        batch: the fixed batch size, or None.
    """

    key: str
    program: Any
    output_names: tuple[str, ...]
    batch: int | None

    def serves(self, model: Model, batch: int | None, opset: int) -> bool:
        """Whether it is that of this model: only values of weights differ, and all constants in it are weights."""
        weights = model.graph.state_dict()
        return key_of(model, batch, opset) == self.key and all(
            name in weights for name in self.program.model.graph.initializers
        )

    def with_weights_of(self, model: Model) -> onnx.ModelProto:
        """The optimized file in float32 with this model's weights and output names. Raises BuildError."""
        from onnx_ir.tensor_adapters import TorchTensor

        copy = self.program.model.clone()
        for name, value in model.graph.state_dict().items():
            if name in copy.graph.initializers:
                copy.graph.initializers[name].const_value = TorchTensor(value.detach(), name=name)
        program = type(self.program)(copy, self.program.exported_program)
        program.optimize()
        _register_initializers(program.model)
        file: onnx.ModelProto = program.model_proto
        if self.batch is None:
            _require_free_batch(file, model)
        if self.output_names != model.output_names:
            rename_outputs(file, model.output_names)
        return file


def translated(
    model: Model, batch: int | None, opset: int, known: Translation | None = None
) -> tuple[Translation, onnx.ModelProto]:
    """The model's translation, which is the known one if it serves, and the file made from it. Raises BuildError."""
    if known is not None and known.serves(model, batch, opset):
        return known, known.with_weights_of(model)
    for name in model.output_names:
        if name in model.graph.state_dict():
            raise BuildError(f"the output {name} has the name of a weight; return it under another key")
    key = key_of(model, batch, opset)
    found = Translation(key, _translated(model, batch, opset, model.output_names), model.output_names, batch)
    file = found.with_weights_of(model)
    if not are_unique(file, model.output_names):
        names = tuple(provisional(model.output_names))
        found = Translation(key, _translated(model, batch, opset, names), names, batch)
        file = found.with_weights_of(model)
    return found, file


def key_of(model: Model, batch: int | None, opset: int) -> str:
    """The hash of everything in a model, other than values of weights, that its translation may depend on."""
    attributes = [
        (name, key, value)
        for name, module in model.graph.named_modules()
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and _is_plain(value)
    ]
    return sha256(structure_of(model), repr((attributes, model.input_names, model.output_names, batch, opset)))


def _is_plain(value: object) -> bool:
    """Whether a value, or each in a tuple, is a number, a text, a truth value or None."""
    return all(isinstance(one, PLAIN) for one in (value if isinstance(value, tuple) else (value,)))


def _translated(model: Model, batch: int | None, opset: int, output_names: Sequence[str]) -> Any:
    """The graph as an ONNXProgram in float32, not optimized, from torch's exporter. Raises BuildError."""
    inputs = model.example_inputs
    if batch is not None:
        inputs = tuple(one[:1].expand(batch, *one.shape[1:]).contiguous() for one in inputs)
    free = {0: torch.export.Dim("batch", min=1, max=65536)}
    shapes = tuple(free for _ in inputs) if batch is None else None
    batch_name = "dynamic batch" if batch is None else f"batch of {batch}"
    try:
        # The unfused attention: the fused CPU kernel declares strides that its decomposition does not keep, and the
        # export of BEiT fails on them.
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                with_piece_sizes(model.graph, inputs) if batch is None else model.graph,
                inputs,
                input_names=list(model.input_names),
                output_names=list(output_names),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
                custom_translation_table=translations(opset),
            )
    except Exception as error:
        hint = "; try a fixed batch, --batch 1" if batch is None else ""
        raise BuildError(
            f"torch.onnx cannot export {model.source.arch} with a {batch_name}{hint}: {cause_of(error)}"
        ) from error
    if program is None:
        raise BuildError(f"torch.onnx returned nothing for {model.source.arch}")
    return program


def _register_initializers(model: Any) -> None:
    """Adds constants that nodes read and the file lacks: onnxscript's fusion of two Clips leaves its bounds out."""
    for value in (value for node in model.graph for value in node.inputs if value is not None):
        made_here = value.producer() is not None or value.is_graph_input() or value.is_initializer()
        if value.const_value is not None and not made_here:
            model.graph.initializers[value.name] = value


def _require_free_batch(file: onnx.ModelProto, model: Model) -> None:
    """Raises BuildError if torch.onnx wrote the example's batch size into the file, which it does without a word."""
    for given in file.graph.input:
        sizes = given.type.tensor_type.shape.dim
        if sizes and not sizes[0].dim_param:
            raise BuildError(
                f"torch.onnx cannot keep the batch of {model.source.arch} free: it fixed {given.name} to a batch of "
                f"{sizes[0].dim_value}, because a size in the model depends on the batch in a way that torch.export "
                "does not follow. Export one batch size: --batch 1"
            )
