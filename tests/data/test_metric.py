"""A metric of the user's own: what it gets, what it may return, and its mean."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpcompile.data.metric import Metric, collated, target_hash
from mpcompile.data.metric_values import MetricValues, mean_of
from mpcompile.errors import LoadError, UsageError
from mpcompile.measure.metric_comparison import MetricComparison, paired_interval


def test_it_gets_tensors_and_stacked_targets() -> None:
    seen: list[Any] = []

    def own(outputs: Tensor, targets: Any) -> Tensor:
        seen.append((outputs, targets))
        found: Tensor = outputs[:, 0] + targets
        return found

    found = Metric("own", own).of_batch(np.ones((3, 2), np.float16), [1, 2, 3])
    assert found.values.tolist() == [2, 3, 4]
    [(outputs, targets)] = seen
    assert outputs.dtype == torch.float32
    assert torch.equal(targets, torch.tensor([1, 2, 3]))
    assert collated([torch.zeros(2), torch.zeros(3)])[1].shape == (3,)
    assert collated([{"boxes": 1}]) == [{"boxes": 1}]


@pytest.mark.parametrize("returned", [0.5, np.float32(0.5), torch.tensor(0.5), [0.25, 0.75], np.array([0.25, 0.75])])
def test_it_returns_a_number_for_the_batch_or_for_each_sample(returned: Any) -> None:
    metric = Metric("own", lambda outputs, targets: returned)
    assert mean_of([metric.of_batch(torch.zeros(2, 3), [0, 0])]) == 0.5


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (torch.zeros(3), r"own returned shape \(3,\) for a batch of 2; it must return one number, or one for each"),
        ({"iou": 1}, "own returned dict for a batch of 2"),
        (None, "own returned"),
        (float("nan"), "own returned a number that is not finite"),
    ],
)
def test_anything_else_is_refused(returned: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Metric("own", lambda outputs, targets: returned).of_batch(torch.zeros(2, 3), [0, 0])


def test_a_metric_that_fails_is_named() -> None:
    def own(outputs: Tensor, targets: Any) -> float:
        raise KeyError("boxes")

    with pytest.raises(LoadError, match="the metric own failed: KeyError: 'boxes'"):
        Metric("own", own).of_batch(torch.zeros(2, 3), [0, 0])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
def test_means_are_over_samples(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=size) for size in sizes]
    each = [MetricValues(row, len(row), len(row)) for row in rows]
    batches = [MetricValues(row.mean(keepdims=True), 1, len(row)) for row in rows]
    assert mean_of(each) == pytest.approx(np.concatenate(rows).mean(), abs=1e-12)
    assert mean_of(batches) == pytest.approx(mean_of(each), abs=1e-12)
    found = MetricComparison.between("own", each, each)
    assert (found.drop, found.interval, found.count) == (0, (0, 0), sum(sizes))
    if max(sizes) > 1:
        assert MetricComparison.between("own", batches, batches).interval is None


def test_the_interval_is_paired() -> None:
    """A large spread over samples that both models share does not widen it; its ends are those of the normal mean."""
    rng = np.random.default_rng(1)
    shared, noise = rng.normal(0, 100, 400), rng.normal(0.5, 1, 400)
    low, high = paired_interval((shared + noise) - shared)
    error = noise.std() / 20
    assert low == pytest.approx(noise.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(noise.mean() + 1.96 * error, abs=0.3 * error)


def test_targets_are_hashed_by_their_values() -> None:
    one = {"boxes": torch.zeros(2, 4), "names": ["a", 1]}
    same = {"boxes": torch.zeros(2, 4), "names": ["a", 1]}
    other = {"boxes": torch.zeros(2, 4), "names": ["a", 2]}
    assert target_hash(one) == target_hash(same) != target_hash(other)
    assert target_hash(np.zeros(3)) != target_hash(np.ones(3))
