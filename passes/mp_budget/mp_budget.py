"""Fits the Marchenko–Pastur law to every layer, and plans a pattern for each from a budget signal.

mpcompile/analysis/spectrum.py has the law, its fit and its null; passes/mp_budget/scores.py the signals;
passes/mp_budget/allocate.py the integer program. Given a signal's scores s and a target for the MACs of the whole
model, each eligible layer gets one of the patterns or stays dense, so that the summed s² of the removed weights is
minimal. Without a target, every eligible layer gets the sparsest pattern that it can have (of several, the one of least
damage).

The signal `mp` depends on the target sparsity. That is taken over the eligible layers: the share of their MACs that
must go, or without a target the sparsity of the sparsest pattern.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mpcompile.analysis.activation_stats import input_scales, per_weight
from mpcompile.analysis.eligibility import eligible, graph_positions, is_depthwise, reason_dense_by_default, tied_layers
from mpcompile.analysis.macs import Cost, cost
from mpcompile.analysis.spectrum import NoFitError, SpectrumFit, analyse
from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM, TWO_OF_FOUR
from mpcompile.ir.pattern_choice import Alternatives, PatternChoice, pattern_for
from mpcompile.passes.mp_budget import scores as signals
from mpcompile.passes.mp_budget.allocate import ROUNDING, Option, damage, least_damage
from mpcompile.passes.mp_budget.attention_layers import attention_layers
from mpcompile.passes.mp_budget.sensitivity import amplification
from mpcompile.pipeline.pass_record import Effect
from mpcompile.system.distributed import shared_map

Signal = Literal["mp", "magnitude", "std", "uniform", "lamp", "owl", "sensitivity"]
NEED_IMAGES = ("owl", "sensitivity")


def fit_spectra(model: Model, *, null: bool, level: float, seed: int) -> dict[str, SpectrumFit | str]:
    """For each Linear and Conv2d its fit, or the reason why it has none, as a sentence.

    `level` is the probability at which noise exceeds the edge T₊; `null` repeats each fit on shuffled entries.
    """
    where = graph_positions(model)

    def fitted(named: tuple[str, nn.Linear | nn.Conv2d]) -> SpectrumFit | str:
        name, layer = named
        place = where.get(name)
        if place and place.sees_image and not place.layers_before:
            return str(reason_dense_by_default(place))
        if is_depthwise(layer):
            return "depthwise: each filter is a matrix of one row"
        try:
            return analyse(layer.weight.detach().numpy(force=True), null=null, level=level, seed=seed)
        except NoFitError as reason:
            return str(reason)

    layers = list(model.layers())
    fits = shared_map(fitted, layers, lambda named: named[0], "layers")
    return {name: fit for (name, _), fit in zip(layers, fits, strict=True)}


def scores_of(
    signal: Signal,
    model: Model,
    names: Sequence[str],
    fits: Mapping[str, SpectrumFit | str],
    sparsity: float,
    data: Data,
) -> signals.Scores:
    """The scores of a signal for these layers at this overall sparsity. Raises PassError if it needs images."""
    weights = {name: model.layer(name).weight.detach() for name in names}
    if signal == "mp":
        known = {name: found.fit for name, found in fits.items() if isinstance(found, SpectrumFit)}
        return signals.spectral_edge(weights, known, attention_layers(model), sparsity)
    if signal == "std":
        return signals.deviation_edge(weights, attention_layers(model), sparsity)
    if signal in NEED_IMAGES and not len(data.calibration):
        raise _needs_images(signal)
    if signal == "owl":
        seen = input_scales(model, data.calibration)
        return signals.owl(weights, {name: per_weight(model.layer(name), seen[name]) for name in names})
    if signal == "sensitivity":
        return signals.sensitivity(weights, amplification(model, data.calibration, names))
    of_weight: Callable[[Tensor], Tensor] = {"uniform": signals.rank, "lamp": signals.lamp}.get(signal, torch.abs)
    return {name: of_weight(weight) for name, weight in weights.items()}


@dataclass(frozen=True, slots=True)
class MPBudget:
    """Fits the Marchenko–Pastur law to each layer and plans a pattern for each eligible layer.

    Args:
        patterns: the patterns that a layer may get. Of alternatives of one density (`50%`), a layer may get the first
            whose M divides its width.
        macs: the share of the model's MACs to leave, in (0, 1). None: every eligible layer gets a pattern.
        signal: the score that decides which layers stay dense (passes/mp_budget/scores.py).
        include: shell patterns over qualified names; layers to mask that stay dense by default.
        exclude: shell patterns over qualified names; layers that stay dense.
        null: also fit each layer's entries shuffled by `seed`, as a control.
        level: the probability at which pure noise exceeds the edge T₊.
        seed: seed of the shuffling.
    """

    name: ClassVar[str] = "mp-budget"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    requires: ClassVar[tuple[str, ...]] = ()
    shares_work: ClassVar[bool] = True

    patterns: tuple[PatternChoice, ...] = (TWO_OF_FOUR,)
    macs: float | None = None
    signal: Signal = "mp"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    null: bool = True
    level: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for invalid options."""
        if not self.patterns:
            raise UsageError("the budget has no patterns to choose from; give at least one, such as 2:4")
        if self.macs is not None and not 0 < self.macs < 1:
            raise UsageError(f"macs is {self.macs}; it is the share of multiply-accumulates left, between 0 and 1")
        if not 0 < self.level < 1:
            raise UsageError(f"level is {self.level}; it is a probability between 0 and 1")

    def __call__(self, model: Model, data: Data) -> Model:
        """The model with a spectrum and a pattern in each layer's plan, or the reason for none. Raises PassError."""
        self.require_reachable(model, data)  # before the spectra, which take long
        return self.planned(model, data, fit_spectra(model, null=self.null, level=self.level, seed=self.seed))

    def require_reachable(self, model: Model, data: Data) -> None:
        """Raises PassError if `planned` would: no layer is eligible, `macs` is out of reach, or images are missing."""
        able = self._able(model, self._verdicts(model))
        if self.macs is not None:
            self._require_saving(cost(model), able)
        if self.signal in NEED_IMAGES and not len(data.calibration) and self._chooses(able):
            raise _needs_images(self.signal)

    def planned(self, model: Model, data: Data, fits: Mapping[str, SpectrumFit | str]) -> Model:
        """The model planned with `fits`, the result of `fit_spectra`.

        Raises PassError if a layer is masked already, if no layer is eligible, if the signal needs images and there are
        none, or if `macs` cannot be reached.
        """
        if any(plan.mask is not None for plan in model.plan.values()):
            raise PassError("some layers are masked already; put mp-budget before nm-mask")
        verdicts = self._verdicts(model)
        chosen = self._chosen(model, data, fits, self._able(model, verdicts))
        plans = {}
        for name in dict.fromkeys(name for verdict in verdicts.values() for name in verdict):
            pattern = chosen.get(name)
            reason = None if pattern else verdicts[self.patterns[0]][name] or "the budget keeps it dense"
            plans[name] = self._plan(model.plan_of(name), pattern, reason, fits.get(name))
        densities = {pattern.density for pattern in self.patterns}
        if self.macs is None and len(densities) > 1:
            note = (
                f"without macs (--macs), every layer gets the sparsest pattern of {', '.join(map(str, self.patterns))}"
            )
            model = replace(model, notes=(*model.notes, f"{note} that it can have; macs mixes them"))
        return model.with_plan(plans)

    def _plan(
        self, plan: LayerPlan, pattern: NM | None, reason: str | None, found: SpectrumFit | str | None
    ) -> LayerPlan:
        return replace(
            plan,
            pattern=pattern,
            skipped=reason,
            spectrum=found.summary if isinstance(found, SpectrumFit) else None,
            unfitted=found if isinstance(found, str) else None,
        )

    def _verdicts(self, model: Model) -> dict[NM | Alternatives, Mapping[str, str | None]]:
        """For each pattern and layer, the reason why the layer cannot have the pattern; None if it can."""
        return {pattern: eligible(model, pattern, self.include, self.exclude) for pattern in self.patterns}

    def _able(
        self, model: Model, verdicts: Mapping[NM | Alternatives, Mapping[str, str | None]]
    ) -> dict[tuple[str, ...], list[NM]]:
        """The patterns that each layer can have; layers that share a weight get one decision.

        Without a target, only the sparsest of them. Raises PassError if no layer can have a pattern.
        """
        names = [name for name, _ in model.layers() if any(verdict[name] is None for verdict in verdicts.values())]
        able = {}
        for layers in tied_layers(model, names):
            inputs = model.layer(layers[0]).weight.shape[1]
            found = (pattern_for(p, inputs) for p in self.patterns if not any(verdicts[p][name] for name in layers))
            able[layers] = list(dict.fromkeys(found))
        able = {layers: patterns for layers, patterns in able.items() if patterns}
        if not able:
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(verdicts[self.patterns[0]].items())[:3])
            raise PassError(
                f"no layer takes {', '.join(map(str, self.patterns))} ({shown or 'the model has no layers'})"
            )
        if self.macs is not None:
            return able
        sparsest = {layers: min(p.density for p in patterns) for layers, patterns in able.items()}
        return {layers: [p for p in able[layers] if p.density == sparsest[layers]] for layers in able}

    def _chooses(self, able: Mapping[tuple[str, ...], Sequence[NM]]) -> bool:
        """Whether scores decide: there is a target, or a layer can have several patterns."""
        return self.macs is not None or any(len(patterns) > 1 for patterns in able.values())

    def _chosen(
        self,
        model: Model,
        data: Data,
        fits: Mapping[str, SpectrumFit | str],
        able: Mapping[tuple[str, ...], Sequence[NM]],
    ) -> dict[str, NM]:
        """Pattern by layer name, for the layers that get one. Raises PassError if the target cannot be reached."""
        if not self._chooses(able):
            return {name: patterns[0] for layers, patterns in able.items() for name in layers}
        counted = cost(model)
        names = [name for layers in able for name in layers]
        saving = self._saving(counted, able)  # less than the MACs of these layers
        sparsity = saving / sum(counted.layers[name] for name in names)
        scores = scores_of(self.signal, model, names, fits, sparsity, data)
        options = [
            Option(layers, p, damage(scores[layers[0]], p), sum(counted.layers[n] for n in layers) * (1 - p.density))
            for layers, patterns in able.items()
            for p in patterns
        ]
        taken = least_damage(options, saving)
        return {name: option.pattern for option in taken for name in option.layers}

    def _saving(self, counted: Cost, able: Mapping[tuple[str, ...], Sequence[NM]]) -> float:
        """The MACs that must be saved. Raises PassError if the sparsest patterns do not save as much."""
        if self.macs is not None:
            self._require_saving(counted, able)
            return counted.macs * (1 - self.macs)
        return most_saved(counted, able)

    def _require_saving(self, counted: Cost, able: Mapping[tuple[str, ...], Sequence[NM]]) -> None:
        """Raises PassError if `macs` cannot be reached."""
        assert self.macs is not None
        most = most_saved(counted, able)
        # Rounding of the sums must not refuse a target that the sparsest patterns reach exactly.
        if counted.macs * (1 - self.macs) > most * (1 + ROUNDING):
            raise PassError(
                f"{self.macs:g} of the multiply-accumulates cannot be reached: with the sparsest pattern on every "
                f"eligible layer {1 - most / counted.macs:.4g} are left; raise macs, or add sparser patterns"
            )


def most_saved(counted: Cost, able: Mapping[tuple[str, ...], Sequence[NM]]) -> float:
    """The MACs that are saved if every layer gets its sparsest pattern."""
    return sum(
        counted.layers[name] * (1 - min(p.density for p in patterns))
        for layers, patterns in able.items()
        for name in layers
    )


def _needs_images(signal: str) -> PassError:
    return PassError(f"the signal {signal} needs calibration images; give --data, or another signal")
