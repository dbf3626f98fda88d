"""Makes the batch of an exported program free, and its reshapes independent of the number of tokens.

torch.export writes sizes as numbers: `view(x, [2, 197, 3, 4, 16])`, also those of the batch unless the export was told
that it is dynamic. Here a program is run on two batch sizes at once, operator by operator. At each operator that takes
sizes, a size that its input has too becomes `input.size(axis)`, and one that grows with the batch becomes
`batch * constant`.

Which numbers stand for the batch is not always certain (a leading 1 of an `expand` may be the batch). The result is
therefore compared with the original: its outputs on the other batch must be those that the original
computes for the same images, in batches of the size that it was exported with. If no reading of the numbers passes,
the program is refused.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.frontend.exported.program import Program
from mpcompile.frontend.exported.refusal import ProgramRefused
from mpcompile.frontend.exported.size_rewriting import LARGER, BatchReading, SizeRewriter
from mpcompile.ir.parity import relative_difference

# Largest relative difference between rows of two batch sizes: kernels sum in another order for another batch.
ROW_DRIFT = 1e-4
EXPORT_AGAIN = (
    "export it again with a free batch: torch.export.export(model, (x,), "
    "dynamic_shapes=({0: torch.export.Dim('batch')},))"
)


READINGS = (BatchReading(True, False), BatchReading(True, True), BatchReading(False, False))


def with_free_batch(program: Program) -> fx.Graph:
    """The program's graph for any batch size, with the shapes of values in `meta["shape"]`. Raises ProgramRefused."""
    batch = batch_of(program)
    program = replace(program, tensors=_without_zeros(program))
    inputs = example_inputs(program, batch)
    others = example_inputs(program, batch + LARGER)
    expected = run(program.graph, program, inputs)
    reference = _rows(program, others, batch)
    reasons = []
    for reading in READINGS[-1:] if program.inputs[0].free[:1] == (0,) else READINGS:
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.graph, {}))
        try:
            freer = SizeRewriter(graph, program, batch, reading)
            found, found_others = freer.run(inputs, others)
        except Exception as error:  # any operator may fail on sizes that were read wrongly
            reasons.append(str(error).strip().partition("\n")[0] or type(error).__name__)
            continue
        differences = [*map(_difference, found, expected), *map(_difference, found_others, reference)]
        if max(differences, default=0.0) <= ROW_DRIFT:
            return graph
        reasons.append(f"outputs differ by {max(differences):.1e} of their size")
    raise ProgramRefused(
        f"was exported for batches of {batch}, and cannot be made free of it ({reasons[0][:300]}); {EXPORT_AGAIN}"
    )


def _without_zeros(program: Program) -> dict[str, Tensor]:
    """The tensors, with noise in place of those that are 0 throughout: a head of zeros would hide every difference."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator).to(value.dtype) * 0.02
        if value.is_floating_point() and not value.any()
        else value
        for name, value in program.tensors.items()
    }


def batch_of(program: Program) -> int:
    """The batch size that the program was exported with. Raises ProgramRefused if its inputs have none in common."""
    tensors = [given for given in program.inputs if given.shape is not None]
    if not tensors:
        raise ProgramRefused("has no tensor as input")
    sizes = [given.shape[0] if given.shape else 0 for given in tensors]
    if min(sizes) < 1:
        raise ProgramRefused(f"has the input {tensors[sizes.index(min(sizes))].name} without a batch axis")
    return sizes[0]


def example_inputs(program: Program, batch: int) -> list[Any]:
    """Random values for the inputs, for a batch of this size. Axes that are the batch of the first input follow it."""
    own = batch_of(program)
    generator = torch.Generator().manual_seed(0)
    values: list[Any] = []
    for given in program.inputs:
        if given.shape is None or given.dtype is None:
            values.append(given.constant)
            continue
        shape = ((batch if given.shape[0] == own else given.shape[0]), *given.shape[1:])
        if given.dtype.is_floating_point:
            values.append(torch.randn(shape, generator=generator).to(given.dtype))
        else:
            values.append(torch.randint(0, 2, shape, generator=generator).to(given.dtype))
    return values


def run(graph: fx.Graph, program: Program, inputs: Sequence[Any]) -> list[Any]:
    """The flat outputs of a graph of operators."""
    return SizeRewriter(graph, program, 0, None).run(inputs, None)[0]


def _rows(program: Program, inputs: Sequence[Any], batch: int) -> list[Any]:
    """The outputs for a larger batch, computed by the original in batches of its own size."""
    total = batch + LARGER
    starts = [*range(0, total - batch, batch), total - batch]
    kept: dict[int, list[Any]] = {}
    for start in starts:
        part = [
            value[start : start + batch] if isinstance(value, Tensor) and len(value) == total else value
            for value in inputs
        ]
        outputs = run(program.graph, program, part)
        for row in range(batch):
            kept[start + row] = [
                value[row : row + 1] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
                for value in outputs
            ]
    return [
        torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].ndim and len(parts[0]) == 1 else parts[0]
        for parts in (list(column) for column in zip(*(kept[row] for row in range(total)), strict=True))
    ]


def _difference(found: Any, wanted: Any) -> float:
    """The relative difference of two outputs; infinite for other shapes."""
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return 0.0 if found == wanted else float("inf")
    if found.shape != wanted.shape:
        return float("inf")
    return relative_difference(wanted.double().numpy(force=True), found.double().numpy(force=True))
