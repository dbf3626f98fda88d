"""Latency of several engines, measured in interleaved rounds: a Timing of each engine and the Speedup between two.

In each round every engine is called once, and the order is reversed from round to round, so that clock drift and other
load slow all engines equally. With more than two engines the order is drawn anew for each pair of rounds: in a fixed
order an engine keeps its neighbours, and a load with the period of a round slows the same engines each time. A speedup
is the median of the ratios within rounds: on a shared machine a ratio within one run is reliable where a single time is
not. Confidence intervals come from a block bootstrap, because neighbouring rounds are correlated; the block length
follows from that correlation. If a run holds few blocks, the interval is widened by the ratio of Student's t to the
normal quantile.

A difference is significant only if the whole interval lies outside 1 ± INDISTINCT: memory layout alone makes two builds
of the same computation differ by a few per cent. So there are three conclusions, and each sentence states its own: the
difference is significant, the interval includes 1, or the interval excludes 1 and overlaps 1 ± INDISTINCT.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

WARM_UP = 3  # calls of each engine before the first round
ROUNDS = (15, 200)  # least and most
RESAMPLES = 2000  # of the bootstrap
INDISTINCT = 0.03  # largest relative difference that is never significant
NORMAL = 1.96  # the 97.5 % quantile of the normal distribution

Call = Callable[[], object]
Conclusion = Literal["faster", "slower", "interval includes 1", "interval overlaps the 3 % band"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Latency of one engine in milliseconds per call: percentiles, and the 95 % confidence interval of the median."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    count: int  # calls
    batch: int
    interval_ms: tuple[float, float]
    device: str

    @property
    def images_per_second(self) -> float:
        """Throughput at the median latency."""
        return 1000 * self.batch / self.p50_ms


@dataclass(frozen=True, slots=True)
class Speedup:
    """The median ratio of baseline time to engine time, above 1 if the engine is faster than the baseline."""

    ratio: float
    interval: tuple[float, float]  # 95 % confidence
    count: int  # rounds
    baseline: str
    conclusion: Conclusion = "interval includes 1"  # always derived from `interval`; a given value is replaced

    def __post_init__(self) -> None:
        """Derives `conclusion` from `interval`."""
        object.__setattr__(self, "conclusion", conclusion_from(self.interval))

    @property
    def significant(self) -> bool:
        """Whether the whole interval lies outside 1 ± INDISTINCT."""
        return self.conclusion in ("faster", "slower")

    @property
    def told(self) -> bool:
        """The name of `significant` in version 0.1."""
        warnings.warn("told is now called significant; the next release removes told", DeprecationWarning, stacklevel=2)
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
        """The ratio and its interval: `1.32 (1.28–1.37)`."""
        return f"{self.ratio:.2f} ({self.interval[0]:.2f}–{self.interval[1]:.2f})"

    def describe(self, baseline: str) -> str:
        """The comparison with a baseline of this name as part of a sentence, with interval and number of rounds.

        Unless the conclusion is that the interval includes 1, the subject is the engine, which the caller names.
        """
        interval = f"interval {self.interval[0]:.2f} to {self.interval[1]:.2f}, {self.count} rounds"
        if self.conclusion == "interval includes 1":
            return f"no significant difference from {baseline} was measured ({interval})"
        text = f"{self.ratio:.2f} times as fast as {baseline} ({interval})"
        if self.significant:
            return text
        return (
            f"{text}, which is not significant: the interval excludes 1 but overlaps 1 ± {100 * INDISTINCT:g} %, "
            "and memory layout alone can cause such a difference"
        )

    def remark(self) -> str:
        """What to write behind the ratio and its interval if the difference is not significant; otherwise empty."""
        if self.significant:
            return ""
        if self.conclusion == "interval includes 1":
            return ", no significant difference"
        return f", not significant: overlaps 1 ± {100 * INDISTINCT:g} %"


def conclusion_from(interval: tuple[float, float]) -> Conclusion:
    """The conclusion that the 95 % interval of a ratio allows.

    Whether it includes 1 is decided by its ends as they are shown, with 2 decimals: `0.99 to 1.00` includes 1.
    """
    low, high = interval
    if low > 1 + INDISTINCT:
        return "faster"
    if high < 1 - INDISTINCT:
        return "slower"
    return "interval includes 1" if round(low, 2) <= 1 <= round(high, 2) else "interval overlaps the 3 % band"


def sample(
    calls: Mapping[str, Call], seconds: float, watch: Callable[[], None] = lambda: None
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds per call of each engine, one value per round (rounds,).

    Args:
        calls: engine name -> a function that runs the engine once and returns when it is done.
        seconds: time for all rounds; at least ROUNDS[0] and at most ROUNDS[1] rounds are measured.
        watch: called after warm-up and again after the last round, while a GPU still has its clock under load.
    """
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    watch()
    rounds: list[dict[str, float]] = []
    rng = np.random.default_rng(0)
    order = list(calls)
    end = time.perf_counter() + seconds
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.perf_counter() < end):
        if len(rounds) % 2:
            order = order[::-1]
        else:
            order = list(calls) if len(calls) <= 2 else rng.permutation(list(calls)).tolist()
        times_ms = {}
        for name in order:
            started = time.perf_counter_ns()
            calls[name]()
            times_ms[name] = (time.perf_counter_ns() - started) / 1e6
        rounds.append(times_ms)
    watch()
    return {name: np.array([times_ms[name] for times_ms in rounds]) for name in calls}


