"""Outputs that a model masks with a large number for every image do not hide differences of the others."""

import numpy as np
import pytest
import torch

from mpcompile.errors import ParityError
from mpcompile.ir.parity import is_constant, relative_difference, require_parity
from mpcompile.measure.output_errors import output_error

LOGITS = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
MASKED = np.concatenate([LOGITS, np.full((4, 1), -1e9, np.float32)], axis=1)
MOVED = MASKED + np.float32(0.5) * (np.arange(7) == 2)


def test_parity_is_relative_to_the_values_that_depend_on_the_image() -> None:
    assert relative_difference(MASKED, MOVED) == relative_difference(LOGITS, MOVED[:, :-1]) > 0.1
    for precision in ("fp32", "int8"):
        with pytest.raises(ParityError, match="outputs differ"):
            require_parity(MASKED, MOVED, precision, "the file")


def test_a_masked_value_that_moves_counts() -> None:
    moved = MASKED.copy()
    moved[0, -1] = 0
    assert relative_difference(MASKED, moved) == 1


def test_masked_outputs_are_not_constant() -> None:
    assert not is_constant(MASKED)
    assert is_constant(np.repeat(MASKED[:1], 4, axis=0))


def test_the_reported_error_is_that_of_the_other_values() -> None:
    assert output_error(torch.from_numpy(MASKED), torch.from_numpy(MOVED)) == output_error(
        torch.from_numpy(LOGITS), torch.from_numpy(MOVED[:, :-1].copy())
    )
