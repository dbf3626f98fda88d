"""Distillation: the objective against float64, masks held, resumed after a kill, and in two processes as in one."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_runs import MASKS, QUICK, assert_same_weights, run, weights
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError
from mpcompile.ir.head import Head
from mpcompile.ir.model import Model
from mpcompile.passes import ToMe
from mpcompile.passes.distill.augmentation import Augmentation, Batches, TrainingImages
from mpcompile.passes.distill.loss import ElasticNet, labels_loss, teacher_loss
from mpcompile.passes.distill.parameters import RelativeSteps, used_parameters, weight_decay_groups
from mpcompile.system.distributed import ProcessRank
from mpcompile.testing import Noise, tiny_cnn, tiny_data, tiny_source, tiny_vit

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


def test_thresholds_are_trained_by_binary_cross_entropy() -> None:
    logits, dense = torch.tensor([[1.0], [-2.0]]), torch.tensor([[3.0], [0.5]])
    labels, sigmoid = torch.tensor([1, 0]), Head("sigmoid")
    p, q = logits.sigmoid(), dense.sigmoid()
    entropy = -(labels[:, None] * p.log() + (1 - labels[:, None]) * (1 - p).log()).mean()
    assert float(labels_loss(logits, labels, 0.0, sigmoid)) == pytest.approx(float(entropy), rel=1e-5)
    kl = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    assert float(teacher_loss(logits, dense, 1.0, sigmoid)) == pytest.approx(float(kl), rel=1e-5)
    # Of probabilities the losses are the same.
    probabilities = Head("sigmoid", 0.5, probabilities=True)
    assert float(teacher_loss(p, q, 1.0, probabilities)) == pytest.approx(float(kl), rel=1e-4)
    soft = Head(probabilities=True)
    z = torch.tensor([[1.0, 2.0, 0.0]])
    expected = labels_loss(z, torch.tensor([1]), 0.0)
    assert float(labels_loss(z.softmax(1), torch.tensor([1]), 0.0, soft)) == pytest.approx(float(expected), rel=1e-4)
    ranks = torch.tensor([[2.0, -1.0]])  # rank 1 of 0, 1 and 2: the first threshold is exceeded, the second is not
    expected = -(ranks[0, 0].sigmoid().log() + (1 - ranks[0, 1].sigmoid()).log()) / 2
    assert float(labels_loss(ranks, torch.tensor([1]), 0.0, Head("ordinal"))) == pytest.approx(
        float(expected), rel=1e-5
    )


@given(npst.arrays(np.float32, (2, 4, 3, 3), elements=st.floats(-9, 9, width=32)))
def test_the_loss_of_values_is_the_error_relative_to_the_variance(dense: NDArray[np.float32]) -> None:
    found = dense[::-1] / 2
    expected = np.square(found.astype(float) - dense).mean() / max(dense.astype(float).var(), 1e-6)
    got = float(teacher_loss(torch.from_numpy(found.copy()), torch.from_numpy(dense), 2.0, Head("values")))
    assert got == pytest.approx(expected, rel=1e-4)


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
    decayed, free = (group["params"] for group in weight_decay_groups(graph, 0.1))
    names = {id(parameter): name for name, parameter in graph.named_parameters()}
    assert {"cls_token", "pos_embed", "head.bias", "norm.weight"} <= {names[id(p)] for p in free}
    assert {names[id(p)] for p in decayed} == {f"{name}.weight" for name, _ in tiny_vit().layers()}


def test_relative_steps_are_those_of_a_row() -> None:
    graph = tiny_cnn().graph
    name, layer = next((n, m) for n, m in graph.named_modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        layer.weight[0] = 100.0
        layer.weight[1] = 0.0
        layer.weight[2, 0] = 0.0  # removed weights do not count
        layer.weight[2, 1:] = 3.0
    before = {key: value.detach().clone() for key, value in graph.named_parameters()}

    def step() -> None:
        with torch.no_grad():
            for parameter in graph.parameters():
                parameter.add_(0.5)

    RelativeSteps(graph).take(step)
    moved = (graph.get_parameter(f"{name}.weight") - before[f"{name}.weight"]).detach()
    assert moved[0].flatten().tolist() == pytest.approx([50.0] * moved[0].numel(), rel=1e-5)
    assert (moved[1] > 0).all()
    assert (moved[1] < 1).all()
    if before[f"{name}.weight"].shape[1] > 1:
        assert moved[2].flatten().tolist() == pytest.approx([1.5] * moved[2].numel(), rel=1e-4)
    biases = [key for key in before if key.endswith("bias") and before[key].abs().sum() > 0]
    assert biases
    for key in biases:
        size = float(before[key][before[key] != 0].square().mean().sqrt())
        moved = (graph.get_parameter(key) - before[key]).detach()
        assert float(moved.mean()) == pytest.approx(0.5 * size, rel=1e-3)


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
    assert "unused" not in used_parameters(model.graph)
    result = run(model, MASKS, QUICK)
    assert torch.equal(result.graph.get_parameter("unused"), torch.ones(3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs is 0; it must be a number above 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"alpha": 1.5}, "alpha is 1.5; it must be between 0 and 1"),
        ({"warmup": -1}, "warmup is -1; it must be a number of 0 or more"),
        ({"clip": 0.0}, "clip is 0.0; it must be a norm above 0"),
        ({"removed_l1": 0.1}, "removed_l1 and removed_l2 have no effect while removed weights are zero; set soft"),
        ({"optimizer": "addam"}, "optimizer is 'addam'; it must be one of adamw, nadamw"),
        ({"seed": -1}, "seed is -1; it must be a number of 0 or more"),
        ({"clip": float("nan")}, "clip is nan; it must be a norm above 0"),
        ({"policy": "foo"}, "timm knows no augmentation policy 'foo'"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(QUICK, **options)  # type: ignore[arg-type]


def test_images_that_do_not_do_are_refused() -> None:
    with pytest.raises(PassError, match="distillation needs training images; give --data"):
        run(tiny_vit(), MASKS, QUICK, data=Data(validation=tiny_data(tiny_vit()).validation))
    with pytest.raises(PassError, match="64 training images do not fill a batch of 65"):
        run(tiny_vit(), MASKS, dataclasses.replace(QUICK, batch=65))

    class Broken(Noise):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((1, 8, 8), torch.nan), 0

    bad = Data(training=Split(Broken((1, 8, 8), 16), tuple(range(16)), labelled=True))
    with pytest.raises(PassError, match="the loss is not finite at step 0; try a smaller rate"):
        run(tiny_vit(), MASKS, QUICK, data=bad)


# ---- images


def test_images_follow_from_seed_epoch_and_index() -> None:
    from mpcompile.data.loading import load_data

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


# ---- several processes
