"""What is learnt of channels on the way through a graph: which are one, which stay, which stay together."""

from dataclasses import dataclass, field

import numpy as np

CONSTANT, UNKNOWN = -1, -2  # in a plane: a number alike for all channels (padding), and one of no known channel


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a parameter or buffer; for a grouped convolution's inputs, of the rows start to stop of one group."""

    owner: str
    dim: int
    rows: tuple[int, int] | None = None


@dataclass
class ChannelConstraints:
    """What a run through the graph learnt about atoms.

    `axes` holds the atoms along each parameter's axis, `equal` pairs of atoms that are one, `fixed` atoms that stay
    where they are, each with a reason, `together` sets that may only be mixed within themselves.
    """

    count: int = 0
    axes: dict[Axis, "np.ndarray"] = field(default_factory=dict)
    inputs: set[Axis] = field(default_factory=set)  # those that a layer sums over
    equal: list["np.ndarray"] = field(default_factory=list)  # (n, 2)
    fixed: list[tuple["np.ndarray", str]] = field(default_factory=list)
    together: list["np.ndarray"] = field(default_factory=list)

    def fresh(self, size: int) -> "np.ndarray":
        """New atoms."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def fix(self, atoms: "np.ndarray", reason: str) -> None:
        """These stay where they are."""
        known = np.unique(atoms[atoms >= 0])
        if len(known):
            self.fixed.append((known, reason))

    def unify(self, a: "np.ndarray", b: "np.ndarray", what: str) -> None:
        """Atoms at the same place are one; where one is of no known channel, the other is fixed."""
        a, b = np.broadcast_arrays(a, b)
        both = (a >= 0) & (b >= 0)
        if both.any():
            self.equal.append(np.unique(np.stack([a[both], b[both]], 1), axis=0))
        for one, other in ((a, b), (b, a)):
            self.fix(one[other == UNKNOWN], f"{what} pairs it with what is no channel")

    def keep_together(self, sets: "np.ndarray") -> None:
        """Each row is a set of atoms that may only be mixed within itself."""
        for row in np.unique(sets, axis=0):
            self.together.append(np.unique(row[row >= 0]))

    def bind(self, axis: Axis, atoms: "np.ndarray", what: str) -> None:
        """The parameter's axis holds these atoms."""
        if axis in self.axes:
            self.unify(self.axes[axis], atoms, what)
            return
        missing = atoms < 0
        if missing.any():
            atoms = atoms.copy()
            atoms[missing] = self.fresh(int(missing.sum()))
            self.fix(atoms[missing], f"{what} has inputs there that are no channels")
        self.axes[axis] = atoms
