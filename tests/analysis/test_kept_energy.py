"""Kept energy against a plain sum over weights."""

import numpy as np
import pytest
import torch

from mpcompile.analysis.kept_energy import BINS, kept_energy


@pytest.mark.parametrize(("shape", "of"), [((6, 16), 4), ((5, 400), 4), ((4, 32, 3, 3), 16), ((3, 8), 8)])
def test_each_run_of_groups_has_its_share_of_squares(shape: tuple[int, ...], of: int) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(shape, generator=rng), torch.rand(shape, generator=rng) < 0.5
    found = kept_energy(weight, mask, of)
    groups = shape[1] // of
    runs = np.array_split(np.arange(groups), min(BINS, groups))
    expected = []
    for run in runs:
        channels = np.concatenate([np.arange(of * group, of * (group + 1)) for group in run])
        squares = weight.numpy().astype(np.float64)[:, channels] ** 2
        expected.append(squares[mask.numpy()[:, channels]].sum() / squares.sum())
    assert found == pytest.approx(expected, rel=1e-12)


def test_channels_without_weights_keep_everything() -> None:
    weight, mask = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool)
    weight[:, :4] = 1
    assert kept_energy(weight, mask, 4) == (0.0, 1.0)
