"""N:M masks: properties over shapes and patterns, an independent enumeration, and which layers stay dense."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpcompile.data.images import Data
from mpcompile.errors import PassError, UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import LayerPlan, Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import grouped, pattern_violation, ungrouped, violation
from mpcompile.passes import NMMask
from mpcompile.passes.nm_mask.selection import nm_mask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import assert_follows, tiny_cnn, tiny_source, tiny_vit


@st.composite
def weights_and_patterns(draw: st.DrawFn) -> tuple[Tensor, NM]:
    """Linear and convolution weights with a pattern that divides them; coarse values, so that ties are common."""
    of = draw(st.integers(2, 64))
    rows = draw(st.sampled_from((1, 2, 4)))
    pattern = NM(keep=draw(st.integers(1, of - 1)), of=of, rows=rows)
    taps = draw(st.sampled_from(((), (1, 1), (3, 3), (1, 2))))
    shape = (rows * draw(st.integers(1, 3)), of * draw(st.integers(1, 3)), *taps)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(-3, 4, shape, generator=rng).float(), pattern


@given(weights_and_patterns())
def test_grouping_is_undone(case: tuple[Tensor, NM]) -> None:
    weight, pattern = case
    assert torch.equal(ungrouped(grouped(weight, pattern.of), weight.shape), weight)


@given(weights_and_patterns())
def test_every_group_keeps_exactly_n(case: tuple[Tensor, NM]) -> None:
    weight, pattern = case
    mask = nm_mask(weight.abs(), pattern)
    assert mask.shape == weight.shape
    # By hand, in NumPy: walk the groups of each row and tap.
    array = mask.numpy().reshape(weight.shape[0], weight.shape[1], -1)
    for row, tap in itertools.product(range(array.shape[0]), range(array.shape[2])):
        counts = array[row, :, tap].reshape(-1, pattern.of).sum(axis=1)
        assert (counts == pattern.keep).all()
    for first in range(0, array.shape[0], pattern.rows):
        assert (array[first : first + pattern.rows] == array[first]).all()
    assert pattern_violation(mask, pattern) is None


@given(weights_and_patterns(), st.integers(0, 2**31))
def test_no_other_legal_mask_keeps_more(case: tuple[Tensor, NM], seed: int) -> None:
    weight, pattern = case
    best = float(weight.abs()[nm_mask(weight.abs(), pattern)].sum())
    other = nm_mask(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)), pattern)
    assert float(weight.abs()[other].sum()) <= best  # integers: the sums are exact


@pytest.mark.parametrize("pattern", [NM(1, 2), NM(2, 4), NM(3, 5), NM(2, 6), NM(2, 4, rows=2)])
def test_equals_enumeration_of_every_choice(pattern: NM) -> None:
    weight = torch.randn(4, 2 * pattern.of, dtype=torch.float64)
    mask = nm_mask(weight.abs(), pattern)
    for block, group in itertools.product(range(4 // pattern.rows), range(2)):
        rows = slice(block * pattern.rows, (block + 1) * pattern.rows)
        part = weight[rows, group * pattern.of : (group + 1) * pattern.of].abs().sum(0).numpy()
        choices = itertools.combinations(range(pattern.of), pattern.keep)
        best = sorted(choices, key=lambda kept, part=part: -part[list(kept)].sum())[0]  # type: ignore[misc]
        kept = mask[rows.start, group * pattern.of : (group + 1) * pattern.of].nonzero().flatten().tolist()
        assert tuple(kept) == best


def test_equal_scores_keep_the_first() -> None:
    assert nm_mask(torch.ones(1, 8), NM(2, 4)).tolist() == [[True, True, False, False] * 2]


def test_convolution_groups_run_along_input_channels_per_tap() -> None:
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([4.0, 3, 2, 1])
    weight[0, :, 0, 1] = torch.tensor([1.0, 2, 3, 4])
    mask = nm_mask(weight.abs(), NM(2, 4))
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]


def test_convolution_equals_linear_on_its_taps() -> None:
    weight = torch.randn(8, 16, 3, 3)
    mask = nm_mask(weight.abs(), NM(2, 4))
    for y, x in itertools.product(range(3), range(3)):
        assert torch.equal(mask[:, :, y, x], nm_mask(weight[:, :, y, x].abs(), NM(2, 4)))


def test_removed_weights_become_positive_zero() -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.0, -1.0, 2.0, 3.0]] * 4))

    class Wrap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 4), layer, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x.flatten(1))))  # type: ignore[no-any-return]

    result = run(capture(Wrap(), tiny_source()), NMMask())
    dropped = result.layer("b").weight[:, :2]
    assert torch.equal(dropped, torch.zeros(4, 2))
    assert not dropped.signbit().any()


def run(model: Model, step: NMMask) -> Model:
    return PassManager([step]).run(model, Data())[0]


def test_masked_layers_and_reasons_of_a_cnn() -> None:
    result = run(tiny_cnn(), NMMask(NM(2, 4)))
    reasons = {name: plan.skipped for name, plan in result.plan.items()}
    assert reasons["body"] is None
    assert reasons["grouped"] is None  # 8 input channels a group
    assert "stem" in str(reasons["stem"])
    assert "depthwise" in str(reasons["depthwise"])
    assert reasons["widen"] == "6 input channels are not a multiple of 4"
    assert "output layer" in str(reasons["head"])
    for name in ("body", "grouped", "odd"):
        assert_follows(result.layer(name).weight, NM(2, 4))
        assert float((result.layer(name).weight != 0).float().mean()) == 0.5


def test_include_overrides_defaults_but_not_facts() -> None:
    result = run(tiny_cnn(), NMMask(NM(2, 4), include=("head", "widen", "depthwise")))
    assert result.plan["head"].mask is not None
    assert result.plan["widen"].skipped == "6 input channels are not a multiple of 4"
    assert "depthwise" in str(result.plan["depthwise"].skipped)


def test_exclude_wins_over_include() -> None:
    result = run(tiny_vit(), NMMask(NM(2, 4), include=("blocks.0.*",), exclude=("blocks.0.attn.*",)))
    assert result.plan["blocks.0.attn.qkv"].skipped == "excluded by 'blocks.0.attn.*'"
    assert result.plan["blocks.0.mlp.fc1"].mask is not None


def test_an_exclude_that_matches_no_layer_is_refused_with_the_layer_names() -> None:
    with pytest.raises(
        UsageError, match=r"no layer name matches 'blokcs.*'; the layers are patch_embed.proj, blocks.0"
    ):
        run(tiny_vit(), NMMask(NM(2, 4), exclude=("blokcs.*",)))


def test_a_planned_pattern_wins_over_that_of_the_pass() -> None:
    model = tiny_vit()
    model = model.with_plan({"blocks.0.mlp.fc1": LayerPlan(pattern=NM(1, 4))})
    result = run(model, NMMask(NM(2, 4)))
    assert_follows(result.layer("blocks.0.mlp.fc1").weight, NM(1, 4))
    assert result.plan["blocks.0.mlp.fc2"].pattern == NM(2, 4)


def test_eligibility_is_decided_for_the_planned_pattern() -> None:
    model = tiny_cnn().with_plan({"body": LayerPlan(pattern=NM(2, 64)), "grouped": LayerPlan(pattern=NM(1, 8))})
    plan = run(model, NMMask(NM(2, 16))).plan
    assert plan["body"].skipped == "16 input channels are not a multiple of 64"
    assert plan["grouped"].mask is not None  # 8 input channels a group: 1:8 fits, 2:16 would not
    assert plan["grouped"].skipped is None


def test_a_second_mask_pass_adds_masks_and_overwrites_none() -> None:
    first = NMMask(NM(2, 4), exclude=("blocks.1.*",))
    second = NMMask(NM(1, 4), exclude=("blocks.0.*",))
    result, _ = PassManager([first, second]).run(tiny_vit(), Data())
    assert str(result.plan["blocks.0.mlp.fc1"].pattern) == "2:4"
    assert str(result.plan["blocks.1.mlp.fc1"].pattern) == "1:4"
    assert result.plan["blocks.1.mlp.fc1"].skipped is None
    with pytest.raises(
        PassError, match="on blocks.0.attn.qkv after nm-mask: it is masked at 2:4 already; exclude it from 1:4"
    ):
        PassManager([first, NMMask(NM(1, 4))]).run(tiny_vit(), Data())


def test_a_pattern_that_no_layer_can_have_is_refused() -> None:
    with pytest.raises(
        PassError, match=r"no layer takes 7:13 \(patch_embed.proj: stem.*; blocks.0.attn.qkv: 32 input channels"
    ):
        run(tiny_vit(), NMMask(NM(7, 13)))
    empty = capture(nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), tiny_source())
    with pytest.raises(PassError, match="the model has no Linear and no Conv2d"):
        run(empty, NMMask())


def test_a_layer_stays_dense_if_its_rows_do_not_divide() -> None:
    result = run(tiny_cnn(), NMMask(NM(2, 4, rows=4)))
    assert result.plan["odd"].skipped == "6 output channels are not a multiple of the 4 that share a pattern"


def test_layers_that_rewrite_their_weight_stay_dense() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)  # type: ignore[no-any-return]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.own, self.head = nn.Conv2d(1, 8, 1), Standardised(8, 8, 1), nn.Linear(8, 2)
            self.hooked = nn.Conv2d(8, 8, 1)
            self.hooked.register_forward_pre_hook(lambda module, args: None)
            self.scaled = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.hooked(self.own(self.stem(x))).mean((2, 3))
            return self.head(nn.functional.linear(y, self.scaled.weight * 2))  # type: ignore[no-any-return]

    plan = run(capture(Net(), tiny_source()), NMMask(include=("head",))).plan
    for name in ("own", "hooked", "scaled"):
        assert "might not stay zeros" in str(plan[name].skipped), name


def test_a_violation_is_described() -> None:
    layer = nn.Linear(8, 4)
    mask = nm_mask(layer.weight.detach().abs(), NM(2, 4))
    with torch.no_grad():
        layer.weight.mul_(mask)
    assert violation(layer, LayerPlan(pattern=NM(2, 4), mask=mask)) is None
    assert "is not 1:4" in str(violation(layer, LayerPlan(pattern=NM(1, 4), mask=mask)))
    assert "the mask is (4, 4)" in str(violation(layer, LayerPlan(pattern=NM(2, 4), mask=mask[:, :4])))
    with torch.no_grad():
        layer.weight[~mask] = 1.0
    assert violation(layer, LayerPlan(pattern=NM(2, 4), mask=mask)) == "16 weights that the mask zeroes are not zero"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_magnitude_removes_the_energy_of_an_independent_projection(seed: int) -> None:
    """Against NumPy in float64: squared error of the best 2:4 projection, group by group."""
    weight = np.random.default_rng(seed).standard_normal((8, 32))
    mask = nm_mask(torch.from_numpy(weight).abs(), NM(2, 4)).numpy()
    ordered = np.sort(np.abs(weight.reshape(8, 8, 4)), axis=-1)
    lost = (ordered[..., :2] ** 2).sum()
    # Only the order of a sum of 128 float64 terms differs.
    assert np.isclose((weight[~mask] ** 2).sum(), lost, rtol=1e-12)


def test_a_pass_failure_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpcompile.passes.nm_mask import nm_mask as module

    def explode(*args: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(module, "MaskProblem", explode)
    with pytest.raises(PassError, match=r"nm-mask failed on blocks.0.attn.qkv: RuntimeError: no memory"):
        run(tiny_vit(), NMMask())
