"""Distillation: the objective against float64, masks held, resumed after a kill, and in two processes as in one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import no_type_check

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from mpcompile.data.images import Data, Split
from mpcompile.driver.artifact import Artifact
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.model import Model
from mpcompile.passes import Distill, NMMask, ToMe
from mpcompile.passes.distill.augmentation import Augmentation, Batches, TrainingImages
from mpcompile.passes.distill.distill import OPTIMIZERS, SKIPPED
from mpcompile.passes.distill.loss import ElasticNet, labels_loss, teacher_loss
from mpcompile.passes.distill.trainer import decayed_apart, reached_parameters
from mpcompile.pipeline.partial_results import keeping
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.system.distributed import ProcessRank, broadcast, process_group, process_rank
from mpcompile.testing import Noise, tiny_cnn, tiny_data, tiny_source, tiny_vit

QUICK = Distill(epochs=2, batch=16, rate=1e-3, warmup=2)
MASKS = NMMask(criterion="magnitude", refit="none")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(model: Model, *passes: object, data: Data | None = None) -> Model:
    result, _ = PassManager(passes).run(model, data or tiny_data(model))  # type: ignore[arg-type]
    return result


def weights(model: Model) -> dict[str, Tensor]:
    return dict(model.graph.state_dict())


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- the objective


def test_losses_are_their_formulae() -> None:
    rng = np.random.default_rng(0)
    z, dense = rng.normal(size=(2, 5, 7))
    labels = rng.integers(0, 7, 5)

    def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
        e = np.exp(x - x.max(1, keepdims=True))
        shares: NDArray[np.float64] = e / e.sum(1, keepdims=True)
        return shares

    tau, smoothing = 2.0, 0.1
    p, q = softmax(z / tau), softmax(dense / tau)
    kl = tau**2 * (q * np.log(q / p)).sum(1).mean()
    smoothed = np.full((5, 7), smoothing / 7)
    smoothed[np.arange(5), labels] += 1 - smoothing
    ce = -(smoothed * np.log(softmax(z))).sum(1).mean()
    z_, dense_ = torch.tensor(z, dtype=torch.float32), torch.tensor(dense, dtype=torch.float32)
    # float32 against float64
    assert float(teacher_loss(z_, dense_, tau)) == pytest.approx(kl, rel=1e-5)
    assert float(labels_loss(z_, torch.tensor(labels), smoothing)) == pytest.approx(ce, rel=1e-5)
    assert float(teacher_loss(z_, z_, tau)) == pytest.approx(0, abs=1e-6)


def test_the_elastic_net_tells_kept_from_removed() -> None:
    weight, mask = torch.tensor([[1.0, -2.0], [3.0, -4.0]]), torch.tensor([[True, False], [False, True]])
    assert float(ElasticNet(kept_l1=1.0).of([(weight, mask)])) == 5
    assert float(ElasticNet(removed_l1=1.0).of([(weight, mask)])) == 5
    assert float(ElasticNet(kept_l2=1.0).of([(weight, mask)])) == 17
    assert float(ElasticNet(removed_l2=1.0).of([(weight, mask), (weight, mask)])) == 26
    assert not ElasticNet()


# ---- the pass


@pytest.mark.parametrize("build", [tiny_vit, tiny_cnn])
def test_it_learns_and_holds_the_masks(build: object) -> None:
    model = build()  # type: ignore[operator]
    data = tiny_data(model)
    masked = run(model, MASKS, data=data)
    result = run(model, MASKS, dataclasses.replace(QUICK, epochs=8, rate=3e-3, alpha=1.0), data=data)
    assert len(result.epochs) == 8
    assert result.epochs[-1].teacher_loss < 0.7 * result.epochs[0].teacher_loss
    images = data.calibration.first(64)

    def shift(other: Model) -> float:
        return float((other(images) - model(images)).square().mean())

    assert shift(result) < 0.7 * shift(masked)
    for name, plan in result.plan.items():
        if plan.mask is not None:
            assert (result.layer(name).weight[~plan.mask] == 0).all()
            assert (result.layer(name).weight[plan.mask] != 0).any()
    assert all(parameter.requires_grad for parameter in result.graph.parameters())


def test_without_labels_the_dense_model_alone_teaches() -> None:
    model = tiny_vit()
    images = Noise((1, 8, 8), 32)
    unlabelled = Data(training=Split(images, tuple(range(32)), labelled=False))
    labelled = Data(training=Split(images, tuple(range(32)), labelled=True))
    alone = run(model, MASKS, QUICK, data=unlabelled)
    assert alone.epochs[0].labels_loss is None
    assert alone.epochs[0].loss == alone.epochs[0].teacher_loss
    with_alpha_one = run(model, MASKS, dataclasses.replace(QUICK, alpha=1.0), data=labelled)
    assert_same_weights(weights(alone), weights(with_alpha_one))


def test_accumulating_is_one_step() -> None:
    # Not Adam: it divides by the size of a gradient, and that of a key's bias is nothing but rounding.
    step = dataclasses.replace(QUICK, optimizer="sgd", rate=0.01)
    whole, parts = (run(tiny_vit(), MASKS, dataclasses.replace(step, accumulate=n)) for n in (1, 4))
    for name, value in weights(whole).items():
        # Float32 sums of gradients in another order, over 8 steps.
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [{"precision": "bf16"}, {"precision": "fp16"}, {"soft": 0.5, "removed_l2": 0.1}, {"clip": 0.1}, {"kept_l1": 1e-3}],
)
def test_options_train_and_hold_the_masks(step: dict[str, object]) -> None:
    result = run(tiny_vit(), MASKS, ToMe(r=3), dataclasses.replace(QUICK, **step))  # type: ignore[arg-type]
    plain = run(tiny_vit(), MASKS, ToMe(r=3), QUICK)
    assert not all(torch.equal(value, weights(plain)[name]) for name, value in weights(result).items())
    masks = {name: plan.mask for name, plan in result.plan.items() if plan.mask is not None}
    assert masks
    assert all((result.layer(name).weight[~mask] == 0).all() for name, mask in masks.items())


def test_a_double_precision_model_is_trained_in_it() -> None:
    from mpcompile.frontend.capture import capture
    from mpcompile.testing import TinyMLP

    model = capture(TinyMLP().double(), tiny_source())
    assert run(model, MASKS, QUICK).graph.get_parameter("hidden.weight").dtype == torch.float64


def test_class_tokens_and_positions_are_not_decayed() -> None:
    graph = tiny_vit().graph
    decayed, free = (group["params"] for group in decayed_apart(graph, 0.1))
    names = {id(parameter): name for name, parameter in graph.named_parameters()}
    assert {"cls_token", "pos_embed", "head.bias", "norm.weight"} <= {names[id(p)] for p in free}
    assert {names[id(p)] for p in decayed} == {f"{name}.weight" for name, _ in tiny_vit().layers()}


def test_l2_shrinks_the_bulk() -> None:
    """What the paper's theory says: under decay σ₊ falls."""

    def edges(kept_l2: float) -> list[float | None]:
        from timm.models.vision_transformer import VisionTransformer

        from mpcompile.frontend.capture import capture

        vit = VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=1, num_heads=2
        )
        model = capture(vit, tiny_source())
        step = dataclasses.replace(QUICK, epochs=3, rate=3e-3, kept_l2=kept_l2, weight_decay=0.0)
        return [epoch.edge for epoch in run(model, MASKS, step).epochs]

    without, with_decay = edges(0.0), edges(1.0)
    assert with_decay[-1] is not None
    assert without[-1] is not None
    assert with_decay[-1] < with_decay[0] < without[0]  # type: ignore[operator]
    assert with_decay[-1] < 0.9 * without[-1]


