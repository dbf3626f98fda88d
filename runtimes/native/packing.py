"""Packs N:M weights into the streams that the kernel reads, and unpacks them. nm_gemm.h describes the layout.

The kernel computes two rows with different patterns together, and loads an input channel that both rows keep only
once. Any two rows of a random 2:4 mask share half of their channels. Rows are therefore paired so that they share more:
with separate pairs for each block of channels, nearly every pair among 128 rows of a random 2:4 mask shares 20 of 32
channels. At 1:4 it shares 7 of 16 (4 by chance). It also matters that nearly all pairs share the same number of
channels, because the processor then predicts where the loops end.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt16

ROWS_PER_PATTERN = (4, 2, 1)
# The widest block, in input channels, by rows per pattern. 64 channels x 112 tokens x 4 bytes are 28 KiB of a 32 KiB L1
# cache. Where four rows use each loaded activation, the L2 cache is fast enough, and fewer blocks gain 5 % (Zen 4).
WIDEST_BLOCK = {1: 64, 2: 64, 4: 128}
# The sums of a chunk, 128 x 112 x 4 bytes, stay in the L2 cache. Smaller chunks balance threads better.
CHUNK_ROWS = 128
MAX_SHORTFALL = 40  # channels; costs of pairs then go up to 2^40, and float64 still distinguishes their sums
SHORTER_PAIRS = 0.1  # share of the pairs that may have fewer shared steps than the common count of all others


@dataclass(frozen=True, slots=True)
class Packed:
    """One weight (rows, columns) as the kernel's streams.

    A row group is the rows that the kernel computes together: 2, or 4 where 4 rows share a pattern. A step multiplies
    one value per row of a group. Groups with fewer steps than the longest are padded with zeros.
    """

    rows: int
    columns: int
    rows_per_pattern: int  # neighbouring rows that share one pattern
    block: int  # input channels per block
    chunk: int  # rows within which rows are paired
    values: Float32[np.ndarray, "blocks groups steps group_rows"]
    # input channel within the block; `block` is padding
    indices: UInt16[np.ndarray, "blocks groups steps group_patterns"]
    shared_steps: UInt16[np.ndarray, "blocks groups"]  # leading steps in which both rows use the same channel
    row_order: Int32[np.ndarray, "blocks groups group_rows"]  # row of the weight; `rows` is padding

    @property
    def bytes(self) -> int:
        """Bytes that the kernel reads for each tile of tokens."""
        return sum(stream.nbytes for stream in (self.values, self.indices, self.shared_steps, self.row_order))


def pack(weight: Float32[np.ndarray, "rows columns"], group_size: int, rows_per_pattern: int | None = None) -> Packed:
    """Returns the streams of a weight whose N:M groups are `group_size` wide. Zeros are left out.

    `rows_per_pattern` is how many neighbouring rows use one stream of channel indices: 1, 2 or 4. By default it is the
    largest number that the weight's zeros allow. A larger number is allowed too; it costs steps with zeros.
    """
    rows, columns = weight.shape
    rows_per_pattern = rows_per_pattern or shared_rows(weight != 0)
    block = block_for(columns, group_size, rows_per_pattern)
    blocks = -(-columns // block)
    group_rows = max(rows_per_pattern, 2)
    split = np.zeros((blocks * block, rows + 1), np.float32)
    split[:columns, :rows] = weight.T
    split = split.reshape(blocks, block, rows + 1).transpose(0, 2, 1)  # the last row is padding
    padded_rows = np.append(np.arange(rows), np.full(-rows % group_rows, rows))
    if rows_per_pattern == 1:
        row_order, shared_steps = paired(split[:, padded_rows] != 0, chunk_for(rows))
    else:
        row_order = np.broadcast_to(
            padded_rows.reshape(-1, group_rows), (blocks, len(padded_rows) // group_rows, group_rows)
        )
        shared_steps = np.zeros(row_order.shape[:2], np.int64)
    grouped = split[np.arange(blocks)[:, None, None], row_order]  # blocks, groups, rows of a group, channels of a block
    kept = grouped != 0
    if rows_per_pattern == 1:
        sort_keys = _step_order(kept, shared_steps)
    else:
        kept = np.broadcast_to(kept.any(2, keepdims=True), kept.shape)
        sort_keys = np.where(kept, 0, 2)
    steps = max(int(kept.sum(-1).max()), 1)
    indices = np.argsort(sort_keys, axis=-1, kind="stable")[..., :steps]
    used = np.take_along_axis(kept, indices, -1)
    values = np.where(used, np.take_along_axis(grouped, indices, -1), np.float32(0))
    indices = np.where(used, indices, block)
    if rows_per_pattern != 1:
        indices = indices[:, :, :1]
    return Packed(
        rows,
        columns,
        rows_per_pattern,
        block,
        chunk_for(rows),
        np.ascontiguousarray(values.swapaxes(2, 3)),
        np.ascontiguousarray(indices.swapaxes(2, 3).astype(np.uint16)),
        shared_steps.astype(np.uint16),
        row_order.astype(np.int32),
    )


def unpack(packed: Packed) -> Float32[np.ndarray, "rows columns"]:
    """Returns the dense weight: the same arithmetic as the ONNX function that a file carries as fallback."""
    blocks = len(packed.values)
    dense = np.zeros((packed.rows + 1, blocks * packed.block + 1), np.float32)
    column = packed.indices.astype(np.int64) + packed.block * np.arange(blocks)[:, None, None, None]
    np.add.at(dense, (packed.row_order[:, :, None, :], np.broadcast_to(column, packed.values.shape)), packed.values)
    return dense[: packed.rows, : packed.columns]


def _step_order(
    kept: Bool[np.ndarray, "blocks groups two block"], shared_steps: Int[np.ndarray, "blocks groups"]
) -> Int[np.ndarray, "blocks groups two block"]:
    """Returns sort keys of channels: 0 for the first `shared_steps` that both rows keep, 1 for kept, 2 for pruned."""
    both = kept[:, :, 0] & kept[:, :, 1]
    leading = both & (both.cumsum(-1) <= shared_steps[..., None])
    return np.where(leading[:, :, None], 0, np.where(kept, 1, 2))


def shared_rows(kept: Bool[np.ndarray, "rows columns"]) -> int:
    """Returns 4, 2 or 1: the largest number of neighbouring rows that share one pattern in the whole weight."""
    for count in ROWS_PER_PATTERN:
        if len(kept) % count == 0:
            neighbours = kept.reshape(-1, count, kept.shape[1])
            if (neighbours == neighbours[:, :1]).all():
                return count
    raise AssertionError("1 divides every number")


def paired(
    kept: Bool[np.ndarray, "blocks rows block"], chunk: int
) -> tuple[Int[np.ndarray, "blocks groups two"], Int[np.ndarray, "blocks groups"]]:
    """Returns the two rows of each pair per block, and the number of shared steps of each pair.

    Rows are paired only within chunks of `chunk` rows: an assignment of a chunk's odd rows to its even rows. The cost
    of a pair is 2^(most channels that any pair shares - channels that this pair shares), so that no pair shares few.
    The number of shared steps is a quantile (SHORTER_PAIRS), so that nearly all pairs have the same; pairs with fewer
    come last.
    """
    from scipy.optimize import linear_sum_assignment

    blocks, rows, _ = kept.shape
    row_order, shared_steps = np.empty((blocks, rows // 2, 2), np.int64), np.empty((blocks, rows // 2), np.int64)
    for start in range(0, rows, chunk):
        part = kept[:, start : start + chunk].astype(np.float32)
        pairs = slice(start // 2, start // 2 + part.shape[1] // 2)
        for block, shared in enumerate(part[:, ::2] @ part[:, 1::2].swapaxes(1, 2)):
            even, odd = linear_sum_assignment(np.exp2(np.minimum(shared.max() - shared, MAX_SHORTFALL)))
            steps = shared[even, odd].astype(np.int64)
            steps = np.minimum(steps, np.quantile(steps, SHORTER_PAIRS, method="lower"))
            falling = np.argsort(-steps, kind="stable")
            row_order[block, pairs] = start + np.stack([2 * even, 2 * odd + 1], 1)[falling]
            shared_steps[block, pairs] = steps[falling]
    return row_order, shared_steps


def block_for(columns: int, group_size: int, rows_per_pattern: int) -> int:
    """Returns the number of input channels per block: a multiple of `group_size`, so that rows have equal step counts.

    Takes the cheapest size by a rough cost model. The unused part of the last block is computed too. Sums are
    loaded and stored once per block, which costs as much as about 4 channels at 50 %. Channels beyond a multiple of 8
    are packed one by one.
    """
    sizes = range(group_size, max(WIDEST_BLOCK[rows_per_pattern], group_size) + 1, group_size)

    def cost(size: int) -> float:
        return -(-columns // size) * (size + 4) * (1.0 if size % 8 == 0 else 1.02)

    return min((size for size in sizes if size <= max(columns, group_size)), key=cost)


def chunk_for(rows: int) -> int:
    """Returns the number of rows per chunk: about CHUNK_ROWS, a multiple of 16, equal for all chunks but the last."""
    chunks = -(-rows // CHUNK_ROWS)
    return -(-rows // (chunks * 16)) * 16
