"""Patterns and densities as text: what they stand for, and the errors of wrong ones."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.errors import UsageError
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import (
    Alternatives,
    nested,
    parse_choice,
    parse_density,
    pattern_for,
    patterns_in,
    reason_unfit,
)


@pytest.mark.parametrize(
    ("text", "stands_for"),
    [
        ("50%", "16:32|8:16|4:8|2:4"),
        (" 25 % ", "8:32|4:16|2:8|1:4"),
        ("37.5%", "12:32|6:16|3:8"),
        ("40%", "8:20|4:10|2:5"),
        ("3.125%", "1:32"),
        ("45%", "9:20"),
        ("50%x4", "16:32x4|8:16x4|4:8x4|2:4x4"),
        ("8:16|2:4", "8:16|2:4"),
    ],
)
def test_a_density_is_its_nested_patterns(text: str, stands_for: str) -> None:
    assert str(parse_choice(text)) == stands_for


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("50", "is neither N:M, such as 2:4, nor a density in percent; did you mean 50%?"),
        ("0.375", "did you mean 37.5%?"),
        ("33%", r"no N:M with M ≤ 32 keeps exactly this share of the weights; did you mean 34.375% \(11:32\)?"),
        ("100%", r"did you mean 96.875% \(31:32\)?"),
        ("0%", r"did you mean 3.125% \(1:32\)?"),
        ("8:16|2:8", "the alternatives of a layer have one density, and each M divides the one before"),
        ("2:4|8:16", "each M divides the one before; give for example 8:16|4:8|2:4, or a comma .*: 2:4,8:16"),
        ("8:16x2|2:4", "have one density"),
        ("4:8v8|2:4", "have one density"),
        ("0", "is not N:M"),
    ],
)
def test_wrong_choices_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_choice(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2/4", "did you mean 2:4?"),
        ("4:8p8", "did you mean 4:8v8?"),
        ("4 of 8, vocabulary 16", "did you mean 4:8v16?"),
        ("2:4/4", "did you mean 2:4x4?"),
        ("8:16v8", "a vocabulary needs M ≤ 8; give for example 4:8v8: in every block of 8 input channels"),
        ("4:8x2v4", r"share a pattern with their neighbours \(x\) or take one .*\(v\); give 4:8x2 or 4:8v4"),
        ("4:8v0", "a vocabulary has at least 1 pattern"),
    ],
)
def test_wrong_patterns_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NM.parse(text)


@given(data=st.data())
def test_every_pattern_is_read_back_from_its_text(data: st.DataObject) -> None:
    of = data.draw(st.integers(2, 64))
    keep = data.draw(st.integers(1, of - 1))
    vocabulary = data.draw(st.integers(0, math.comb(of, keep))) if of <= 8 else 0
    rows = 1 if vocabulary else data.draw(st.integers(1, 16))
    pattern = NM(keep, of, rows, vocabulary)
    assert NM.parse(str(pattern)) == pattern == parse_choice(str(pattern)) == eval(repr(pattern))


@given(n=st.integers(1, 31), rows=st.integers(1, 4))
def test_every_choice_is_read_back_from_its_text(n: int, rows: int) -> None:
    density = Fraction(n, 32)
    patterns = nested(density, rows)
    assert parse_choice("|".join(map(str, patterns))) == parse_choice(f"{float(100 * density):g}%x{rows}")
    assert {Fraction(p.keep, p.of) for p in patterns} == {density}
    assert all(wide.of == 2 * narrow.of for wide, narrow in itertools.pairwise(patterns))
    assert parse_density(str(patterns[0])) is None


@given(inputs=st.integers(1, 200))
def test_a_layer_takes_the_freest_pattern_that_its_width_allows(inputs: int) -> None:
    choice = parse_choice("50%")
    assert isinstance(choice, Alternatives)
    widths = [of for of in (32, 16, 8, 4) if inputs % of == 0]
    reason = reason_unfit(choice, 8, inputs)
    if widths:
        assert (pattern_for(choice, inputs).of, reason) == (widths[0], None)
    else:
        assert reason == f"{inputs} input channels are not a multiple of 32 or 16 or 8 or 4"
    assert patterns_in(choice)[-1] == NM(2, 4)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4:8v71", "pattern 4:8v71: only 70 patterns of 4:8 exist, so this vocabulary restricts nothing; give 4:8"),
        ("50%x0", "pattern '50%x0': the number of rows that share a pattern is at least 1"),
        ("50%v8", "pattern '50%v8' is no density: give a share of the weights to keep, such as 50%, or 50%x4"),
        ("50%%", "pattern '50%%' is no density"),
        ("١%", "pattern '١%' is no density"),
    ],
)
def test_what_is_nearly_a_pattern_is_refused_in_its_own_words(text: str, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_choice(text)
    assert found in str(caught.value)
