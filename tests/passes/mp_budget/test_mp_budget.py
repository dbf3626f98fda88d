"""The budget: what it plans with and without a target, where spectra go, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpcompile.analysis.macs import cost
from mpcompile.analysis.spectrum import SpectrumFit, analyse
from mpcompile.data.images import Data, Split
from mpcompile.data.loading import load_data
from mpcompile.errors import PassError, UsageError
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Request, load
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import MPBudget, NMMask
from mpcompile.passes.mp_budget.attention_layers import attention_layers
from mpcompile.passes.mp_budget.mp_budget import fit_spectra
from mpcompile.passes.mp_budget.sensitivity import amplification
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_cnn, tiny_mlp, tiny_source, tiny_vit


def plan_by(model: Model, step: MPBudget, data: Data | None = None) -> Model:
    result, _ = PassManager([step]).run(model, data or Data())
    return result


@pytest.fixture(scope="module")
def vit() -> tuple[Model, Data]:
    """The trained example with 64 calibration images."""
    example = Path(__file__).parents[3] / "examples" / "fashion_vit"
    loaded = load(Request(str(example / "model.safetensors")))
    return capture(loaded.module, loaded.source), load_data(example / "images.npz", loaded.source, 10, calibration=64)


def test_without_a_target_every_eligible_layer_gets_the_pattern() -> None:
    result = plan_by(tiny_vit(), MPBudget())
    assert {name for name, plan in result.plan.items() if plan.pattern == NM(2, 4)} == {
        f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert str(result.plan["patch_embed.proj"].skipped).startswith("stem")
    assert str(result.plan["blocks.0.attn.qkv"].unfitted).startswith("its smaller side is 32; under 64")


def test_of_several_patterns_a_layer_gets_the_sparsest_it_can_carry() -> None:
    # 8:16 costs less than 2:4 at the same density, and not every width divides by 16.
    plan = plan_by(tiny_cnn(), MPBudget(patterns=(NM(2, 4), NM(8, 16), NM(7, 8)))).plan
    assert str(plan["body"].pattern) == "8:16"
    assert str(plan["grouped"].pattern) == "2:4"
    assert plan["depthwise"].pattern is None


@pytest.mark.parametrize("signal", ["mp", "magnitude", "std", "uniform", "lamp", "owl", "sensitivity"])
def test_a_target_is_met_and_no_more_than_needed(vit: tuple[Model, Data], signal: str) -> None:
    model, data = vit
    step = MPBudget(macs=0.7, signal=signal, null=False)  # type: ignore[arg-type]
    result = plan_by(model, step, data)
    counted = cost(model)
    patterns = {name: plan.pattern for name, plan in result.plan.items() if plan.pattern}
    left = counted.executed_macs(patterns) / counted.macs
    smallest = min(counted.layers[name] for name in patterns) * 0.5 / counted.macs
    # At the optimum no pattern can be taken back: one more dense layer would miss the target.
    assert 0.7 - smallest < left <= 0.7 + 1e-6
    dense = [plan.skipped for name, plan in result.plan.items() if not plan.pattern and "blocks" in name]
    assert set(dense) == {"the budget keeps it dense"}


def test_masks_follow_the_plan(vit: tuple[Model, Data]) -> None:
    model, data = vit
    result, _ = PassManager([MPBudget(macs=0.7, null=False), NMMask()]).run(model, data)
    planned = plan_by(model, MPBudget(macs=0.7, null=False)).plan
    for name, plan in result.plan.items():
        assert (plan.mask is not None) == (planned[name].pattern is not None)
        assert plan.pattern == planned[name].pattern
        assert plan.mask is not None or plan.skipped


def test_auto_mixes_patterns_of_one_group(vit: tuple[Model, Data]) -> None:
    model, _ = vit
    result = plan_by(model, MPBudget(patterns=tuple(NM(k, 4) for k in (1, 2, 3)), macs=0.6, null=False))
    assert len({plan.pattern for plan in result.plan.values() if plan.pattern}) > 1


def test_an_included_output_layer_stays_included_for_the_mask() -> None:
    result, _ = PassManager([MPBudget(include=("head",), exclude=("blocks.*",)), NMMask()]).run(tiny_vit(), Data())
    assert result.plan["head"].mask is not None
    assert result.plan["blocks.0.mlp.fc1"].skipped == "excluded by 'blocks.*'"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.head = (nn.Linear(i, 16) for i in (64, 16, 16, 16, 16))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(self.stem(x.flatten(1))).relu()).relu()))  # type: ignore[no-any-return]


def test_layers_that_share_a_weight_are_decided_on_together() -> None:
    model = capture(Tied(), tiny_source())
    for macs in (0.95, 0.85):
        plan = plan_by(model, MPBudget(macs=macs)).plan
        assert plan["a"].pattern == plan["b"].pattern


def test_fits_are_those_of_the_weights(vit: tuple[Model, Data]) -> None:
    model, _ = vit
    found = fit_spectra(model, null=True, level=0.05, seed=3)
    layer = found["blocks.2.mlp.fc2"]
    assert isinstance(layer, SpectrumFit)
    assert layer == analyse(model.layer("blocks.2.mlp.fc2").weight.detach().numpy(), seed=3)
    assert found["patch_embed.proj"] == "stem: it reads the image itself"
    spectrum = plan_by(model, MPBudget(seed=3)).plan["blocks.2.mlp.fc2"].spectrum
    assert spectrum == layer.summary
    assert spectrum.null_error is not None
    assert spectrum.null_error < spectrum.fit_error
    assert all(plan.spectrum or plan.unfitted for plan in plan_by(model, MPBudget(null=False)).plan.values())


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (MPBudget(macs=0.2), "0.2 of the multiply-accumulates cannot be reached: .* 0.5.* are left; raise macs"),
        (MPBudget(patterns=(NM(7, 13),)), r"no layer takes 7:13 \(patch_embed.proj: stem"),
        (MPBudget(macs=0.8, signal="owl"), "the signal owl needs calibration images; give --data"),
        (MPBudget(macs=0.8, signal="sensitivity"), "the signal sensitivity needs calibration images"),
    ],
)
def test_what_cannot_be_planned(step: MPBudget, text: str) -> None:
    with pytest.raises(PassError, match=text):
        plan_by(tiny_vit(), step)


@pytest.mark.parametrize("signal", ["mp", "magnitude", "std", "uniform", "lamp"])
@pytest.mark.parametrize("patterns", [(NM(2, 4),), (NM(2, 4), NM(1, 4)), (NM(1, 4), NM(7, 8))])
def test_any_target_is_met_or_refused_in_words(signal: str, patterns: tuple[NM, ...]) -> None:
    """A target past the MACs of all eligible layers raised StopIteration from the table of sparsities."""
    model = tiny_mlp()
    counted = cost(model)
    least = 1 - counted.layers["hidden"] / counted.macs * (1 - min(p.density for p in patterns))
    for macs in (0.01, 0.1, 0.3, 0.6, 0.9, 0.99):
        step = MPBudget(patterns=patterns, macs=macs, signal=signal)  # type: ignore[arg-type]
        if macs < least:
            text = f"{macs} of the multiply-accumulates cannot be reached: .* {least:.4g} are left; raise macs"
            with pytest.raises(PassError, match=text):
                plan_by(model, step)
            continue
        found = {name: layer.pattern for name, layer in plan_by(model, step).plan.items() if layer.pattern}
        assert counted.executed_macs(found) <= macs * counted.macs * (1 + 1e-6)


def test_a_target_is_refused_before_the_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mpcompile.passes.mp_budget.mp_budget.fit_spectra")
    with pytest.raises(PassError, match="cannot be reached"):
        plan_by(tiny_mlp(), MPBudget(macs=0.1))


def test_the_budget_stands_before_the_masks() -> None:
    with pytest.raises(PassError, match="some layers are masked already"):
        PassManager([NMMask(), MPBudget()]).run(tiny_vit(), Data())


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"macs": 1.0}, "macs is 1.0; it is the share"),
        ({"macs": float("nan")}, "macs is nan"),
        ({"patterns": ()}, "has no patterns to choose from"),
        ({"level": 0.0}, "level is 0.0"),
    ],
)
def test_parameters_that_cannot_be_meant(params: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        MPBudget(**params)  # type: ignore[arg-type]


# ---- roles


def test_attention_is_read_off_the_graph() -> None:
    assert attention_layers(tiny_vit()) == {f"blocks.{i}.attn.{part}" for i in (0, 1) for part in ("qkv", "proj")}
    assert attention_layers(tiny_cnn()) == frozenset()

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.x, self.attn, self.head = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = x.squeeze(1)
            y = y + self.attn((self.mlp(y) @ self.x(y).transpose(1, 2)).softmax(-1) @ y)
            return self.head(y.mean(1))  # type: ignore[no-any-return]

    # By graph and not by name: what is called attn projects attention's result, what is called mlp feeds it.
    assert attention_layers(capture(Renamed(), tiny_source())) == {"mlp", "x", "attn"}


# ---- sensitivity


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(64, 8, bias=False), nn.Linear(8, 3, bias=False), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)))  # type: ignore[no-any-return]


class Pictures:
    classes = 0

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], -1


def test_amplification_is_the_mean_squared_derivative() -> None:
    """For z = B A x: ∂z_k/∂A_ij = B_ki x_j and ∂z_k/∂B_ki = (A x)_i, so both means have a closed form."""
    model = capture(Line(), tiny_source())
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(4096, 1, 8, 8, generator=rng)
    found = amplification(model, Split(Pictures(images), tuple(range(4096)), False), ["a", "b"])
    x = images.flatten(1).double()
    a, b = (model.layer(name).weight.detach().double() for name in "ab")
    for name, weight, square in (
        ("a", a, b.square().sum(0)[:, None] * x.square().mean(0)[None]),
        ("b", b, (x @ a.T).square().mean(0)[None].expand(3, 8)),
    ):
        expected = float(((weight**2 * square).sum() / (weight**2).sum()).sqrt())
        # 128 batches, each with a random sign for every output: the estimate's own deviation is a few per cent.
        assert found[name] == pytest.approx(expected, rel=0.15)


def test_several_densities_without_macs_are_told() -> None:
    (note,) = plan_by(tiny_vit(), MPBudget((NM(2, 4), NM(1, 4)), null=False)).notes
    assert note.startswith("without macs (--macs), every layer gets the sparsest pattern of 2:4, 1:4")
    assert not plan_by(tiny_vit(), MPBudget((NM(2, 4), NM(4, 8)), null=False)).notes
    assert not plan_by(tiny_vit(), MPBudget((NM(2, 4), NM(1, 4)), macs=0.7, null=False)).notes


def test_amplification_leaves_the_model_as_it_was() -> None:
    model = tiny_mlp()
    model.layer("stem").weight.requires_grad_(False)
    split = Split(
        Pictures(torch.from_numpy(np.random.default_rng(0).random((8, 1, 8, 8), np.float32))), tuple(range(8)), False
    )
    first = amplification(model, split, ["stem", "hidden"])
    assert first == amplification(model, split, ["stem", "hidden"])
    assert not model.layer("stem").weight.requires_grad
    assert model.layer("hidden").weight.grad is None
