"""Prune–restore: unused slots are filled, and layers are un-pruned by share until the limit holds."""

import logging
from dataclasses import replace

import pytest
import torch

from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.pattern_choice import parse_choice
from mpcompile.ir.weight_groups import pattern_violation
from mpcompile.passes import NMMask, Restore
from mpcompile.passes.restore import filled
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import TinyMLP, assert_follows, tiny_cnn, tiny_data, tiny_mlp, tiny_source, tiny_vit


def shift(model: Model, dense: Model, data: Data) -> float:
    """The measure of `max_shift`: the mean largest change of a logit, as a share of the range of dense logits."""
    images = data.validation.first(len(data.validation))
    before, after = dense(images), model(images)
    spread = (before.amax(1) - before.amin(1)).mean()
    return float((after - before).abs().amax(1).mean() / spread)


def test_layers_are_restored_until_the_limit_holds(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_vit()
    data = tiny_data(model)
    masked, _ = PassManager([NMMask(NM(1, 4))]).run(model, data)
    limit = shift(masked, model, data) / 2
    with caplog.at_level(logging.INFO, "mpcompile"):
        result, records = PassManager([NMMask(NM(1, 4)), Restore(max_shift=limit)]).run(model, data)
    assert shift(result, model, data) <= limit
    restored = [name for name, plan in result.plan.items() if plan.skipped and plan.skipped.startswith("restored")]
    kept = [name for name, plan in result.plan.items() if plan.mask is not None]
    assert restored
    assert kept  # not all layers: the limit is half of the shift
    for name in restored:
        assert torch.equal(result.layer(name).weight, model.layer(name).weight)
        assert f"{name} goes to dense" in caplog.text
    assert "multiply-accumulates an image are left" in caplog.text
    assert any("masks removed" in note for note in records[-1].notes)
    for name in kept:
        assert_follows(result.layer(name).weight, NM(1, 4))


@pytest.mark.parametrize(("text", "found"), [("2:4", "2:4"), ("50%", "16:32")])
def test_a_milder_pattern_is_tried_before_dense(text: str, found: str) -> None:
    model = tiny_vit()
    data = tiny_data(model)
    masked, _ = PassManager([NMMask(NM(1, 4))]).run(model, data)
    limit = 0.7 * shift(masked, model, data)
    step = Restore(max_shift=limit, patterns=(parse_choice(text), NM(1, 4)))
    result, _ = PassManager([NMMask(NM(1, 4)), step]).run(model, data)
    milder = [name for name, plan in result.plan.items() if plan.mask is not None and str(plan.pattern) == found]
    assert milder
    for name in milder:
        assert_follows(result.layer(name).weight, NM.parse(found))
    assert shift(result, model, data) <= limit


def test_a_limit_of_zero_restores_the_dense_model_exactly() -> None:
    model = tiny_cnn()
    data = tiny_data(model)
    result, _ = PassManager([NMMask(NM(2, 4)), Restore(max_shift=0.0)]).run(model, data)
    assert all(plan.mask is None for plan in result.plan.values())
    assert torch.equal(result(model.example), model(model.example))


def test_a_norm_that_absorbed_a_mean_shift_is_restored_with_its_layer() -> None:
    from mpcompile.frontend.capture import capture
    from mpcompile.testing import tiny_source

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = torch.nn.Conv2d(1, 16, 3), torch.nn.Conv2d(16, 32, 1, bias=False)
            self.norm, self.head = torch.nn.BatchNorm2d(32), torch.nn.Linear(32, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.conv(self.stem(x).relu())).relu().mean((2, 3)))  # type: ignore[no-any-return]

    model = capture(Normed().eval(), tiny_source())
    data = tiny_data(model)
    result, _ = PassManager([NMMask(NM(1, 4)), Restore(max_shift=0.0)]).run(model, data)
    assert torch.equal(result(model.example), model(model.example))


