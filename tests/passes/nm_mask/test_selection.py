"""The largest scores of each group, against a stable sort."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.passes.nm_mask.selection import largest_of_each

VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.0000002, 1e-45, float("inf"), float("nan")])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), of=st.integers(1, 64))
def test_the_largest_are_those_that_a_stable_sort_puts_first(data: st.DataObject, of: int) -> None:
    keep = data.draw(st.integers(0, of))
    rows = data.draw(st.lists(st.lists(VALUES, min_size=of, max_size=of), min_size=1, max_size=3))
    scores = torch.tensor(rows)
    kept = largest_of_each(scores, keep)
    assert (kept.sum(-1) == keep).all()
    wanted = scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    assert torch.equal(kept, torch.zeros_like(kept).scatter_(-1, wanted, True))
