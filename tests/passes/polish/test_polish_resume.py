"""A polish that is stopped at any moment and resumed ends in the same weights."""

import dataclasses
from pathlib import Path

import pytest
from polish_runs import MASKS, SHORT, images, run, same, weights

from mpcompile.errors import PassError
from mpcompile.passes import Polish
from mpcompile.pipeline.partial_results import keeping
from mpcompile.testing import tiny_vit

NAMING = 128  # images that are read to name a run: pixels and labels of 64
PROBES = 3 * 2 * 8  # images: 2 steps of 8 for each of 3 rates, of the 40 steps


@pytest.fixture(autouse=True)
def _every_step_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcompile.passes.polish.runs.MINUTES_BETWEEN", 0.0)


@pytest.mark.parametrize("read", [0, 8, PROBES - 8, PROBES + 8, PROBES + 100, PROBES + 34 * 8 - 1])
def test_a_stopped_training_goes_on_to_the_same_weights(read: int, tmp_path: Path) -> None:
    undisturbed, first = run(tiny_vit(), MASKS, SHORT)
    with pytest.raises(PassError), keeping(tmp_path):
        run(tiny_vit(), MASKS, SHORT, data=images(most=NAMING + read))
    data = images()
    with keeping(tmp_path):
        resumed, again = run(tiny_vit(), MASKS, SHORT, data=data)
    assert same(weights(undisturbed), weights(resumed))
    assert resumed.polished == undisturbed.polished
    assert again.notes == first.notes
    finished = read - read % 8 if read > PROBES else read // 16 * 16  # a trial that was stopped is repeated
    assert len(data.training.images.reads) == NAMING + PROBES + 34 * 8 - finished  # type: ignore[attr-defined]


def test_the_number_of_steps_is_decided_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = Polish(minutes=1.0, batch=8)
    monkeypatch.setattr("mpcompile.passes.polish.polish.affordable_steps", lambda *given: 40)
    undisturbed, _ = run(tiny_vit(), MASKS, step)
    timing = 4 * 8
    with pytest.raises(PassError), keeping(tmp_path):
        run(tiny_vit(), MASKS, step, data=images(most=NAMING + timing + PROBES + 50))

    def slower(*given: object) -> int:
        raise AssertionError("measured again")

    monkeypatch.setattr("mpcompile.passes.polish.polish.affordable_steps", slower)
    with keeping(tmp_path):
        resumed, _ = run(tiny_vit(), MASKS, step)
    assert same(weights(undisturbed), weights(resumed))
    assert resumed.polished is not None
    assert resumed.polished.steps == 40
    by_steps, _ = run(tiny_vit(), MASKS, dataclasses.replace(step, steps=40))
    assert same(weights(undisturbed), weights(by_steps))


def test_other_validation_images_are_another_training(tmp_path: Path) -> None:
    for count, wanted in ((64, 1), (32, 2), (64, 2)):
        with keeping(tmp_path):
            run(tiny_vit(), MASKS, SHORT, data=images(count=count))
        assert len(list(tmp_path.glob("run-*"))) == wanted
