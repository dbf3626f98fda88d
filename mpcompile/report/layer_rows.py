"""Model and file -> a row for each layer of the report."""

from mpcompile.analysis.macs import Cost
from mpcompile.export.onnx_export import Lowered
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.report.schema import LayerRow


def layer_rows(model: Model, lowered: Lowered, dense: Cost, compressed: Cost) -> tuple[LayerRow, ...]:
    """A row for each layer that multiplies by weights: its pattern and where the file holds it, or why it is dense.

    `dense` and `compressed` are what one image costs before and after, zeros not yet skipped.
    """
    proven, patterns = {row.layer: row for row in lowered.masks}, model.patterns()
    names = dict.fromkeys([*(name for name, _ in model.layers()), *model.plan])
    rows = []
    for name in names:
        plan, found, module = model.plan_of(name), proven.get(name), model.graph.get_submodule(name)
        # The weight proper; MultiheadAttention, which has none of that name, is known by its first matrix.
        weight = next(p for n, p in module.named_parameters() if n == "weight" or p.ndim > 1)
        left = compressed.layers.get(name)
        if left is not None and name in patterns:
            left *= patterns[name].density
        rows.append(
            LayerRow(
                name=name,
                kind=type(module).__name__,
                shape=tuple(weight.shape),
                pattern=str(plan.pattern) if plan.mask is not None and plan.pattern else None,
                density=1.0 if plan.mask is None else float(plan.mask.float().mean()),
                macs=dense.layers.get(name),
                macs_left=left,
                reason=None if plan.mask is not None else _reason(plan),
                initializer=found.initializer if found else None,
                axis=found.axis if found else None,
                spectrum=plan.spectrum,
                unfitted=plan.unfitted,
                missed=plan.relative_error,
                permuted=plan.permutation is not None,
                unpermuted=plan.unpermuted,
            )
        )
    return tuple(rows)


def _reason(plan: LayerPlan) -> str:
    """Why a layer is dense, and whether its weights are its own."""
    reason = plan.skipped or "no pass planned anything for it"
    return reason if plan.relative_error is None else f"{reason}; fitted anew to what the dense model gives"
