"""NM as a value: what it accepts, what it refuses, and how it is written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.errors import UsageError
from mpcompile.ir.pattern import NM, WIDEST_GROUP


@st.composite
def patterns(draw: st.DrawFn) -> NM:
    of = draw(st.integers(2, WIDEST_GROUP))
    return NM(keep=draw(st.integers(1, of - 1)), of=of, rows=draw(st.sampled_from((1, 2, 4))))


@given(patterns())
def test_text_and_back(pattern: NM) -> None:
    assert NM.parse(str(pattern)) == pattern


def test_density_is_the_kept_share() -> None:
    assert NM(keep=12, of=16).density == 0.75


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "2:65", "2:4x0"])
def test_impossible_patterns_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        NM.parse(text)


@pytest.mark.parametrize("text", ["", "2", "2/4", "2:4:8", "2:-4", "two:four", "2.0:4", "2:4x"])
def test_other_spellings_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="such as 2:4"):
        NM.parse(text)
