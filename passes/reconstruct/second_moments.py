"""SecondMoments: second moments of a layer's inputs and target outputs, summed batch by batch.

For a layer W with inputs x (one row per output position or token, see passes/reconstruct/layer_rows.py) and target
outputs y, a least-squares problem in W needs only

    C = E[x xᵀ],  G = E[y xᵀ],  E[x],  E[y],  E[y²],

whose size does not grow with the number of images. Products and sums of one chunk are float32. They are taken after
subtracting the mean of the first chunk, so that a large mean costs no digits. Sums over chunks are float64.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mpcompile.errors import PassError
from mpcompile.passes.reconstruct.layer_rows import columns, columns_at
from mpcompile.system.symmetric_matrices import gram

CHUNK_BYTES = 128 << 20  # of unfolded inputs (im2col) at once
CACHE_BYTES = 2 << 20  # of the inputs of convolution groups at once: these have small products, and memory is slow


def solving_bytes(layer: nn.Linear | nn.Conv2d) -> int:
    """About how much memory the moments of a layer and the solution take: 16 matrices of the size of C, 8 of W, chunks.

    Measured: the moments of four parts, their sums, and the copies of the cross-validation.
    """
    out, columns_each = layer.weight.shape[0], layer.weight[0].numel()
    groups = getattr(layer, "groups", 1)
    return 8 * (16 * groups * columns_each**2 + 8 * out * columns_each) + 4 * CHUNK_BYTES


@dataclass
class SecondMoments:
    """Sums over rows of inputs x and of one or more targets y, each minus a fixed shift; float64."""

    count: int = 0
    shift_x: Tensor = field(default_factory=lambda: torch.empty(0))  # groups, columns
    shift_y: Tensor = field(default_factory=lambda: torch.empty(0))  # targets, out
    sum_x: Tensor = field(default_factory=lambda: torch.empty(0))
    sum_y: Tensor = field(default_factory=lambda: torch.empty(0))
    sum_xx: Tensor = field(default_factory=lambda: torch.empty(0))  # groups, columns, columns
    sum_yx: Tensor = field(default_factory=lambda: torch.empty(0))  # targets, out, columns
    sum_yy: Tensor = field(default_factory=lambda: torch.empty(0))  # targets, targets, out

    def add(
        self,
        layer: nn.Linear | nn.Conv2d,
        x: Tensor,
        *targets: Float[Tensor, "rows out"],
        positions: Int[Tensor, "images k"] | None = None,
    ) -> None:
        """Adds a batch of the layer's inputs, and one or more targets with the rows of `columns`.

        With `positions`, only the rows of these positions are added (`columns_at`).

        Raises PassError if the targets do not have the rows of the inputs.
        """
        y = torch.stack(targets)
        if positions is not None:
            first = torch.arange(len(positions))[:, None] * (y.shape[1] // len(positions))  # row of each image
            self._add_rows(columns_at(layer, x, positions), y[:, (first + positions).flatten()])
            return
        rows_each = y.shape[1] // len(x)
        images = max(1, CHUNK_BYTES // (rows_each * layer.weight[0].numel() * getattr(layer, "groups", 1) * 4))
        for start in range(0, len(x), images):
            rows = slice(start * rows_each, (start + images) * rows_each)
            self._add_rows(columns(layer, x[start : start + images]), y[:, rows])

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """The sums of x, y, x xᵀ, y xᵀ and y yᵀ."""
        return (self.sum_x, self.sum_y, self.sum_xx, self.sum_yx, self.sum_yy)

    @property
    def finite(self) -> bool:
        """Whether the sums of x xᵀ and y xᵀ are finite."""
        return bool(self.sum_xx.isfinite().all() and self.sum_yx.isfinite().all())

    def _add_rows(self, x: Float[Tensor, "groups rows columns"], y: Float[Tensor, "targets rows out"]) -> None:
        if x.shape[1] != y.shape[1]:
            raise PassError(f"its inputs unfold to {x.shape[1]} rows and it has {y.shape[1]} outputs")
        groups, rows, width = x.shape
        targets, _, out = y.shape
        if not self.count:
            self.shift_x, self.shift_y = x.mean(1), y.mean(1)
            self.sum_x = torch.zeros(groups, width, dtype=torch.float64)
            self.sum_y = torch.zeros(targets, out, dtype=torch.float64)
            self.sum_xx = torch.zeros(groups, width, width, dtype=torch.float64)
            self.sum_yx = torch.zeros(targets, out, width, dtype=torch.float64)
            self.sum_yy = torch.zeros(targets, targets, out, dtype=torch.float64)
        self.count += rows
        y = y - self.shift_y[:, None]
        self.sum_y += y.sum(1, dtype=torch.float64)
        for i in range(targets):
            self.sum_yy[i] += (y[i] * y).sum(1, dtype=torch.float64)
        by_group = y.mT.reshape(targets, groups, -1, rows)
        sum_yx = self.sum_yx.view(targets, groups, -1, width)
        for some in torch.arange(groups).split(max(1, CACHE_BYTES // (rows * width * 4))):
            of = slice(int(some[0]), int(some[-1]) + 1)
            moved = x[of] - self.shift_x[of, None]
            self.sum_x[of] += moved.sum(1)
            self.sum_xx[of] += gram(moved) if groups == 1 else moved.mT @ moved
            sum_yx[:, of] += by_group[:, of] @ moved

    @classmethod
    def of_none(
        cls, shift_x: Float[Tensor, "groups columns"], shift_y: Float[Tensor, "targets out"]
    ) -> "SecondMoments":
        """The moments of no rows, relative to these shifts."""
        (groups, width), (targets, out) = shift_x.shape, shift_y.shape
        sizes = (
            (groups, width),
            (targets, out),
            (groups, width, width),
            (targets, out, width),
            (targets, targets, out),
        )
        return cls(0, shift_x, shift_y, *(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def about(self, shift_x: Float[Tensor, "groups columns"], shift_y: Float[Tensor, "targets out"]) -> "SecondMoments":
        """The same rows, with sums relative to other shifts."""
        n, dx, dy = self.count, (self.shift_x - shift_x).double(), (self.shift_y - shift_y).double()
        sum_x, sum_y = self.sum_x + n * dx, self.sum_y + n * dy
        return SecondMoments(n, shift_x, shift_y, sum_x, sum_y, *self._products_moved_by(dx, dy))

    def __add__(self, other: "SecondMoments") -> "SecondMoments":
        """The sums over the rows of both operands."""
        if not self.count or not other.count:
            return self if self.count else other
        n, dx, dy = other.count, (other.shift_x - self.shift_x).double(), (other.shift_y - self.shift_y).double()
        xx, yx, yy = other._products_moved_by(dx, dy)
        # In this order: another one differs in the last digit, and after a dozen layers in a fiftieth of the masks.
        return SecondMoments(
            self.count + n, self.shift_x, self.shift_y, self.sum_x + other.sum_x + n * dx,
            self.sum_y + other.sum_y + n * dy, self.sum_xx + xx, self.sum_yx + yx, self.sum_yy + yy,
        )  # fmt: skip

    def without(self, part: "SecondMoments") -> "SecondMoments":
        """The sums over the rows that are not those of a part."""
        n, dx, dy = part.count, (part.shift_x - self.shift_x).double(), (part.shift_y - self.shift_y).double()
        xx, yx, yy = part._products_moved_by(dx, dy)
        return SecondMoments(
            self.count - n, self.shift_x, self.shift_y, self.sum_x - part.sum_x - n * dx,
            self.sum_y - part.sum_y - n * dy, self.sum_xx - xx, self.sum_yx - yx, self.sum_yy - yy,
        )  # fmt: skip

    def _products_moved_by(
        self, dx: Float[Tensor, "groups columns"], dy: Float[Tensor, "targets out"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of (x + dx)(x + dx)ᵀ, (y + dy)(x + dx)ᵀ and (y + dy)(y + dy)ᵀ."""
        n, per, x, y = self.count, self.sum_y.shape[1] // len(self.sum_x), self.sum_x, self.sum_y
        of_rows, x_of_rows = (v.repeat_interleave(per, 0) for v in (dx, x))
        xx = torch.baddbmm(self.sum_xx, torch.stack([x, dx], 2), torch.stack([dx, x + n * dx], 1))
        yx = self.sum_yx + y[..., None] * of_rows + dy[..., None] * x_of_rows + n * dy[..., None] * of_rows
        yy = self.sum_yy + y[:, None] * dy + dy[:, None] * y + n * dy[:, None] * dy
        return xx, yx, yy

    def combined(self, share: Float[Tensor, "targets out"]) -> "SecondMoments":
        """The moments with a single target: the sum of all targets, each times its share per output."""
        w = share.to(torch.float64).expand(self.sum_y.shape)
        return SecondMoments(
            self.count, self.shift_x, (w * self.shift_y).sum(0, keepdim=True), self.sum_x,
            (w * self.sum_y).sum(0, keepdim=True), self.sum_xx, (w[..., None] * self.sum_yx).sum(0, keepdim=True),
            (w[:, None] * w * self.sum_yy).sum((0, 1), keepdim=True),
        )  # fmt: skip

    def of_outputs(self, chosen: Int[Tensor, " k"]) -> "SecondMoments":
        """The same rows with these outputs alone, of a layer without groups."""
        return replace(
            self,
            shift_y=self.shift_y[:, chosen],
            sum_y=self.sum_y[:, chosen],
            sum_yx=self.sum_yx[:, chosen],
            sum_yy=self.sum_yy[:, :, chosen],
        )

    def problem(self, centred: bool) -> "LeastSquares":
        """The least-squares problem of a single target. Moments are about the means if `centred`, else about 0."""
        dx, dy = self._means()
        [shift_y], [[sum_yy]] = self.shift_y, self.sum_yy
        mean_x, mean_y = dx + self.shift_x, dy + shift_y
        gram = torch.baddbmm(self.sum_xx, dx[:, :, None], dx[:, None], beta=1 / self.count, alpha=-1)
        power = sum_yy / self.count - dy.square()
        if not centred:
            gram.baddbmm_(mean_x[:, :, None], mean_x[:, None])
            power = power + mean_y.square()
        return LeastSquares(gram, self.cross(centred), power, mean_x, mean_y, self.count)

    def cross(self, centred: bool) -> Float[Tensor, "out columns"]:
        """G of the problem of a single target."""
        (dx, dy), [shift_y], [sum_yx] = self._means(), self.shift_y, self.sum_yx
        per_row = len(shift_y) // len(dx)
        cross: Tensor = sum_yx / self.count - dy[:, None] * dx.repeat_interleave(per_row, 0)
        if not centred:
            cross = cross + (dy + shift_y)[:, None] * (dx + self.shift_x).repeat_interleave(per_row, 0)
        return cross

    def _means(self) -> tuple[Float[Tensor, "groups columns"], Float[Tensor, " out"]]:
        """The means of inputs and of a single target, relative to the shifts."""
        [sum_y] = self.sum_y
        return self.sum_x / self.count, sum_y / self.count


