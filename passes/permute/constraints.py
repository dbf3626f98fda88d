"""Constraints on the order of channels, collected while a graph is traced.

Which channels are the same channel, which must keep their position, and which may only be permuted among themselves.
"""

from dataclasses import dataclass, field

import numpy as np

# Negative values of a label tensor: elements that belong to no channel.
CONSTANT = -1  # a constant that is the same for all channels (padding), so that reordering does not change it
UNKNOWN = -2  # an element whose channel is not known


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a parameter or buffer.

    `owner` is its qualified name. `rows` restricts the input axis of a grouped convolution to the rows (start, stop) of
    one group.
    """

    owner: str
    dim: int
    rows: tuple[int, int] | None = None


@dataclass
class ChannelConstraints:
    """The constraints on channel ids, the integers 0 … `count` − 1.

    Attributes:
        count: how many ids were assigned.
        axes: the ids along each parameter's axis.
        inputs: the axes that a layer sums over.
        equal: pairs of ids of the same channel, arrays of shape (n, 2).
        fixed: ids that must keep their position, each array with the reason.
        together: sets of ids; a permutation must map each set to itself.
    """

    count: int = 0
    axes: dict[Axis, "np.ndarray"] = field(default_factory=dict)
    inputs: set[Axis] = field(default_factory=set)
    equal: list["np.ndarray"] = field(default_factory=list)
    fixed: list[tuple["np.ndarray", str]] = field(default_factory=list)
    together: list["np.ndarray"] = field(default_factory=list)

    def new_ids(self, size: int) -> "np.ndarray":
        """Assigns `size` new channel ids and returns them."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def fix(self, ids: "np.ndarray", reason: str) -> None:
        """Records that these channels must keep their position."""
        channels = np.unique(ids[ids >= 0])
        if len(channels):
            self.fixed.append((channels, reason))

    def unify(self, a: "np.ndarray", b: "np.ndarray", operation: str) -> None:
        """Records that ids at the same position of `a` and `b` are one channel.

        Where one of the two is UNKNOWN, the other is fixed; `operation` names the graph node in the reason.
        """
        a, b = np.broadcast_arrays(a, b)
        both = (a >= 0) & (b >= 0)
        if both.any():
            self.equal.append(np.unique(np.stack([a[both], b[both]], 1), axis=0))
        for ids, other in ((a, b), (b, a)):
            self.fix(ids[other == UNKNOWN], f"{operation} combines it with values of no known channel")

    def keep_together(self, sets: "np.ndarray") -> None:
        """Records that the ids of each row of `sets` may only be permuted among themselves."""
        for row in np.unique(sets, axis=0):
            self.together.append(np.unique(row[row >= 0]))

    def bind(self, axis: Axis, ids: "np.ndarray", operation: str) -> None:
        """Records the ids along a parameter's axis; ids recorded before are unified with them.

        Positions without a channel get new ids, which are fixed.
        """
        if axis in self.axes:
            self.unify(self.axes[axis], ids, operation)
            return
        missing = ids < 0
        if missing.any():
            ids = ids.copy()
            ids[missing] = self.new_ids(int(missing.sum()))
            self.fix(ids[missing], f"{operation} has inputs of no known channel at its position")
        self.axes[axis] = ids