def test_unused_slots_get_the_largest_weights_of_their_group() -> None:
    model = tiny_vit()
    masked, _ = PassManager([NMMask(NM(1, 4), "magnitude")]).run(model, Data())
    name = "blocks.0.mlp.fc1"
    plan = replace(masked.plan[name], pattern=NM(2, 4))  # a 1:4 mask under a pattern with 2 slots
    result, _ = PassManager([Restore()]).run(masked.with_plan({name: plan}), Data())
    mask = result.plan[name].mask
    assert mask is not None
    assert int(mask.sum()) == mask.numel() // 2
    best = (NMMask(NM(2, 4), "magnitude", include=(name,)), Data())
    wanted, _ = PassManager([best[0]]).run(model, best[1])
    assert torch.equal(result.layer(name).weight, wanted.layer(name).weight)


def test_filling_keeps_used_weights_and_row_shared_patterns() -> None:
    dense = torch.randn(8, 16)
    used = torch.zeros(8, 16, dtype=torch.bool)
    used[0, 3] = used[1, 3] = True
    mask = filled(used, dense, NM(2, 4, rows=2))
    assert pattern_violation(mask, NM(2, 4, rows=2)) is None
    assert bool(mask[used].all())
    assert int(mask.sum()) == 64


def test_filling_keeps_a_vocabulary() -> None:
    model = tiny_mlp()
    pattern = NM(4, 8, vocabulary=2)
    masked, _ = PassManager([NMMask(pattern, "magnitude")]).run(model, Data())
    [name] = masked.masks()
    mask = masked.masks()[name]
    with torch.no_grad():  # as a refit may leave a kept weight
        masked.layer(name).weight[tuple(mask.nonzero()[0])] = 0.0
    result, _ = PassManager([Restore()]).run(masked, Data())
    assert torch.equal(result.masks()[name], mask)
    assert torch.equal(result.layer(name).weight, torch.where(mask, model.layer(name).weight, 0))


def test_a_limit_without_images_or_labels_is_refused() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    with pytest.raises(PassError, match="max_drop and max_shift are measured on validation images; give --data"):
        PassManager([NMMask(NM(2, 4)), Restore(max_shift=0.1)]).run(model, Data())
    unlabelled = replace(data, validation=replace(data.validation, labelled=False))
    with pytest.raises(
        PassError, match="max_drop needs labels, and the validation images have none; give max_shift instead"
    ):
        PassManager([NMMask(NM(2, 4)), Restore(max_drop=1.0)]).run(model, unlabelled)
    with pytest.raises(UsageError, match="max_drop is -1.0"):
        Restore(max_drop=-1.0)


def test_a_limit_on_accuracy_holds_on_the_validation_images() -> None:
    model = tiny_vit()
    data = tiny_data(model)
    result, _ = PassManager([NMMask(NM(1, 4), "magnitude", "none"), Restore(max_drop=1.0)]).run(model, data)
    images = data.validation.first(64)
    labels = torch.tensor([data.validation.images[i][1] for i in data.validation.order])
    drop = sum(sign * int((m(images).argmax(1) == labels).sum()) for sign, m in ((1, model), (-1, result)))
    assert drop <= 0.64


def test_the_limits_of_a_model_with_one_output_are_those_of_its_threshold() -> None:
    model = capture(TinyMLP(outputs=1), tiny_source())
    data = tiny_data(model)
    # One logit has no range in an image; over the images it has one, so a loose limit keeps the mask.
    result, _ = PassManager([NMMask(NM(1, 16)), Restore(max_shift=10.0)]).run(model, data)
    assert result.plan_of("hidden").mask is not None
    images, labels = next(data.validation.batches(64))

    def right(side: Model) -> int:
        return int(((side(images)[:, 0] > 0) * 1 == labels).sum())

    masked, _ = PassManager([NMMask(NM(1, 16), "magnitude", "none")]).run(model, data)
    result, _ = PassManager([NMMask(NM(1, 16), "magnitude", "none"), Restore(max_drop=0.0)]).run(model, data)
    assert right(result) >= right(model)
    assert (result.plan_of("hidden").mask is None) == (right(masked) < right(model))
