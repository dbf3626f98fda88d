"""Token merging as a pass: after an attention, a fixed number of tokens go into those that they resemble most.

The arithmetic and its source are in mpcompile/ir/token_merging.py; passes/tome/graph_rewrite.py writes it into the
graph and asks the model whether merging makes sense in it; passes/tome/schedule.py says how many tokens merge where,
and passes/tome/schedule_search.py finds that for a share of multiply-accumulates.

Tokens in front that are the same for every image when they reach the first attention (class, distillation and register
tokens) are protected: they never merge, and nothing merges into them.
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
from mpcompile.passes.tome.graph_rewrite import check_laws, merged_nodes, merging_sites, protected_tokens
from mpcompile.passes.tome.schedule import spelt, within_limits
from mpcompile.passes.tome.schedule_search import auto
from mpcompile.pipeline.partial_results import PartialResults, run_key
from mpcompile.pipeline.pass_manager import Effect


@dataclass(frozen=True)
class ToMe:
    """Merges tokens that resemble each other, a fixed number of them after each attention.

    `r` is how many: one number for every attention; `8:decreasing`, from twice that down to none; a number for each
    (`0,0,4,8`); or `auto`, which shares merges out so that the logits of `images` calibration images move least while
    `macs` of the dense model's multiply-accumulates are left, masks counted in.
    """

    name: ClassVar[str] = "tome"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[str, ...]] = ()

    r: int | str | tuple[int, ...] = 8
    macs: float | None = None
    images: int = 64

    def __post_init__(self) -> None:
        """Refuses what is no schedule for any model."""
        if self.r == "auto" and self.macs is None:
            raise UsageError("tome: r: auto needs macs, the share of the dense multiply-accumulates to leave")
        if self.r != "auto" and self.macs is not None:
            raise UsageError(f"tome: macs goes with r: auto, and r is {self.r}")
        if self.macs is not None and not 0 < self.macs < 1:
            raise UsageError(f"tome: macs is a share between 0 and 1, found {self.macs:g}")
        if self.images < 1:
            raise UsageError(f"tome: images is at least 1, found {self.images}")
        if self.r != "auto":
            spelt(self.r, self._listed or 1)

    @property
    def _listed(self) -> int:
        """How many numbers were given, 0 where one is meant for every attention."""
        if isinstance(self.r, tuple):
            return len(self.r)
        return str(self.r).count(",") + 1 if "," in str(self.r) else 0

    def __call__(self, model: Model, data: Data) -> Model:
        """The model with token merging in its graph."""
        run_example(model)
        sites = merging_sites(model.graph.graph, dict(model.graph.named_modules()))
        protected = protected_tokens(model, sites[0])
        check_laws(model, sites, protected)
        if self.macs is None:
            schedule = within_limits(spelt(self.r, len(sites)), sites, protected, exact=self._listed > 0)
        else:
            schedule = self._searched(model, data, sites, protected, self.macs)
        model.graph.graph = merged_nodes(model.graph, schedule, protected)
        return model

    def _searched(
        self, model: Model, data: Data, sites: Sequence[Attention], protected: int, macs: float
    ) -> tuple[int, ...]:
        """The schedule for that share; what was found is kept, since the pass is run again when a run goes on."""
        finished = PartialResults(lambda: run_key(repr(self), model, model.patterns(), data.calibration))
        found = finished.get("schedule")
        if found is None:
            schedule = auto(model, data.calibration, sites, protected, macs, self.images)
            finished.put("schedule", {"r": torch.tensor(schedule)})
            return schedule
        return tuple(found["r"].tolist())
