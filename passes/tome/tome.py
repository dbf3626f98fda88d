"""The token-merging pass: after each attention, a fixed number of tokens is merged into the most similar ones.

mpcompile/ir/token_merging.py has the arithmetic and its source. passes/tome/graph_rewrite.py writes it into the graph
and checks that the model permits it. passes/tome/schedule.py parses schedules, and passes/tome/schedule_search.py
searches one for a share of MACs.

Leading tokens that do not depend on the image (class, distillation and register tokens) are protected: they never
merge, and no token merges into them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from mpcompile.analysis.attention import Attention
from mpcompile.data.images import Data
from mpcompile.errors import UsageError
from mpcompile.ir.model import Model
from mpcompile.ir.shapes import run_example
from mpcompile.passes.tome.graph_rewrite import (
    mergeable_attentions,
    nodes_with_merging,
    protected_tokens,
    require_weighted_set,
)
from mpcompile.passes.tome.schedule import (
    parse_schedule,
    require_mergeable,
    require_tokens_left,
    within_limits,
)
from mpcompile.passes.tome.schedule_search import require_images, search_schedule
from mpcompile.pipeline.partial_results import PartialResults, run_key
from mpcompile.pipeline.pass_record import Effect


@dataclass(frozen=True)
class ToMe:
    """Merges similar tokens, a fixed number after each attention (Bolya et al., arXiv 2210.09461).

    Args:
        r: the number of merged tokens: one number for every attention (`8`); `8:decreasing`, linearly from 16 to 0; one
            number for each attention (`0,0,4,8`); or `auto`, the schedule with the smallest logit shift for `macs`.
        macs: with `auto`, the share of the dense MACs to leave, masks included.
        images: number of calibration images for `auto`.
        least_left: the smallest share of the tokens that may be left; a schedule that leaves fewer is refused.
    """

    name: ClassVar[str] = "tome"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    r: int | str | tuple[int, ...] = 8
    macs: float | None = None
    images: int = 64
    least_left: float = 0.05

    def __post_init__(self) -> None:
        """Raises UsageError for options that are invalid for every model."""
        if self.r == "auto" and self.macs is None:
            raise UsageError("tome: r: auto needs macs, the share of the dense multiply-accumulates to leave")
        if self.r != "auto" and self.macs is not None:
            raise UsageError(f"tome: macs needs r: auto, but r is {self.r}")
        if self.macs is not None and not 0 < self.macs < 1:
            raise UsageError(f"tome: macs must be between 0 and 1, found {self.macs:g}")
        if self.images < 1:
            raise UsageError(f"tome: images must be at least 1, found {self.images}")
        if not 0 <= self.least_left < 1:
            raise UsageError(f"tome: least_left is a share of the tokens, from 0 to below 1; found {self.least_left:g}")
        if self.r != "auto":
            parse_schedule(self.r, self._listed or 1)

    @property
    def _listed(self) -> int:
        """How many numbers `r` lists; 0 if one number applies to every attention."""
        if isinstance(self.r, tuple):
            return len(self.r)
        return str(self.r).count(",") + 1 if "," in str(self.r) else 0

    def require_inputs(self, model: Model, data: Data) -> None:
        """Raises PassError if the tokens of the model cannot be merged, UsageError for a schedule of another length."""
        attentions, protected = self._sites(model)
        if self.macs is None:
            self._given(attentions, protected)
        else:
            require_images(data.calibration)

    def _sites(self, model: Model) -> tuple[list[Attention], int]:
        """The attentions after which tokens can merge, and the number of protected tokens. Raises PassError."""
        run_example(model)
        attentions = mergeable_attentions(model.graph.graph, dict(model.graph.named_modules()))
        protected = protected_tokens(model, attentions[0])
        require_weighted_set(model, attentions, protected)
        return attentions, protected

    def __call__(self, model: Model, data: Data) -> Model:
        """The model with token merging in its graph."""
        attentions, protected = self._sites(model)
        if self.macs is None:
            schedule = self._given(attentions, protected)
        else:
            schedule = self._searched(model, data, attentions, protected, self.macs)
            require_tokens_left(schedule, attentions[0].tokens, self.least_left)
        model.graph.graph = nodes_with_merging(model.graph, schedule, protected)
        return model

    def _given(self, attentions: Sequence[Attention], protected: int) -> tuple[int, ...]:
        """The schedule of `r`, within the limits of the tokens. Raises UsageError."""
        parsed, tokens = parse_schedule(self.r, len(attentions)), attentions[0].tokens
        if not self._listed:
            require_mergeable(self.r, tokens, protected)
        schedule = within_limits(parsed, attentions, protected, exact=self._listed > 0)
        require_tokens_left(schedule, tokens, self.least_left)
        return schedule

    def _searched(
        self, model: Model, data: Data, attentions: Sequence[Attention], protected: int, macs: float
    ) -> tuple[int, ...]:
        """The schedule for this share of MACs, kept as a partial result so that a resumed run does not search again."""
        finished = PartialResults(lambda: run_key(repr(self), model, model.patterns(), data.calibration))
        found = finished.get("schedule")
        if found is None:
            schedule = search_schedule(model, data.calibration, attentions, protected, macs, self.images)
            finished.put("schedule", {"r": torch.tensor(schedule)})
            return schedule
        return tuple(found["r"].tolist())
