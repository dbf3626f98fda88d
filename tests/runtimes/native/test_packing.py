"""Packing of N:M weights: lossless, with paired rows that share many channels, and blocks of whole groups."""

import numpy as np
import pytest
from hypothesis import given, settings
from native_models import Array, masked, products

from mpcompile.runtimes.native.packing import block_for, pack, paired, shared_rows, unpack


@given(products())
@settings(max_examples=100)
def test_unpacking_gives_the_weight_again(product: tuple[Array, Array, Array, int]) -> None:
    _, weight, _, of = product
    np.testing.assert_array_equal(unpack(pack(weight, of)), weight)


def test_rows_with_the_same_channels_are_paired_within_their_chunk() -> None:
    rng = np.random.default_rng(0)
    kept = masked(rng, 64, 64, 2, 4) != 0
    doubled = np.concatenate([kept, kept[::-1]])  # every row has an equal one far away
    row_order, shared_steps = paired(np.stack([doubled, ~doubled]), 128)
    assert (np.sort(row_order.reshape(2, -1)) == np.arange(128)).all()
    assert (doubled[row_order[..., 0]] == doubled[row_order[..., 1]]).all()
    assert (shared_steps == 32).all()
    chunks = paired(doubled[None], 32)[0].reshape(4, 32)
    assert (np.sort(chunks) == np.arange(128).reshape(4, 32)).all()


@pytest.mark.parametrize(("keep", "of", "least"), [(2, 4, 19), (16, 32, 18), (1, 4, 6)])
def test_pairs_share_more_than_by_chance_and_mostly_the_same_number(keep: int, of: int, least: int) -> None:
    """Of 64 channels, random rows share 16, 16 and 4 in the mean. Equal numbers make loop ends predictable."""
    kept = masked(np.random.default_rng(0), 256, 64, keep, of) != 0
    row_order, shared_steps = paired(kept[None], 128)
    both = kept[row_order[0, :, 0]] & kept[row_order[0, :, 1]]
    assert (shared_steps <= both.sum(-1)).all()
    for chunk in shared_steps.reshape(2, -1):
        assert (np.diff(chunk) <= 0).all()
        assert chunk.min() >= least
        assert (chunk == chunk[0]).mean() >= 0.9


def test_shared_rows_are_detected() -> None:
    rng = np.random.default_rng(0)
    assert [shared_rows(masked(rng, 16, 32, 2, 4, sharing) != 0) for sharing in (1, 2, 4)] == [1, 2, 4]
    assert shared_rows(np.ones((6, 4), bool)) == 2  # 4 does not divide 6


@pytest.mark.parametrize(
    ("columns", "of", "block"), [(768, 4, 64), (768, 12, 48), (784, 4, 56), (764, 4, 64), (60, 12, 60), (24, 4, 24)]
)
def test_blocks_hold_whole_groups_and_waste_little(columns: int, of: int, block: int) -> None:
    assert block_for(columns, of, 1) == block