def timing(samples_ms: NDArray[np.float64], batch: int, device: str) -> Timing:
    """The Timing of one engine from its samples (rounds,), in milliseconds per call of `batch` images."""
    p50, p90, p99 = np.percentile(samples_ms, (50, 90, 99)).tolist()
    return Timing(p50, p90, p99, len(samples_ms), batch, median_interval(samples_ms), device)


def speedup(baseline_ms: NDArray[np.float64], samples_ms: NDArray[np.float64], baseline: str) -> Speedup:
    """The Speedup of an engine: the median over rounds of baseline time / engine time.

    Both arrays (rounds,) are milliseconds per call of the same rounds. `baseline` is the name of the baseline.
    """
    ratios = baseline_ms / samples_ms
    return Speedup(float(np.median(ratios)), median_interval(ratios), len(ratios), baseline)


def median_interval(samples: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The 95 % confidence interval of the median of samples (rounds,) by a circular block bootstrap.

    It is widened by Student's t for the number of blocks, and clipped to the range of the samples.
    """
    from scipy.stats import t as student

    rng = np.random.default_rng(seed)
    count = len(samples)
    length = _block_length(samples)
    blocks = -(-count // length)
    starts = rng.integers(0, count, (RESAMPLES, blocks))
    indices = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :count] % count
    ends = np.percentile(np.median(samples[indices], axis=1), (2.5, 97.5))
    median = float(np.median(samples))
    factor = float(student.ppf(0.975, max(blocks - 1, 1)) / NORMAL)
    low, high = (median + factor * (ends - median)).tolist()
    return max(low, float(samples.min())), min(high, float(samples.max()))


def _block_length(samples: NDArray[np.float64]) -> int:
    """The larger of n^(1/3) and (1 + ρ) / (1 − ρ), in rounds; at most n / 4. ρ is the lag-1 rank autocorrelation.

    Ranks are used because a single stall would hide the correlation of the other rounds.
    """
    count = len(samples)
    ranks = np.argsort(np.argsort(samples)).astype(np.float64)
    ranks -= ranks.mean()
    power = float(ranks @ ranks)
    rho = min(max(float(ranks[1:] @ ranks[:-1]) / power, 0.0), 0.9) if power else 0.0
    length: float = max(count ** (1 / 3), (1 + rho) / (1 - rho))
    return max(1, min(round(length), count // 4))
