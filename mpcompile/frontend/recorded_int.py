"""RecordedInt: an integer of a recorded run, such as the batch size, that remembers the node that computes it.

A run under the recorder (mpcompile/frontend/recorder.py) gets its tensor sizes as RecordedInts. Python code computes
with them as with other integers, and a branch on one is decided as in the run. Sums, products and remainders stay in
the graph, so that `x.reshape(x.shape[0] * heads, …)` fits every batch size. A true division gives a plain float.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx


class RecordedInt(int):
    """An integer with the node of a graph that computes it. The node is created when it is used for the first time."""

    _graph: fx.Graph
    _make: Callable[[], fx.Node]
    _node: fx.Node | None

    @classmethod
    def of(cls, value: int, graph: fx.Graph, make: Callable[[], fx.Node]) -> "RecordedInt":
        """The integer `value`, which the node that `make` appends to `graph` computes."""
        made = cls(value)
        made._graph, made._make, made._node = graph, make, None
        return made

    @property
    def node(self) -> fx.Node:
        """The node that computes the integer."""
        if self._node is None:
            self._node = self._make()
        return self._node

    def __deepcopy__(self, memo: object) -> int:
        """The plain integer: copies outlive the recorded run."""
        return int(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as the plain integer."""
        return int, (int(self),)

    def __neg__(self) -> int:
        return 0 - self


def node_or_value(value: object) -> Any:
    """The node of a RecordedInt; any other value as it is."""
    return value.node if isinstance(value, RecordedInt) else value


def plain(value: object) -> Any:
    """The plain integer of a RecordedInt; any other value as it is."""
    return int(value) if isinstance(value, RecordedInt) else value


def _recording(compute: Callable[[Any, Any], Any], swapped: bool) -> Callable[[RecordedInt, Any], Any]:
    """The method of RecordedInt for a binary operator; `swapped` for the one with the RecordedInt on the right."""

    def method(self: RecordedInt, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented if not isinstance(other, float) else compute(*_ordered(int(self), other, swapped))
        value = compute(*_ordered(int(self), int(other), swapped))
        pair = _ordered(self, other, swapped)
        graph = self._graph
        return RecordedInt.of(
            value, graph, lambda: graph.call_function(compute, (node_or_value(pair[0]), node_or_value(pair[1])))
        )

    return method


def _ordered(first: Any, second: Any, swapped: bool) -> tuple[Any, Any]:
    return (second, first) if swapped else (first, second)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(RecordedInt, f"__{_name}__", _recording(getattr(operator, _name), swapped=False))
    setattr(RecordedInt, f"__r{_name}__", _recording(getattr(operator, _name), swapped=True))