@dataclass(frozen=True, slots=True)
class LeastSquares:
    """The problem of minimizing E‖y − W′x‖² over W′, as float64 moments.

    `groups` are those of a grouped convolution; other layers have 1. `count` is the number of rows.
    """

    gram: Float[Tensor, "groups columns columns"]  # C
    cross: Float[Tensor, "out columns"]  # G
    power: Float[Tensor, " out"]  # E[y²]
    mean_x: Float[Tensor, "groups columns"]
    mean_y: Float[Tensor, " out"]
    count: int

    def by_group(self, matrix: Float[Tensor, "out columns"]) -> Float[Tensor, "groups rows columns"]:
        """The rows of a matrix by convolution group, in float64."""
        return matrix.double().reshape(len(self.gram), -1, matrix.shape[1])

    def mean_of(self, matrix: Float[Tensor, "out columns"]) -> Float[Tensor, " out"]:
        """E[Wx], with W = `matrix`."""
        return (self.by_group(matrix) @ self.mean_x[..., None]).flatten()

    def outputs(self, matrix: Float[Tensor, "out columns"]) -> "OutputMoments":
        """The second moments of y and W′x for each output, with W′ = `matrix`."""
        w = self.by_group(matrix)
        own = ((w @ self.gram) * w).sum(-1).flatten()
        return OutputMoments(self.power, (self.cross * matrix.double()).sum(-1), own)

    def error(self, matrix: Float[Tensor, "out columns"]) -> Float[Tensor, " out"]:
        """E(y − W′x)² for each output, with W′ = `matrix`."""
        return self.outputs(matrix).error

    def bias(self, matrix: Float[Tensor, "out columns"]) -> Float[Tensor, " out"]:
        """E[y − W′x], the bias that gives W′x + b the mean of y, with W′ = `matrix`."""
        return self.mean_y - self.mean_of(matrix)


@dataclass(frozen=True, slots=True)
class OutputMoments:
    """Second moments of the target y and of the prediction W′x for each output, in float64."""

    target: Float[Tensor, " out"]  # E[y²]
    cross: Float[Tensor, " out"]  # E[y W′x]
    own: Float[Tensor, " out"]  # E[(W′x)²]

    @property
    def error(self) -> Float[Tensor, " out"]:
        """E(y − W′x)²."""
        return self.target - 2 * self.cross + self.own

    def times(self, gain: Float[Tensor, " out"]) -> "OutputMoments":
        """The moments with each prediction times its gain."""
        return OutputMoments(self.target, gain * self.cross, gain.square() * self.own)
