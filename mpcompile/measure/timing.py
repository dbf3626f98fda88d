"""Latency of several engines side by side: interleaved rounds -> a Timing each, and the speedup between two.

Engines take turns, and the order of the turn is reversed every round, so that a machine that drifts or is shared
slows all of them alike. A speedup is the median of the ratios round by round; a single time on such a machine means
little, a ratio within one run means something. Intervals are bootstrapped in blocks of neighbouring rounds, since what
disturbs one round disturbs the next: the blocks are as long as the rounds are correlated, and where few of them fit
into a run the interval is widened as Student's t says.

A difference is told only where the whole interval is past INDISTINCT: two builds of one computation differ by a few per
cent from memory layout alone.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WARM_UP = 3
ROUNDS = (15, 200)
RESAMPLES = 2000
INDISTINCT = 0.03
NORMAL = 1.96  # half the width of a 95 % interval, in deviations

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds a call: percentiles, the number of calls, and a 95 % interval of the median."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    count: int
    batch: int
    interval_ms: tuple[float, float]
    device: str

    @property
    def images_per_second(self) -> float:
        """Throughput at the median."""
        return 1000 * self.batch / self.p50_ms


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times as fast as the baseline: the median ratio, its 95 % interval, and the number of rounds."""

    ratio: float
    interval: tuple[float, float]
    count: int
    baseline: str

    @property
    def significant(self) -> bool:
        """Whether the interval supports a difference."""
        return self.interval[0] > 1 + INDISTINCT or self.interval[1] < 1 - INDISTINCT

    @property
    def told(self) -> bool:
        """The name of `significant` in version 0.1."""
        warnings.warn("told is now called significant; it goes with the next release", DeprecationWarning, stacklevel=2)
        return self.significant

    @property
    def faster(self) -> bool:
        """Whether the whole interval lies above 1."""
        return self.interval[0] > 1

    @property
    def undecided(self) -> bool:
        """Whether the interval includes 1."""
        return self.interval[0] <= 1 <= self.interval[1]

    def with_interval(self) -> str:
        """The ratio and its interval in figures."""
        return f"{self.ratio:.2f} ({self.interval[0]:.2f}–{self.interval[1]:.2f})"

    def describe(self, baseline: str) -> str:
        """The comparison in words, with its interval."""
        interval = f"interval {self.interval[0]:.2f} to {self.interval[1]:.2f}, {self.count} rounds"
        if not self.significant:
            return f"no difference from {baseline} can be told from noise ({interval})"
        return f"{self.ratio:.2f} times as fast as {baseline} ({interval})"


def sample(
    calls: Mapping[str, Call], seconds: float, watch: Callable[[], None] = lambda: None
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each call, round by round; ROUNDS bounds how many, whatever the time allowed.

    `watch` is called once when all are warm, and once at the end, while a GPU is still at work's clock.
    """
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    watch()
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.perf_counter() < end):
        order = list(calls)[:: -1 if len(rounds) % 2 else 1]
        turn = {}
        for name in order:
            started = time.perf_counter_ns()
            calls[name]()
            turn[name] = (time.perf_counter_ns() - started) / 1e6
        rounds.append(turn)
    watch()
    return {name: np.array([turn[name] for turn in rounds]) for name in calls}


def timing(samples_ms: NDArray[np.float64], batch: int, device: str) -> Timing:
    """The summary of one engine's samples."""
    p50, p90, p99 = np.percentile(samples_ms, (50, 90, 99)).tolist()
    return Timing(p50, p90, p99, len(samples_ms), batch, median_interval(samples_ms), device)


def speedup(baseline_ms: NDArray[np.float64], samples_ms: NDArray[np.float64], baseline: str) -> Speedup:
    """Baseline time over time, round by round: above 1 is faster than the baseline."""
    ratios = baseline_ms / samples_ms
    return Speedup(float(np.median(ratios)), median_interval(ratios), len(ratios), baseline)


def median_interval(samples: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the median, by a circular block bootstrap, widened for few blocks."""
    from scipy.stats import t as student

    rng = np.random.default_rng(seed)
    count = len(samples)
    length = _block_length(samples)
    blocks = -(-count // length)
    starts = rng.integers(0, count, (RESAMPLES, blocks))
    places = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :count] % count
    ends = np.percentile(np.median(samples[places], axis=1), (2.5, 97.5))
    middle = float(np.median(samples))
    wider = float(student.ppf(0.975, max(blocks - 1, 1)) / NORMAL)
    low, high = (middle + wider * (ends - middle)).tolist()
    return max(low, float(samples.min())), min(high, float(samples.max()))


def _block_length(samples: NDArray[np.float64]) -> int:
    """n^(1/3), or as many rounds as one has in common with its neighbours: (1 + ρ) / (1 − ρ), ρ between ranks.

    Ranks, since a single stall would hide the correlation of all others; at most a quarter of the rounds.
    """
    count = len(samples)
    ranks = np.argsort(np.argsort(samples)).astype(np.float64)
    ranks -= ranks.mean()
    power = float(ranks @ ranks)
    rho = min(max(float(ranks[1:] @ ranks[:-1]) / power, 0.0), 0.9) if power else 0.0
    length: float = max(count ** (1 / 3), (1 + rho) / (1 - rho))
    return max(1, min(round(length), count // 4))
