"""The order in which engines are called: no engine may be slower because of its place in the round."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from mpcompile.measure import timing
from mpcompile.measure.timing import sample, speedup


class SharedCore:
    """A clock on which another process takes the core for `pause_ms` after every `slice_ms` of our own work."""

    def __init__(self, slice_ms: float, pause_ms: float) -> None:
        self.slice_ms, self.pause_ms, self.worked_ms, self.now_ms = slice_ms, pause_ms, 0.0, 0.0
        self.called: list[str] = []

    def call(self, name: str, cost_ms: float) -> None:
        self.called.append(name)
        before = self.worked_ms // self.slice_ms
        self.worked_ms += cost_ms
        self.now_ms += cost_ms + self.pause_ms * (self.worked_ms // self.slice_ms - before)

    @property
    def time(self) -> SimpleNamespace:
        return SimpleNamespace(perf_counter=lambda: self.now_ms / 1e3, perf_counter_ns=lambda: round(1e6 * self.now_ms))


COSTS_MS = {"dense": 2.4, "compressed": 1.4, "one": 1.4, "other": 1.4, "static": 1.4}


def sampled(costs_ms: dict[str, float], slice_ms: float) -> tuple[SharedCore, dict[str, np.ndarray]]:
    core = SharedCore(slice_ms, 3.0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timing, "time", core.time)
        samples = sample({name: partial(core.call, name, cost) for name, cost in costs_ms.items()}, 60.0)
    core.called = core.called[timing.WARM_UP * len(costs_ms) :]
    return core, samples


@pytest.mark.parametrize("slice_ms", [3.2, 4.0, 5.3, 8.0])
def test_engines_of_equal_cost_have_equal_speed_on_a_shared_core(slice_ms: float) -> None:
    """In a fixed order the same engines are interrupted in each round, and equal engines had ratios of 1.2 and 3.9."""
    _, samples = sampled(COSTS_MS, slice_ms)
    ratios = [speedup(samples["dense"], samples[name], "dense").ratio for name in COSTS_MS if name != "dense"]
    assert max(ratios) / min(ratios) < 1.35, ratios


def test_each_engine_takes_every_place_in_a_round_and_rounds_are_reversed_in_pairs() -> None:
    core, samples = sampled(COSTS_MS, 4.0)
    count = len(COSTS_MS)
    rounds = [core.called[start : start + count] for start in range(0, len(core.called), count)]
    assert len(rounds) == len(samples["dense"])
    assert all(sorted(order) == sorted(COSTS_MS) for order in rounds)
    assert all(second == first[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=False))
    for place in range(count):
        assert {order[place] for order in rounds} == set(COSTS_MS)


def test_two_engines_take_turns() -> None:
    core, _ = sampled({"dense": 2.0, "compressed": 1.0}, 4.0)
    assert core.called[:8] == ["dense", "compressed", "compressed", "dense"] * 2
