"""Builds the report's rows of layers from the model and the exported file."""

from torch import Tensor, nn

from mpcompile.analysis.kept_energy import kept_energy
from mpcompile.analysis.macs import Cost
from mpcompile.export.onnx_export import Lowered
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.report.schema import LayerRow


def layer_rows(model: Model, lowered: Lowered, dense: Cost, compressed: Cost) -> tuple[LayerRow, ...]:
    """One row for each layer with weights: its pattern and its weight in the file, or the reason why it is dense.

    `dense` and `compressed` are the MACs of one image before and after compression, with the zeros of masks counted.
    """
    masks, patterns = {row.layer: row for row in lowered.masks}, model.patterns()
    owners: dict[int, str] = {}  # the first layer of each weight
    names = dict.fromkeys([*(name for name, _ in model.layers()), *model.plan])
    rows = []
    for name in names:
        plan, mask, module = model.plan_of(name), masks.get(name), model.graph.get_submodule(name)
        shape, identity = _weight_of(module)
        owner = owners.setdefault(identity, name)
        left = compressed.layers.get(name)
        if left is not None and name in patterns:
            left *= patterns[name].density
        rows.append(
            LayerRow(
                name=name,
                kind=type(module).__name__,
                shape=shape,
                pattern=str(plan.pattern) if plan.mask is not None and plan.pattern else None,
                density=1.0 if plan.mask is None else float(plan.mask.float().mean()),
                macs=dense.layers.get(name),
                macs_left=left,
                reason=None if plan.mask is not None else _reason(plan),
                initializer=mask.initializer if mask else None,
                axis=mask.axis if mask else None,
                spectrum=plan.spectrum,
                unfitted=plan.unfitted,
                missed=plan.relative_error,
                permuted=plan.permutation is not None,
                unpermuted=plan.unpermuted,
                shares_weight_with=None if owner == name else owner,
                precision=None if plan.scale is None else lowered.precision,
                unquantized=plan.unquantized,
                rounding_error=plan.rounding_error,
                kept_energy=_kept_energy(model, name, plan),
            )
        )
    return tuple(rows)


def _kept_energy(model: Model, name: str, plan: LayerPlan) -> tuple[float, ...]:
    """The kept energy of a masked layer, by the weights that it had before the first lossy pass; empty for others."""
    if plan.mask is None or plan.pattern is None or model.dense is None:
        return ()
    weight = model.dense.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return kept_energy(weight, plan.mask, plan.pattern.of) if weight.shape == plan.mask.shape else ()


def _weight_of(module: nn.Module) -> tuple[tuple[int, ...], int]:
    """The shape of a module's weight, and a number that is equal for modules that share the weight.

    MultiheadAttention has no attribute called `weight`: its first matrix is taken. A weight that a hook or a
    parametrization computes is a new tensor at each access, so the module itself identifies it.
    """
    stored = module._parameters.get("weight")
    computed = getattr(module, "weight", None)
    if stored is None and isinstance(computed, Tensor):
        return tuple(computed.shape), id(module)
    weight = stored if stored is not None else next(p for p in module.parameters() if p.ndim > 1)
    return tuple(weight.shape), id(weight)


def _reason(plan: LayerPlan) -> str:
    """Why a layer is dense, and whether it was refitted all the same."""
    reason = plan.skipped or "no pass assigned a pattern to it"
    return reason if plan.relative_error is None else f"{reason}; refitted to the dense model's outputs"
