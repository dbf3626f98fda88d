"""N:M weights -> the streams that the kernel reads (kernel.h has the layout), and back.

Two rows of their own patterns are computed together, and an input channel that both keep is loaded once. Rows are
therefore paired so that partners share as many input channels as possible. Any two rows of a 2:4 matrix share half of
their channels by chance; choosing partners among 128 rows adds up to 5 points where the mask is random.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt16

SHARES = (4, 2, 1)
# Input channels of a block, at most, by share. 72 channels x 96 tokens x 4 bytes are 27 KiB, of an L1 cache of 32 KiB;
# where four rows use what is loaded, the L2 cache keeps up, and fewer blocks are worth more (5 % on Zen 4).
WIDEST_BLOCK = {1: 72, 2: 72, 4: 128}
CHUNK_ROWS = 128  # sums of a chunk, 128 x 96 x 4 bytes, stay in the L2 cache; smaller ones divide better among threads
STEP_QUANTUM = 2  # common steps are counted in pairs, so that the loop's end is easier to predict


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
    order: Int32[np.ndarray, "units unit"]

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
    kept = weight != 0
    share = share or shared_rows(kept)
    block = block_for(columns, of, share)
    blocks = -(-columns // block)
    unit = max(share, 2)
    order = paired(kept) if share == 1 else np.arange(rows)
    order = np.concatenate([order, np.full(-rows % unit, rows)]).reshape(-1, unit).astype(np.int32)
    padded = np.zeros((rows + 1, blocks * block), np.float32)
    padded[:rows, :columns] = weight
    # units, rows of a unit, blocks, channels of a block
    taken = padded[order].reshape(len(order), unit, blocks, block)
    keep = taken != 0
    if share == 1:
        rank, common = _coupled(keep)
    else:
        keep = np.broadcast_to(keep.any(1, keepdims=True), keep.shape)
        rank, common = np.where(keep, 0, 2), np.zeros((len(order), blocks), np.int64)
    steps = max(int(keep.sum(-1).max()), 1)
    places = np.argsort(rank, axis=-1, kind="stable")[..., :steps]
    used = np.take_along_axis(keep, places, -1)
    values = np.where(used, np.take_along_axis(taken, places, -1), np.float32(0))
    places = np.where(used, places, block)
    if share != 1:
        places = places[:, :1]
    return Packed(
        rows,
        columns,
        share,
        block,
        chunk_for(rows),
        np.ascontiguousarray(values.transpose(2, 0, 3, 1)),
        np.ascontiguousarray(places.transpose(2, 0, 3, 1).astype(np.uint16)),
        np.ascontiguousarray(common.T.astype(np.uint16)),
        order,
    )


def unpack(packed: Packed) -> Float32[np.ndarray, "rows columns"]:
    """The dense weight again: what the function body in the file computes."""
    blocks = len(packed.values)
    dense = np.zeros((packed.rows + 1, blocks * packed.block + 1), np.float32)
    column = packed.places.astype(np.int64) + packed.block * np.arange(blocks)[:, None, None, None]
    np.add.at(dense, (packed.order[None, :, None, :], np.broadcast_to(column, packed.values.shape)), packed.values)
    return dense[: packed.rows, : packed.columns]


def _coupled(
    keep: Bool[np.ndarray, "units two blocks block"],
) -> tuple[Int[np.ndarray, "units two blocks block"], Int[np.ndarray, "units blocks"]]:
    """Sorting keys that put the common channels of two rows first, and how many are common."""
    both = keep[:, 0] & keep[:, 1]
    common = both.sum(-1) // STEP_QUANTUM * STEP_QUANTUM
    first = both & (both.cumsum(-1) <= common[..., None])
    return np.where(first[:, None], 0, np.where(keep, 1, 2)), common


def shared_rows(kept: Bool[np.ndarray, "rows columns"]) -> int:
    """The most neighbouring rows, of 4, 2 and 1, that share their pattern throughout."""
    for share in SHARES:
        if len(kept) % share == 0:
            neighbours = kept.reshape(-1, share, kept.shape[1])
            if (neighbours == neighbours[:, :1]).all():
                return share
    raise AssertionError("1 divides every number")


def paired(kept: Bool[np.ndarray, "rows columns"]) -> Int[np.ndarray, " rows"]:
    """An order of the rows, moved only within chunks, in which neighbours 2i and 2i + 1 keep many common channels.

    Greedy: each row that is left takes the most similar of those left.
    """
    chunk = chunk_for(len(kept))
    order = []
    for start in range(0, len(kept), chunk):
        part = kept[start : start + chunk].astype(np.float32)
        alike = part @ part.T
        np.fill_diagonal(alike, -1)
        left = np.ones(len(part), bool)
        for row in range(len(part)):
            if not left[row]:
                continue
            left[row] = False
            order.append(start + row)
            if left.any():
                partner = int(np.where(left, alike[row], -1).argmax())
                left[partner] = False
                order.append(start + partner)
    return np.array(order)


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
