"""An image set that stops a training, for tests of resuming."""

import dataclasses

from torch import Tensor

from mpcompile.testing import Noise


class StoppedError(Exception):
    """What a test stops a training with."""


@dataclasses.dataclass(frozen=True)
class Failing(Noise):
    """Fails where it has been read so often."""

    reads: list[int] = dataclasses.field(default_factory=list)
    most: int = 1 << 30

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads.append(index)
        if len(self.reads) > self.most:
            raise StoppedError
        return super().__getitem__(index)
