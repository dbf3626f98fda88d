"""MergingModel: separates token merging from the masks of a compressed model, so that the loss of each can be measured.

Token merging changes only the nodes of the graph, and masks only its weights. So the dense weights under the merging
nodes have the loss of merging alone, and the compressed weights under the dense nodes the loss of the masks alone.
"""

import copy
from dataclasses import dataclass, replace

from torch import fx

from mpcompile.analysis.block_macs import merges
from mpcompile.ir.model import Model
from mpcompile.ir.shapes import run_example
from mpcompile.ir.token_merging import merge_tokens
from mpcompile.passes.tome.graph_rewrite import nodes_with_merging, with_merging

STEPS = 8  # a weaker schedule merges k / STEPS of the given tokens, rounded down


@dataclass(frozen=True)
class MergingModel:
    """A compressed model that merges tokens.

    Attributes:
        model: its graph merges `schedule(step)` tokens; its `dense` graph merges none.
        given: the number of tokens that the model merged after each attention when it was given.
        protected: the number of leading tokens that never merge.
        step: from STEPS, the given schedule, down to 0, no merging.
    """

    model: Model
    given: tuple[int, ...]
    protected: int
    step: int = STEPS

    @property
    def schedule(self) -> tuple[int, ...]:
        """The number of tokens that merge after each attention."""
        return tuple(r * self.step // STEPS for r in self.given)

    def merging_alone(self) -> fx.GraphModule:
        """The dense weights with token merging."""
        assert self.model.dense is not None
        run_example(replace(self.model, graph=self.model.dense))
        return with_merging(self.model.dense, self.schedule, self.protected)

    def masks_alone(self) -> fx.GraphModule:
        """The compressed weights without token merging. Its modules are those of the model, not copies."""
        assert self.model.dense is not None
        graph = fx.GraphModule(self.model.graph, copy.deepcopy(self.model.dense.graph))
        run_example(replace(self.model, graph=graph))
        return graph

    def weaker(self) -> "MergingModel":
        """The model with the next weaker schedule that differs from this one; its graph is changed in place."""
        step = next(k for k in range(self.step - 1, -1, -1) if k == 0 or self._at(k) != self.schedule)
        model = self.model
        model.graph.graph = nodes_with_merging(self.masks_alone(), self._at(step), self.protected)
        return replace(self, step=step)

    def _at(self, step: int) -> tuple[int, ...]:
        return replace(self, step=step).schedule


def merging_model(model: Model) -> MergingModel | None:
    """The model as a MergingModel; None if it merges no tokens, or if other passes changed its nodes too."""
    nodes = [node for node in model.graph.graph.nodes if node.target is merge_tokens]
    if not nodes or model.dense is None:
        return None
    found = MergingModel(model, merges(model.graph, model.example_inputs), int(str(nodes[0].args[4])))
    if [node.target for node in found.merging_alone().graph.nodes] != [n.target for n in model.graph.graph.nodes]:
        return None
    return found
