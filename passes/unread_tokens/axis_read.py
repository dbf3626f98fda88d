"""Read: the range of positions along one axis of a tensor that later nodes read."""

from dataclasses import dataclass, replace

# A read of more than this share of an axis counts as a read of the whole axis. A slice may cost a copy, and a pooling
# that leaves out the class token reads all but one.
LARGEST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Read:
    """The positions `start` to `stop` − 1 along `axis`, and everything along all other axes.

    None in place of a Read means that the whole tensor is read.
    """

    axis: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """The number of positions."""
        return self.stop - self.start

    def along(self, axis: int) -> "Read":
        """The same positions along another axis."""
        return replace(self, axis=axis)

    def within(self, provided: "Read | None") -> slice:
        """The slice that takes these positions from a tensor that has only those of `provided` (None: all)."""
        first = 0 if provided is None else provided.start
        return slice(self.start - first, self.stop - first)


def union(one: Read | None, other: Read | None) -> Read | None:
    """The smallest Read that covers both; None if one of them is None or their axes differ."""
    if one is None or other is None or one.axis != other.axis:
        return None
    return Read(one.axis, min(one.start, other.start), max(one.stop, other.stop))


def if_small(read: Read | None, size: int) -> Read | None:
    """The Read, or None if it covers more than LARGEST_SHARE of an axis of this size."""
    return None if read is None or read.count > LARGEST_SHARE * size else read
