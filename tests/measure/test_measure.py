"""Timing, accuracy and parity against plain NumPy, and the errors that they raise."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from mpcompile.data.images import Split
from mpcompile.errors import ParityError
from mpcompile.ir.parity import relative_difference, require_parity
from mpcompile.measure.accuracy import accuracy, compare
from mpcompile.measure.changed_answers import ChangedAnswers
from mpcompile.measure.timing import ROUNDS, WARM_UP, Speedup, median_interval, sample, speedup, timing


class ListedImages:
    """Random images with labels, in memory."""

    def __init__(self, count: int, classes: int = 4) -> None:
        rng = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 1, 2, 2, generator=rng)
        self.labels = torch.randint(0, classes, (count,), generator=rng)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])


def test_rounds_are_interleaved_and_their_order_alternates() -> None:
    calls: list[str] = []
    runs = {name: partial(calls.append, name) for name in ("a", "b")}
    samples = sample(runs, seconds=0.0)
    assert {len(values) for values in samples.values()} == {ROUNDS[0]}
    assert calls[2 * WARM_UP :][:8] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert calls.count("a") == calls.count("b") == WARM_UP + ROUNDS[0]


class Clock:
    """A clock that only calls advance. It replaces `time` in mpcompile.measure.timing."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9

    def advance(self, ms: int) -> None:
        """A call that takes `ms` milliseconds."""
        self.now_ns += ms * 1_000_000


def test_a_slower_engine_is_significantly_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("mpcompile.measure.timing.time", clock)
    samples = sample({"fast": partial(clock.advance, 1), "slow": partial(clock.advance, 4)}, seconds=0.1)
    assert {name: set(values) for name, values in samples.items()} == {"fast": {1.0}, "slow": {4.0}}
    assert len(samples["fast"]) == 20  # rounds of 5 ms in 0.1 s
    found = speedup(samples["slow"], samples["fast"], "slow")
    assert found == Speedup(4.0, (4.0, 4.0), 20, "slow")
    assert found.significant
    assert not speedup(samples["slow"], samples["slow"], "slow").significant
    with pytest.warns(DeprecationWarning, match="told is now called significant"):
        assert found.told


@pytest.mark.parametrize(
    ("interval", "conclusion", "sentence", "remark"),
    [
        ((1.04, 1.12), "faster", "1.08 times as fast as dense (interval 1.04 to 1.12, 20 rounds)", ""),
        ((0.80, 0.96), "slower", "0.88 times as fast as dense (interval 0.80 to 0.96, 20 rounds)", ""),
        (
            (0.99, 1.12),
            "interval includes 1",
            "no significant difference from dense was measured (interval 0.99 to 1.12, 20 rounds)",
            ", no significant difference",
        ),
        (
            (0.981, 0.9996),  # shown as 0.98 to 1.00, of which nobody would say that it excludes 1
            "interval includes 1",
            "no significant difference from dense was measured (interval 0.98 to 1.00, 20 rounds)",
            ", no significant difference",
        ),
        (
            (1.01, 1.12),
            "interval overlaps the 3 % band",
            "1.06 times as fast as dense (interval 1.01 to 1.12, 20 rounds), which is not significant: the interval "
            "excludes 1 but overlaps 1 ± 3 %, and memory layout alone can cause such a difference",
            ", not significant: overlaps 1 ± 3 %",
        ),
    ],
)
def test_a_conclusion_agrees_with_its_interval(
    interval: tuple[float, float], conclusion: str, sentence: str, remark: str
) -> None:
    found = Speedup(sum(interval) / 2, interval, 20, "dense")
    assert (found.conclusion, found.describe("dense"), found.remark()) == (conclusion, sentence, remark)
    assert found.significant == (conclusion in ("faster", "slower"))
    read = TypeAdapter(Speedup).validate_json(TypeAdapter(Speedup).dump_json(found))
    assert read == found
    old = {"ratio": 1.5, "interval": [1.4, 1.6], "count": 20, "baseline": "dense"}  # written before `conclusion`
    assert TypeAdapter(Speedup).validate_python(old).conclusion == "faster"


def test_a_timing_has_percentiles_in_milliseconds() -> None:
    values = np.arange(1.0, 101.0)
    found = timing(values, batch=8, device="cpu")
    assert (found.p50_ms, found.count, found.batch) == (50.5, 100, 8)
    assert found.p50_ms < found.p90_ms < found.p99_ms
    assert found.interval_ms[0] < 50.5 < found.interval_ms[1]


def test_intervals_cover_the_median_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(1)
    covered = sum(low <= 0 <= high for low, high in (median_interval(rng.standard_normal(40), s) for s in range(200)))
    # 95 % nominal; 200 draws have a standard deviation of 1.5 points, and the bootstrap is a little narrow at n = 40.
    assert 0.88 <= covered / 200 <= 0.99


