"""N:M weights -> the streams that the kernel reads (nm_gemm.h has the layout), and back.

Two rows of their own patterns are computed together, and an input channel that both keep is loaded once. Any two rows
of a 2:4 matrix share half of their channels by chance. Each block of channels has its own partners, so that they can be
chosen by few channels: among 128 rows nearly every pair of a random 2:4 mask then shares 20 of 32, at 1:4 7 of 16
(4 by chance). That all but a few pairs share equally many matters as well: the processor foresees where loops end.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt16

SHARES = (4, 2, 1)
# Input channels of a block, at most, by share. 64 channels x 112 tokens x 4 bytes are 28 KiB, of an L1 cache of 32 KiB;
# where four rows use what is loaded, the L2 cache keeps up, and fewer blocks are worth more (5 % on Zen 4).
WIDEST_BLOCK = {1: 64, 2: 64, 4: 128}
CHUNK_ROWS = 128  # sums of a chunk, 128 x 112 x 4 bytes, stay in the L2 cache; smaller ones divide better among threads
MOST_LACKED = 40  # channels; so far apart float64 still tells costs of a pair apart
FEWER_SHARED = 0.1  # the share of pairs that may have fewer common steps than the others, which all have equally many


@dataclass(frozen=True, slots=True)
class Packed:
    """The streams of one weight (rows, columns)."""

    rows: int
    columns: int
    share: int
    block: int
    chunk: int
    values: Float32[np.ndarray, "blocks units steps unit"]
    places: UInt16[np.ndarray, "blocks units steps places"]
    common: UInt16[np.ndarray, "blocks units"]
    order: Int32[np.ndarray, "blocks units unit"]

    @property
    def bytes(self) -> int:
        """What the kernel reads of it, for each tile of tokens."""
        return sum(part.nbytes for part in (self.values, self.places, self.common, self.order))


def pack(weight: Float32[np.ndarray, "rows columns"], of: int, share: int | None = None) -> Packed:
    """The streams of a weight whose groups are `of` wide; zeros are left out.

    `share`: how many neighbouring rows are computed from one stream of places, 1, 2 or 4; by default the most that
    share their pattern throughout. Rows that do not share it may be packed so, at the cost of steps with zeros.
    """
    rows, columns = weight.shape
    share = share or shared_rows(weight != 0)
    block = block_for(columns, of, share)
    blocks = -(-columns // block)
    unit = max(share, 2)
    split = np.zeros((blocks * block, rows + 1), np.float32)
    split[:columns, :rows] = weight.T
    split = split.reshape(blocks, block, rows + 1).transpose(0, 2, 1)  # the last row stands for one that is missing
    here = np.append(np.arange(rows), np.full(-rows % unit, rows))
    if share == 1:
        order, common = paired(split[:, here] != 0, chunk_for(rows))
    else:
        order = np.broadcast_to(here.reshape(-1, unit), (blocks, len(here) // unit, unit))
        common = np.zeros(order.shape[:2], np.int64)
    taken = split[np.arange(blocks)[:, None, None], order]  # blocks, units, rows of a unit, channels of a block
    keep = taken != 0
    if share == 1:
        rank = _coupled(keep, common)
    else:
        keep = np.broadcast_to(keep.any(2, keepdims=True), keep.shape)
        rank = np.where(keep, 0, 2)
    steps = max(int(keep.sum(-1).max()), 1)
    places = np.argsort(rank, axis=-1, kind="stable")[..., :steps]
    used = np.take_along_axis(keep, places, -1)
    values = np.where(used, np.take_along_axis(taken, places, -1), np.float32(0))
    places = np.where(used, places, block)
    if share != 1:
        places = places[:, :, :1]
    return Packed(
        rows,
        columns,
        share,
        block,
        chunk_for(rows),
        np.ascontiguousarray(values.swapaxes(2, 3)),
        np.ascontiguousarray(places.swapaxes(2, 3).astype(np.uint16)),
        common.astype(np.uint16),
        order.astype(np.int32),
    )


def unpack(packed: Packed) -> Float32[np.ndarray, "rows columns"]:
    """The dense weight again: what the function body in the file computes."""
    blocks = len(packed.values)
    dense = np.zeros((packed.rows + 1, blocks * packed.block + 1), np.float32)
    column = packed.places.astype(np.int64) + packed.block * np.arange(blocks)[:, None, None, None]
    np.add.at(dense, (packed.order[:, :, None, :], np.broadcast_to(column, packed.values.shape)), packed.values)
    return dense[: packed.rows, : packed.columns]


def _coupled(
    keep: Bool[np.ndarray, "blocks units two block"], common: Int[np.ndarray, "blocks units"]
) -> Int[np.ndarray, "blocks units two block"]:
    """Sorting keys that put the first `common` channels that both rows keep first, and unused ones last."""
    both = keep[:, :, 0] & keep[:, :, 1]
    first = both & (both.cumsum(-1) <= common[..., None])
    return np.where(first[:, :, None], 0, np.where(keep, 1, 2))


def shared_rows(kept: Bool[np.ndarray, "rows columns"]) -> int:
    """The most neighbouring rows, of 4, 2 and 1, that share their pattern throughout."""
    for share in SHARES:
        if len(kept) % share == 0:
            neighbours = kept.reshape(-1, share, kept.shape[1])
            if (neighbours == neighbours[:, :1]).all():
                return share
    raise AssertionError("1 divides every number")


def paired(
    keep: Bool[np.ndarray, "blocks rows block"], chunk: int
) -> tuple[Int[np.ndarray, "blocks units two"], Int[np.ndarray, "blocks units"]]:
    """For each block the two rows of every unit, moved only within chunks, and how many channels they take together.

    Partners are the assignment of a chunk's odd rows to its even ones that leaves no pair with few channels in common:
    what a pair lacks of the most that any shares counts twice for each channel. Pairs take together what all but a few
    can (FEWER_SHARED), those of fewer come last.
    """
    from scipy.optimize import linear_sum_assignment

    blocks, rows, _ = keep.shape
    order, common = np.empty((blocks, rows // 2, 2), np.int64), np.empty((blocks, rows // 2), np.int64)
    for start in range(0, rows, chunk):
        part = keep[:, start : start + chunk].astype(np.float32)
        units = slice(start // 2, start // 2 + part.shape[1] // 2)
        for block, shared in enumerate(part[:, ::2] @ part[:, 1::2].swapaxes(1, 2)):
            even, odd = linear_sum_assignment(np.exp2(np.minimum(shared.max() - shared, MOST_LACKED)))
            together = shared[even, odd].astype(np.int64)
            together = np.minimum(together, np.quantile(together, FEWER_SHARED, method="lower"))
            falling = np.argsort(-together, kind="stable")
            order[block, units] = start + np.stack([2 * even, 2 * odd + 1], 1)[falling]
            common[block, units] = together[falling]
    return order, common


def block_for(columns: int, of: int, share: int) -> int:
    """Input channels in a block: whole groups, so that every row has as many steps.

    The cheapest by a rough count: what the last block leaves unused is computed all the same, sums are loaded and
    stored once a block, which is about four channels' worth at 50 %, and channels beyond eights pack one by one.
    """
    sizes = range(of, max(WIDEST_BLOCK[share], of) + 1, of)

    def cost(size: int) -> float:
        return -(-columns // size) * (size + 4) * (1.0 if size % 8 == 0 else 1.02)

    return min((size for size in sizes if size <= max(columns, of)), key=cost)


def chunk_for(rows: int) -> int:
    """Rows in a chunk: near CHUNK_ROWS, chunks of like size, in sixteens."""
    chunks = -(-rows // CHUNK_ROWS)
    return -(-rows // (chunks * 16)) * 16
