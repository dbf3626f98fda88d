"""The laws that masks of every kind of pattern obey: own positions, shared rows, a vocabulary."""

import itertools
import math
from dataclasses import dataclass
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import grouped, pattern_violation, ungrouped
from mpcompile.passes.nm_mask.criteria.covariance import covariance_mask, removal_cost
from mpcompile.passes.nm_mask.criteria.joint import joint_mask
from mpcompile.passes.nm_mask.criteria.wanda import wanda_mask
from mpcompile.passes.nm_mask.criterion import MaskProblem
from mpcompile.passes.nm_mask.selection import largest, nm_mask, projection
from mpcompile.passes.nm_mask.vocabulary import all_patterns, vocabularies

TEXTS = ("2:4", "4:8", "8:16", "1:4", "3:8", "2:4x2", "4:8x4", "2:4v2", "4:8v1", "4:8v3", "4:8v8", "3:8v4", "4:8v70")
VOCABULARIES = tuple(text for text in TEXTS if "v" in text)
ROWS, COLUMNS = 8, 32
# Each goes from free to constrained, at one density.
CHAINS = (("16:32", "8:16", "4:8", "2:4", "2:4x2", "2:4x4"), ("8:32", "4:16", "2:8", "1:4", "1:4x2", "1:4x4"))


@dataclass(frozen=True)
class Case:
    """Scores of a layer, and a pattern."""

    pattern: NM
    score: Tensor


