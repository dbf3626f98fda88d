"""Distillation that is stopped and resumed, and distillation in several processes: the same weights."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import no_type_check

import pytest
import torch
from distill_runs import MASKS, QUICK, assert_same_weights, run, weights
from failing_images import Failing
from safetensors.torch import load_file
from torch import Tensor

from mpcompile.data.images import Data, Split
from mpcompile.driver.artifact import Artifact
from mpcompile.errors import PassError, UsageError
from mpcompile.passes import ToMe
from mpcompile.passes.distill.distill import OPTIMIZERS
from mpcompile.pipeline.partial_results import keeping
from mpcompile.system.distributed import ProcessRank, broadcast, process_group, process_rank
from mpcompile.testing import tiny_source, tiny_vit

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def of_noise(most: int = 1 << 30, labels: int = 10) -> Data:
    images = Failing((1, 8, 8), 64, classes=labels, most=most)
    return Data(training=Split(images, tuple(range(64)), labelled=True))


NAMING = 128  # images that are read to name a run: pixels and labels of 64


KEPT = dataclasses.replace(QUICK, minutes=0.0, kept_l2=1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_goes_on_to_the_same_weights(optimizer: str, tmp_path: Path) -> None:
    step = dataclasses.replace(KEPT, optimizer=optimizer)
    undisturbed = run(tiny_vit(), MASKS, step, data=of_noise())
    # 80 images are the first epoch and a step of the second.
    with pytest.raises(PassError), keeping(tmp_path):
        run(tiny_vit(), MASKS, step, data=of_noise(most=NAMING + 80 + 5))
    assert list(tmp_path.glob("run-*/training.safetensors"))
    resumed_from = of_noise()
    with keeping(tmp_path):
        resumed = run(tiny_vit(), MASKS, step, data=resumed_from)
    assert len(resumed_from.training.images.reads) == NAMING + 128 - 80  # type: ignore[attr-defined]
    assert_same_weights(weights(undisturbed), weights(resumed))
    assert resumed.epochs == undisturbed.epochs


def test_another_training_does_not_go_on_from_it(tmp_path: Path) -> None:
    for wanted, passes in enumerate(
        [(MASKS, KEPT), (MASKS, ToMe(r=2), KEPT), (MASKS, ToMe(r=4), KEPT), (MASKS, dataclasses.replace(KEPT, tau=3.0))]
    ):
        with pytest.raises(PassError), keeping(tmp_path):
            run(tiny_vit(), *passes, data=of_noise(most=NAMING + 40))
        assert len(list(tmp_path.glob("run-*"))) == wanted + 1
    with pytest.raises(PassError), keeping(tmp_path):
        run(tiny_vit(), MASKS, KEPT, data=of_noise(most=NAMING + 40, labels=3))
    assert len(list(tmp_path.glob("run-*"))) == 5
    with pytest.raises(PassError), keeping(tmp_path):  # how often a checkpoint is kept changes nothing
        run(tiny_vit(), MASKS, dataclasses.replace(KEPT, minutes=1e-9), data=of_noise(most=NAMING + 10))
    assert len(list(tmp_path.glob("run-*"))) == 5


def test_tied_weights_are_kept(tmp_path: Path) -> None:
    from mpcompile.frontend.capture import capture
    from mpcompile.testing import TinyMLP

    class Tied(TinyMLP):
        def __init__(self) -> None:
            super().__init__()
            self.twin = torch.nn.Linear(32, 32)
            self.twin.weight = self.hidden.weight

        @no_type_check
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.twin(self.hidden(self.stem(x.flatten(1)))))

    with keeping(tmp_path):
        run(capture(Tied(), tiny_source()), MASKS, KEPT)


Files = tuple[Path, Path]


def command(files: Files, folder: Path, output: str) -> list[str]:
    """The words after `mpcompile` that distil the tiny ViT."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "passes:\n"
        "  - nm-mask: {pattern: 2:4, criterion: magnitude, refit: none}\n"
        "  - tome: {r: 2}\n"
        "  - distill: {batch: 32, optimizer: sgd, rate: 1.0e-3, warmup: 4, minutes: 0, scale: 0.8, "
        f"epochs: {EPOCHS}}}\n"
        "target: eager\n"
        "bench: {batches: [1], seconds: 0.05}\n",
        encoding="utf-8",
    )
    model, images = map(str, files)
    return [model, "--config", str(recipe), "--data", images, "-o", str(folder / output), "-q"]


EPOCHS = 6  # 24 steps with a checkpoint each


@pytest.fixture(scope="module")
def undisturbed(tiny_files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights that one process writes which nobody stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run([sys.executable, "-m", "mpcompile", *command(tiny_files, folder, "one")], check=True, env=ONE_THREAD)
    return load_file(folder / "one" / "model.safetensors")


@pytest.mark.slow  # tests/test_resume.py kills a run within distill, too
def test_a_killed_command_goes_on_to_the_same_weights(
    tmp_path: Path, tiny_files: Files, undisturbed: dict[str, Tensor]
) -> None:
    words = command(tiny_files, tmp_path, "killed")
    moment = json.dumps({"signal": signal.SIGKILL, "after": "part", "count": 10})
    dying = [sys.executable, "-m", "tests.dying_run", moment, *words]
    died = subprocess.run(dying, check=False, env=ONE_THREAD, cwd=Path(__file__).parents[3])
    assert died.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".killed.work/run-*/training.safetensors"))
    assert not (tmp_path / "killed").exists()
    subprocess.run([sys.executable, "-m", "mpcompile", *words], check=True, env=ONE_THREAD)
    assert_same_weights(undisturbed, load_file(tmp_path / "killed" / "model.safetensors"))
    assert len(Artifact.open(tmp_path / "killed").verify()) == 8
    assert not (tmp_path / ".killed.work").exists()


def test_alone_there_is_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_rank() == ProcessRank(0, 1)
    assert broadcast({"a": 1}) == {"a": 1}
    with process_group() as here:
        assert here.first
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(UsageError, match="WORLD_SIZE is 2, and RANK, .* are not set; start it with torchrun"),
        process_group(),
    ):
        pass


def test_a_batch_has_to_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcompile.passes.distill.distill.process_rank", lambda: ProcessRank(0, 3))
    with pytest.raises(PassError, match="a batch of 16 cannot be divided among 3 processes"):
        run(tiny_vit(), MASKS, ToMe(r=2), QUICK)
