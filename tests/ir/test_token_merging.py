"""Token merging on tensors, against a loop over tokens in float64 that follows the paper's steps one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.ir.token_merging import log_size, mean_by_size, merge_tokens, most_merged, unit_sizes


def merged_by_loop(
    x: NDArray[np.float64], size: NDArray[np.float64], keys: NDArray[np.float64], r: int, protected: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One image: x (n, c), size (n,), keys (h, n, d)."""
    metric = keys.mean(0)
    norms = np.sqrt((metric**2).sum(1))
    free = [i for i in range(len(x)) if i >= protected]
    a_side, b_side = [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]
    best: list[tuple[float, int, int]] = []
    for a in a_side:
        scores = [float((metric[a] / (norms[a] + 1e-6)) @ (metric[b] / (norms[b] + 1e-6))) for b in b_side]
        partner = scores.index(max(scores))
        best.append((scores[partner], a, b_side[partner]))
    going = sorted(best, key=lambda row: (-row[0], row[1]))[:r]
    taken: dict[int, list[int]] = {b: [b] for b in b_side}
    for _, a, b in going:
        taken[b].append(a)
    gone = {a for _, a, _ in going}
    kept = [*range(protected), *(a for a in a_side if a not in gone)]
    rows = [x[i] for i in kept] + [
        sum(size[i] * x[i] for i in taken[b]) / sum(size[i] for i in taken[b]) for b in b_side
    ]
    sizes = [size[i] for i in kept] + [sum(size[i] for i in taken[b]) for b in b_side]
    return np.array(rows), np.array(sizes)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, int, int, bool]:
    protected = draw(st.integers(0, 5))
    tokens = protected + draw(st.integers(2, 24))
    r = draw(st.integers(1, most_merged(tokens, protected)))
    return draw(st.integers(1, 3)), tokens, protected, r, draw(st.integers(0, 10_000)), draw(st.booleans())


@given(cases())
def test_equals_the_loop(case: tuple[int, int, int, int, int, bool]) -> None:
    batch, tokens, protected, r, seed, ties = case
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 6, generator=rng, dtype=torch.float64)
    size = torch.randint(1, 5, (batch, tokens, 1), generator=rng).double()
    # Keys of one, zero and minus one in one dimension: cosines of 1, 0 and −1 exactly, and most of them equal.
    keys = (
        torch.randint(-1, 2, (batch, 1, tokens, 1), generator=rng).double()
        if ties
        else torch.randn(batch, 2, tokens, 4, generator=rng, dtype=torch.float64)
    )
    found, sizes = merge_tokens(x, size, keys, r, protected)
    assert found.shape == (batch, tokens - r, 6)
    for image in range(batch):
        rows, wanted = merged_by_loop(x[image].numpy(), size[image, :, 0].numpy(), keys[image].numpy(), r, protected)
        # The same sums in another order, in float64.
        np.testing.assert_allclose(found[image].numpy(), rows, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(sizes[image, :, 0].numpy(), wanted)
    torch.testing.assert_close(found[:, :protected], x[:, :protected], rtol=0, atol=0)
    assert torch.equal(sizes.sum(1), size.sum(1))  # integers: no tolerance
    # What is conserved is the sum of all tokens, each as often as its size says.
    torch.testing.assert_close((sizes * found).sum(1), (size * x).sum(1), rtol=1e-10, atol=1e-10)


def test_nothing_to_merge_is_the_same_tensor() -> None:
    x = torch.randn(2, 5, 3)
    size = unit_sizes(x)
    assert merge_tokens(x, size, torch.randn(2, 1, 5, 2), 0, 1) == (x, size)
    assert [most_merged(n, 1) for n in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 2]


def test_keys_of_zero_and_half_precision_stay_finite() -> None:
    x = 60000 * torch.ones(1, 9, 4, dtype=torch.float16)  # near the end of float16; a sum of two would leave it
    found, sizes = merge_tokens(x, unit_sizes(x), torch.zeros(1, 2, 9, 4, dtype=torch.float16), 4, 1)
    assert found.isfinite().all()
    # Weights s/S are rounded to 11 bits each.
    torch.testing.assert_close(found, x[:, :5], rtol=2e-3, atol=0)
    assert sizes.sum() == 9


def test_a_token_counts_as_often_as_its_size_says() -> None:
    """Attention and mean over merged tokens are those over the tokens that went into them, where these were equal."""
    rng = torch.Generator().manual_seed(0)
    distinct = torch.randn(1, 4, 8, generator=rng, dtype=torch.float64)
    size = torch.tensor([1.0, 3, 2, 1], dtype=torch.float64).reshape(1, 4, 1)
    repeated = distinct.repeat_interleave(torch.tensor([1, 3, 2, 1]), 1)

    def attend(tokens: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            distinct[:, None], tokens[:, None], tokens[:, None], attn_mask=bias
        )

    torch.testing.assert_close(attend(distinct, log_size(size)), attend(repeated, None), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean_by_size(distinct, size), repeated.mean(1), rtol=1e-12, atol=1e-12)
    without_first = mean_by_size(distinct[:, 1:], size, keepdim=True)
    torch.testing.assert_close(without_first, repeated[:, 1:].mean(1, keepdim=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("protected", [0, 1, 2])
def test_the_limit_leaves_half(protected: int) -> None:
    x = torch.randn(2, 16 + protected, 3)
    r = most_merged(16 + protected, protected)
    found, sizes = merge_tokens(x, unit_sizes(x), torch.randn(2, 2, 16 + protected, 4), r, protected)
    assert found.shape[1] == 8 + protected
    assert (sizes[:, :protected] == 1).all()