@st.composite
def cases(draw: st.DrawFn, texts: tuple[str, ...] = TEXTS, ties: bool = False) -> Case:
    """A pattern with scores of a Linear or a convolution. With `ties`, small integers, so that many are equal."""
    pattern = NM.parse(draw(st.sampled_from(texts)))
    taps = draw(st.sampled_from([(), (1, 1), (3, 1)]))
    rows = draw(st.sampled_from([4, ROWS, 12]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (rows, COLUMNS, *taps)
    if ties:
        return Case(pattern, torch.randint(0, draw(st.integers(1, 4)), shape, generator=random).float())
    return Case(pattern, torch.randn(shape, generator=random).square())


def kept(score: Tensor, text: str | NM) -> float:
    """Returns the score that the mask of a pattern keeps."""
    pattern = text if isinstance(text, NM) else NM.parse(text)
    return float(score.double()[nm_mask(score, pattern)].sum())


@given(cases(ties=True) | cases())
def test_every_group_keeps_exactly_n_and_the_mask_follows_its_pattern(case: Case) -> None:
    mask = nm_mask(case.score, case.pattern)
    assert (grouped(mask, case.pattern.of).sum(-1) == case.pattern.keep).all()
    assert pattern_violation(mask, case.pattern) is None
    assert pattern_violation(mask, case.pattern.plain) is None


@given(cases(ties=True) | cases())
def test_selection_is_idempotent(case: Case) -> None:
    mask = nm_mask(case.score, case.pattern)
    assert torch.equal(nm_mask(mask.float(), case.pattern), mask)
    assert torch.equal(nm_mask(case.score * mask + mask, case.pattern), mask)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(case: Case, random: Random) -> None:
    blocks = list(range(len(case.score) // case.pattern.rows))
    random.shuffle(blocks)  # rows that share a pattern stay together
    rows = torch.arange(len(case.score)).reshape(-1, case.pattern.rows)[blocks].flatten()
    assert torch.equal(nm_mask(case.score[rows], case.pattern), nm_mask(case.score, case.pattern)[rows])


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_channels_in_a_group_and_of_groups_does_not_matter(case: Case, random: Random) -> None:
    of = case.pattern.of
    groups = [random.sample(range(g, g + of), of) for g in range(0, COLUMNS, of)]
    random.shuffle(groups)
    order = torch.tensor(groups).flatten()
    assert torch.equal(nm_mask(case.score[:, order], case.pattern), nm_mask(case.score, case.pattern)[:, order])


@given(cases(), st.floats(0.01, 100))
def test_the_scale_of_scores_does_not_matter(case: Case, factor: float) -> None:
    scaled = case.score * 2 ** round(math.log2(factor))  # a power of two, which is exact
    assert torch.equal(nm_mask(scaled, case.pattern), nm_mask(case.score, case.pattern))


@given(cases(ties=True) | cases(), st.sampled_from(CHAINS))
def test_a_freer_pattern_keeps_at_least_as_much(case: Case, chain: tuple[str, ...]) -> None:
    powers = [kept(case.score, text) for text in chain]
    assert all(free >= bound * (1 - 1e-9) for free, bound in itertools.pairwise(powers))


@given(cases(ties=True) | cases(), st.sampled_from(["4:8", "2:8"]), st.integers(1, 16))
def test_a_vocabulary_lies_between_own_positions_and_one_pattern_for_all(case: Case, own: str, words: int) -> None:
    free, between, shared = (kept(case.score, text) for text in (own, f"{own}v{words}", f"{own}x{len(case.score)}"))
    assert free * (1 + 1e-6) >= between >= shared * (1 - 1e-6)


@given(cases(), st.integers(0, 3), st.integers(0, COLUMNS - 1))
def test_an_infinite_score_is_kept_and_spoils_no_other_row(case: Case, row: int, column: int) -> None:
    score = case.score.clone()
    score[row, column] = torch.inf
    mask = nm_mask(score, case.pattern)
    assert mask[row, column].all()
    assert pattern_violation(mask, case.pattern) is None
    start = column - column % case.pattern.of
    others = [c for c in range(COLUMNS) if not start <= c < start + case.pattern.of]
    assert torch.equal(mask[:, others], nm_mask(case.score, case.pattern)[:, others])


@given(cases(("4:8v1", "3:8v1", "2:4v1"), ties=True) | cases(("4:8v1", "3:8v1", "2:4v1")))
def test_one_pattern_for_all_is_what_all_rows_share(case: Case) -> None:
    shared = NM(case.pattern.keep, case.pattern.of, len(case.score))
    assert kept(case.score, case.pattern) == pytest.approx(kept(case.score, shared), rel=1e-6)


@given(cases(VOCABULARIES, ties=True) | cases(VOCABULARIES))
def test_a_vocabulary_keeps_the_guaranteed_share_of_shared_rows(case: Case) -> None:
    """Rows that share in P blocks use P patterns at most; the greedy choice keeps 1 − 1/e of the best P."""
    words = case.pattern.vocabulary
    if len(case.score) % words == 0:
        shared = NM(case.pattern.keep, case.pattern.of, len(case.score) // words)
        assert kept(case.score, case.pattern) >= (1 - 1 / math.e) * kept(case.score, shared) * (1 - 1e-6)


@given(cases(("4:8v8", "3:8v8", "2:4v6"), ties=True) | cases(("4:8v8", "3:8v8", "2:4v6")))
def test_a_vocabulary_as_large_as_the_rows_need_loses_nothing(case: Case) -> None:
    score = case.score[:8] if case.pattern.of == 8 else case.score  # C(4, 2) = 6
    assert torch.equal(nm_mask(score, case.pattern), nm_mask(score, case.pattern.plain))


@given(cases(("2:4v2", "2:4v3", "1:4v2"), ties=True) | cases(("2:4v2", "2:4v3", "1:4v2")))
def test_exchanges_come_near_the_best_vocabulary(case: Case) -> None:
    """Against all vocabularies of one block; the greedy choice alone is worse in some of them."""
    score, every = grouped(case.score, 4)[:, 0], all_patterns(case.pattern.keep, 4)
    gain = score @ every.T.float()
    sets = torch.combinations(torch.arange(len(every)), case.pattern.vocabulary)
    best = float(gain[:, sets].amax(-1).sum(0).max())
    assert best * (1 + 1e-6) >= kept(score, case.pattern) >= 0.9 * best


@given(cases())
def test_a_projection_holds_its_vocabulary(case: Case) -> None:
    project = projection(case.pattern)
    first = project(case.score)
    assert torch.equal(first, nm_mask(case.score, case.pattern))
    later = project(case.score.flip(0))
    assert pattern_violation(later, case.pattern) is None
    if case.pattern.vocabulary:
        union = torch.cat([first, later])
        assert pattern_violation(union, case.pattern) is None
    else:
        assert torch.equal(later, nm_mask(case.score.flip(0), case.pattern))


@given(cases(VOCABULARIES))
def test_more_patterns_than_the_vocabulary_are_found(case: Case) -> None:
    """A mask with one row changed to a pattern that the block does not have is refused."""
    pattern = case.pattern
    every = all_patterns(pattern.keep, pattern.of)
    if pattern.vocabulary >= min(len(every), len(case.score)):
        return
    random = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: pattern.vocabulary + 1]
    groups = grouped(nm_mask(case.score, pattern), pattern.of).clone()
    groups[: len(random), 0] = every[random]
    found = pattern_violation(ungrouped(groups, case.score.shape), pattern)
    blocks = groups.shape[1]
    most = f"have more than {pattern.vocabulary} patterns (up to "
    assert str(found).startswith(f"1 of {blocks} blocks of {pattern.of} input channels {most}")


def problem(text: str, prior: float = 0.0) -> MaskProblem:
    """Returns the problem of a layer with correlated inputs."""
    random = torch.Generator().manual_seed(5)
    inputs = (
        torch.randn(200, COLUMNS, generator=random).double() @ torch.randn(COLUMNS, COLUMNS, generator=random).double()
    )
    weight = torch.randn(24, COLUMNS, generator=random)
    return MaskProblem(weight, weight.double(), (inputs.T @ inputs / 200)[None], NM.parse(text), prior)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("select", [wanda_mask, covariance_mask, joint_mask])
def test_every_criterion_follows_every_kind(text: str, select: object) -> None:
    own = problem(text)
    mask = select(own)  # type: ignore[operator]
    assert pattern_violation(mask, own.pattern) is None
    assert (grouped(mask, own.pattern.of).sum(-1) == own.pattern.keep).all()


@pytest.mark.parametrize("text", VOCABULARIES)
def test_reassignment_lowers_the_cost_within_the_vocabulary(text: str) -> None:
    own = problem(text)
    start, found = wanda_mask(own), covariance_mask(own)
    before, after = (float(removal_cost(own.best, own.gram, mask, own.pattern)) for mask in (start, found))
    assert after <= before * (1 + 1e-9)
    words = vocabularies(own.best.square() * own.input_power(), own.pattern)
    groups = grouped(found, own.pattern.of).transpose(0, 1)  # blocks, rows, M
    assert (groups[:, :, None] == words[:, None]).all(-1).any(-1).all()
    strong = covariance_mask(problem(text, prior=1e6))  # the prior alone decides
    source = largest(own.weight, own.prior_density)
    assert int((strong != source).sum()) <= int((found != source).sum())