def test_accuracy_against_a_count_by_hand() -> None:
    logits = np.array([[0, 1, 2, 3, 4, 5.0], [5, 4, 3, 2, 1, 0], [1, 1, 0, 0, 0, 0]], np.float32)
    found = accuracy(logits, np.array([5, 5, 1]))
    assert (found.top1, found.top5, found.count) == (1 / 3, 2 / 3, 3)  # in the tie, index 0 is first
    assert accuracy(logits[:, :5], np.array([4, 0, 0])).top5 is None


def test_a_comparison_counts_every_image_once() -> None:
    images = ListedImages(150)
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)

    def dense(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), -1) @ weight

    def other(pixels: np.ndarray) -> np.ndarray:
        return dense(pixels) + np.array([0.5, 0, 0, 0], np.float32)

    found = compare(dense, other, Split(images, tuple(range(150)), labelled=True))
    logits = dense(images.pixels.numpy())
    assert found.count == 150
    assert found.dense is not None
    assert found.dense.top1 == float((logits.argmax(1) == images.labels.numpy()).mean())
    assert found.agreement == float((logits.argmax(1) == other(images.pixels.numpy()).argmax(1)).mean())
    # A constant shift of half a logit, to float32 rounding.
    assert found.logit_shift_mean == pytest.approx(0.5, abs=1e-6)
    assert found.logit_shift_max == pytest.approx(0.5, abs=1e-6)
    assert found.logit_range == pytest.approx(float(np.ptp(logits, axis=1).mean()), rel=1e-6)
    sides = [(side(images.pixels.numpy()).argmax(1) == images.labels.numpy()).tolist() for side in (dense, other)]
    turned = [after - before for before, after in zip(*sides, strict=True)]
    assert found.turned is not None
    assert (found.turned.right, found.turned.wrong) == (turned.count(1), turned.count(-1))
    assert found.turned.right + found.turned.wrong > 0


@pytest.mark.parametrize(("right", "wrong"), [(0, 0), (1, 0), (0, 5), (0, 6), (3, 14), (20, 33), (31, 30)])
def test_the_p_value_is_the_binomial_tail(right: int, wrong: int) -> None:
    dense = np.array([False] * right + [True] * wrong + [True, False])
    compressed = np.array([True] * right + [False] * wrong + [True, False])
    found = ChangedAnswers.between(dense, compressed)
    assert (found.right, found.wrong) == (right, wrong)
    tail = sum(math.comb(right + wrong, k) for k in range(min(right, wrong) + 1)) / 2 ** (right + wrong)
    assert found.chance == pytest.approx(min(1, 2 * tail), rel=1e-12)
    assert ("this change is significant" in str(found)) == (found.chance < 0.05)


def test_without_labels_a_comparison_has_agreement_but_no_accuracy() -> None:
    found = compare(
        lambda x: x.reshape(len(x), -1), lambda x: x.reshape(len(x), -1), Split(ListedImages(3), (0, 1, 2), False)
    )
    assert (found.dense, found.compressed, found.agreement) == (None, None, 1.0)


def test_outputs_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ParityError, match="the compressed model returns numbers that are not finite"):
        compare(
            lambda x: x.reshape(len(x), -1),
            lambda x: x.reshape(len(x), -1) * np.float32(np.inf),
            Split(ListedImages(3), (0,), False),
        )


def test_parity_is_relative_to_the_largest_output() -> None:
    expected = np.array([[100.0, -200.0]])
    assert relative_difference(expected, expected + 0.2) == pytest.approx(1e-3)
    assert relative_difference(np.zeros((1, 2)), np.zeros((1, 2))) == 0
    assert relative_difference(expected, np.full((1, 2), np.nan)) == float("inf")
    assert require_parity(expected, expected + 0.2, "fp16", "x") == pytest.approx(1e-3)
    with pytest.raises(
        ParityError, match=r"x: the outputs differ by 1.0e-03 of the largest output; 1e-04 is allowed in fp32"
    ):
        require_parity(expected, expected + 0.2, "fp32", "x")
    with pytest.raises(ParityError, match=r"the outputs have shape \(2, 1\); the expected shape is \(1, 2\)"):
        require_parity(expected, expected.T, "fp32", "x")


def test_the_hash_of_the_images_tells_other_images_and_labels_apart() -> None:
    def hashed(images: ListedImages, order: tuple[int, ...]) -> str | None:
        def run(batch: Any) -> Any:
            return batch.reshape(len(batch), 4)

        return compare(run, run, Split(images, order, labelled=True)).images_sha256

    same, order = ListedImages(150), tuple(range(150))
    found = hashed(same, order)
    assert found is not None
    assert found == hashed(ListedImages(150), order)
    assert found != hashed(same, order[::-1])
    assert found != hashed(same, order[:-1])
    relabelled = ListedImages(150)
    relabelled.labels[149] = (relabelled.labels[149] + 1) % 4
    assert found != hashed(relabelled, order)
    moved = ListedImages(150)
    moved.pixels[149, 0, 0, 0] += 1e-3
    assert found != hashed(moved, order)
