"""What ranks agree on before and after passes, without other processes."""

from collections.abc import Iterator

import pytest

from mpcompile.errors import UsageError
from mpcompile.ir.model import Model
from mpcompile.passes import MPBudget, NMMask, Quantize
from mpcompile.pipeline import ranks
from mpcompile.pipeline.fingerprint import model_key
from mpcompile.pipeline.ranks import begin_together, run_by_ranks, sent, shares_work
from mpcompile.system import distributed
from mpcompile.system.distributed import ProcessRank, all_gathered, broadcast, share, shared_map, together
from mpcompile.testing import tiny_data, tiny_mlp, tiny_vit


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """This process is rank 1 of 2; the list has what rank 0 broadcasts, in order."""
    said: list[object] = []
    monkeypatch.setattr(distributed, "process_rank", lambda: ProcessRank(1, 2))
    monkeypatch.setattr(ranks, "broadcast", lambda value: said.pop(0))
    yield said
    assert not said


def test_alone_nothing_is_shared() -> None:
    with together():
        assert share() == ProcessRank(0, 1)
        assert broadcast([1]) == [1]
        assert all_gathered("a") == ["a"]
        assert shared_map(lambda item: item * 2, [1, 2, 3]) == [2, 4, 6]


def test_work_is_shared_only_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "process_rank", lambda: ProcessRank(1, 2))
    assert share() == ProcessRank(0, 1)
    with together():
        assert share() == ProcessRank(1, 2)
        with together(False):
            assert share() == ProcessRank(0, 1)
        assert share() == ProcessRank(1, 2)


def test_results_are_in_the_order_of_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(7))
    for size in (2, 3, 4):
        parts = [[10 * item for item in items[rank::size]] for rank in range(size)]
        for rank in range(size):
            monkeypatch.setattr(distributed, "process_rank", lambda rank=rank, size=size: ProcessRank(rank, size))
            monkeypatch.setattr(distributed, "all_gathered", lambda own, parts=parts: parts)
            with together():
                assert shared_map(lambda item: 10 * item, items) == [10 * item for item in items]


def test_passes_say_whether_they_share_their_work() -> None:
    assert shares_work(NMMask())
    assert shares_work(MPBudget())
    assert not shares_work(Quantize())
    assert not shares_work(object())


@pytest.mark.parametrize("what", ["model", "images"])
def test_a_rank_with_other_files_says_so(second_rank: list[object], what: str) -> None:
    model = tiny_mlp()
    data = tiny_data(model)
    other = {"model": model_key(model), "images": "another hash"}
    if what == "model":
        other = {**other, "model": "another hash"}
    second_rank.append(other)
    with pytest.raises(UsageError, match=f"the {what} of this rank differs from rank 0's"):
        begin_together(model, data)


def test_the_other_ranks_end_where_rank_0_has_nothing_to_do(second_rank: list[object]) -> None:
    model = tiny_mlp()
    second_rank.append({})
    assert not begin_together(model, tiny_data(model))


def test_rank_0s_model_counts_where_hashes_differ(second_rank: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny_vit(), tiny_vit()
    for parameter in other.graph.parameters():
        parameter.data += 1
    monkeypatch.setattr(ranks, "all_gathered", lambda own: ["hash of rank 0", own])
    monkeypatch.setattr(ranks, "sent", lambda result: other)
    with together():
        assert run_by_ranks(NMMask(), lambda: model, model) is other
        monkeypatch.setattr(ranks, "all_gathered", lambda own: [own, own])
        assert run_by_ranks(NMMask(), lambda: model, model) is model


def test_a_pass_that_does_not_share_is_run_by_rank_0_alone(
    second_rank: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, theirs = tiny_mlp(), tiny_mlp()

    def run() -> Model:
        raise AssertionError("another rank ran it")

    monkeypatch.setattr(ranks, "sent", lambda result: theirs)
    with together():
        assert run_by_ranks(Quantize(), run, model) is theirs


def test_a_model_alone_is_sent_as_it_is() -> None:
    model = tiny_mlp()
    assert sent(model) is model
