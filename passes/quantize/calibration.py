"""Ranges of quantizers: from samples of their inputs on calibration images, by the observer that suits the model."""

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, fx

from mpcompile.data.images import Split
from mpcompile.errors import PassError
from mpcompile.ir.quantization import ActivationType, quantizers
from mpcompile.passes.dense_comparison import mean_shift, outputs_of
from mpcompile.passes.quantize.observers import OBSERVERS, Range
from mpcompile.passes.quantize.placement import PREFIX
from mpcompile.system.progress import tracked

Observer = Callable[[Tensor], Range]
SAMPLED_VALUES = 1 << 18  # of an activation, for the range of its quantizer
SAMPLED_PER_BATCH = 1 << 14  # of each activation, while all are held at once to choose the observer


def best_observer(
    graph: fx.GraphModule,
    names: Sequence[str],
    kind: ActivationType,
    images: Split,
    check: Split,
    expected: Float[Tensor, "images ..."],
) -> tuple[str, str]:
    """The observer whose ranges move the logits of the images `check` least, and a note on the choice.

    Activations alone are quantised to choose it. `graph` has the quantizers `names`, without ranges, and `expected` are
    its outputs on `check`. Ties go to the first in OBSERVERS. Raises PassError if an activation is not finite.
    """
    samples = _samples(graph, names, images)
    shifts = {}
    for observer, rule in tracked(OBSERVERS.items(), lambda pair: pair[0], "observers"):
        trial = copy.deepcopy(graph)
        modules = quantizers(trial)
        for name, values in samples.items():
            modules[name].set_range(*range_of(rule, values, kind))
        shifts[observer] = mean_shift(outputs_of(trial, check), expected)
    best = min(shifts, key=shifts.__getitem__)
    others = ", ".join(f"{shift:.3g} by {observer}" for observer, shift in shifts.items() if observer != best)
    return best, f"ranges of activations by {best}: alone they shift the outputs by {shifts[best]:.3g} ({others})"


def _samples(graph: fx.GraphModule, names: Sequence[str], images: Split) -> dict[str, Float[Tensor, " values"]]:
    """A sample of the inputs of each quantizer, in one run over all images."""
    modules, found = quantizers(graph), {name: list[Tensor]() for name in names}
    handles = [
        modules[name].register_forward_hook(
            lambda module, inputs, output, name=name: found[name].append(_spread(inputs, SAMPLED_PER_BATCH))
        )
        for name in names
    ]
    try:
        outputs_of(graph, images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _finite(name, torch.cat(parts)) for name, parts in found.items()}


def sample(name: str, batches: Sequence[Tensor]) -> Float[Tensor, " values"]:
    """About SAMPLED_VALUES inputs of the quantizer `name`, at equal distances, and the extremes of each batch.

    Raises PassError if one of them is not finite.
    """
    return _finite(name, _spread(batches, SAMPLED_VALUES))


def range_of(observer: Observer, values: Float[Tensor, " values"], kind: ActivationType) -> Range:
    """The range of an observer; for a symmetric type, that of the values and their negatives."""
    return observer(values if kind == "u8" else torch.cat([values, -values]))


def _spread(batches: Sequence[Tensor], count: int) -> Float[Tensor, " values"]:
    """About `count` values of these tensors at equal distances, and the extremes of each tensor."""
    each = max(1, count // len(batches))
    parts = []
    for batch in batches:
        values = batch.flatten()
        low, high = values.aminmax()
        parts += [values[:: max(1, len(values) // each)], low[None], high[None]]
    return torch.cat(parts)


def _finite(name: str, values: Tensor) -> Tensor:
    """The values. Raises PassError if one is not finite."""
    if not bool(values.isfinite().all()):
        raise PassError(
            f"an activation on the calibration images is not finite, the output of {name.removeprefix(f'{PREFIX}.')}; "
            "check that --mean and --std are those of the model"
        )
    return values