def test_a_parameter_that_the_graph_does_not_use_is_left() -> None:
    model = tiny_vit()
    model.graph.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    assert "unused" not in reached_parameters(model.graph)
    result = run(model, MASKS, QUICK)
    assert torch.equal(result.graph.get_parameter("unused"), torch.ones(3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs is 0; it is a number above 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"alpha": 1.5}, "alpha is 1.5; it is a share between 0 and 1"),
        ({"warmup": -1}, "warmup is -1; it is a number of 0 or more"),
        ({"clip": 0.0}, "clip is 0.0; it is a norm above 0"),
        ({"removed_l1": 0.1}, "removed weights are zero, and cannot be penalised; set soft"),
        ({"optimizer": "addam"}, "optimizer is 'addam'; it is one of adamw, nadamw"),
        ({"seed": -1}, "seed is -1; it is a number of 0 or more"),
        ({"clip": float("nan")}, "clip is nan; it is a norm above 0"),
        ({"policy": "foo"}, "timm knows no augmentation policy 'foo'"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(QUICK, **options)  # type: ignore[arg-type]


def test_images_that_do_not_do_are_refused() -> None:
    with pytest.raises(PassError, match="a distillation needs training images; give --data"):
        run(tiny_vit(), MASKS, QUICK, data=Data(validation=tiny_data(tiny_vit()).validation))
    with pytest.raises(PassError, match="64 training images fill no batch of 65"):
        run(tiny_vit(), MASKS, dataclasses.replace(QUICK, batch=65))

    class Broken(Noise):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((1, 8, 8), torch.nan), 0

    bad = Data(training=Split(Broken((1, 8, 8), 16), tuple(range(16)), labelled=True))
    with pytest.raises(PassError, match="the loss is not finite at step 0; try a smaller rate"):
        run(tiny_vit(), MASKS, QUICK, data=bad)


# ---- images


def test_images_follow_from_seed_epoch_and_index() -> None:
    from mpcompile.data.load_data import load_data

    path = Path(__file__).parents[3] / "examples" / "fashion_vit" / "images.npz"
    source = tiny_source((1, 28, 28))
    data = load_data(path, source, 10)
    assert len(data.training) == 1000 - 256  # all but those for validation
    assert not set(data.training.order) & set(data.validation.order)
    assert set(data.calibration.order) <= set(data.training.order)
    images = TrainingImages(data.training, source, Augmentation(), seed=0)
    before = torch.get_rng_state()
    (one, label), (again, _), (other, _) = images[0, 5], images[0, 5], images[1, 5]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert label == data.training.images[5][1]
    plain = TrainingImages(data.training, source, Augmentation(scale=1.0, flip=0.0, erasing=0.0), seed=0)
    # A crop of a random shape is resized: nearly the image, not it.
    assert (plain[0, 5][0] - data.training.images[5][0]).abs().mean() < 0.5


def test_processes_share_each_batch_and_a_resumed_run_goes_on() -> None:
    order = tuple(range(100, 137))
    alone = list(Batches(order, 8, 3, 0, ProcessRank(0, 1), 0))
    assert len(alone) == 12
    assert all(len({index for _, index in epoch}) == 8 for epoch in alone)
    halves = [list(Batches(order, 8, 3, 0, ProcessRank(rank, 2), 0)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in alone]
    assert list(Batches(order, 8, 3, 0, ProcessRank(0, 1), 6)) == alone[6:]
    assert alone[0] != alone[4]  # another order in another epoch
    assert {epoch for epoch, _ in alone[4]} == {1}


# ---- resuming


class Stopped(Exception):
    """What a test stops a training with."""


@dataclasses.dataclass(frozen=True)
class Failing(Noise):
    """Fails where it has been read so often."""

    reads: list[int] = dataclasses.field(default_factory=list)
    most: int = 1 << 30

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads.append(index)
        if len(self.reads) > self.most:
            raise Stopped
        return super().__getitem__(index)


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


# ---- several processes


def torchrun(*arguments: str) -> None:
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    subprocess.run([sys.executable, *started], check=True, env=ONE_THREAD)


def test_two_processes_are_one(tmp_path: Path) -> None:
    script = str(Path(__file__).parents[2] / "two_processes.py")
    torchrun(script, str(tmp_path))
    subprocess.run([sys.executable, script, str(tmp_path)], check=True, env=ONE_THREAD)
    first, second, alone = (load_file(tmp_path / f"{name}.safetensors") for name in ("2-0", "2-1", "1-0"))
    assert_same_weights(first, second)
    for name, value in alone.items():
        # As in test_accumulating_is_one_step: gradients summed in another order.
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)


def test_the_command_under_torchrun_writes_what_one_process_writes(
    tmp_path: Path, tiny_files: Files, undisturbed: dict[str, Tensor]
) -> None:
    torchrun("-m", "mpcompile", *command(tiny_files, tmp_path, "two"))
    two = load_file(tmp_path / "two" / "model.safetensors")
    assert len(Artifact.open(tmp_path / "two").verify()) == 8
    for name, value in undisturbed.items():
        # The same, over 24 steps.
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


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


def test_a_training_from_a_checkpoint_is_told_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    def box(value: object) -> object:
        told.append(value)
        return SKIPPED

    monkeypatch.setattr("mpcompile.passes.distill.distill.broadcast", box)
    model = tiny_vit()
    QUICK.skip()
    assert QUICK.follow(tiny_data(model), model.source) is None
    assert told == [SKIPPED, None]


def test_a_batch_has_to_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcompile.passes.distill.distill.process_rank", lambda: ProcessRank(0, 3))
    with pytest.raises(PassError, match="a batch of 16 cannot be shared out among 3 processes"):
        run(tiny_vit(), MASKS, ToMe(r=2), QUICK)
