"""The pass quantize on unusual layers and activations, its choice of the observer, and its errors."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from quantize_runs import MASKS, PLAIN, assert_exact, integers_of, run
from torch import Tensor, nn

from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.quantization import quantizers
from mpcompile.passes import Quantize, ScaleMigration
from mpcompile.passes.quantize.lane_rule import LIMIT, PAIRS, reach
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import Noise, tiny_cnn, tiny_data, tiny_mlp, tiny_source, tiny_vit


def captured(net: nn.Module) -> Model:
    return capture(net.eval(), tiny_source())


class Channels(nn.Module):
    """A middle layer with a dead, a constant and a NaN-free zero channel; `break_` changes it."""

    def __init__(self, break_: Callable[["Channels"], None] = lambda net: None) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.stem.weight[:2] = 0
            self.stem.bias[0], self.stem.bias[1] = -1, 2  # never active; constant
            self.body.weight[3] = 0  # an output that is constant
            self.body.weight[4] = 0.25
            break_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(F.relu(self.stem(x.flatten(1))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["u8", "s8", "fp8"])
def test_constant_and_never_active_channels(kind: str) -> None:
    model = captured(Channels())
    result, _ = run(model, Quantize(kind, "all"))  # type: ignore[arg-type]
    images = tiny_data(model).validation.first(64)
    outputs = result(images)
    assert outputs.isfinite().all()
    # 8 bits of one layer; fp8 has 4 significant bits.
    assert float((outputs - model(images)).abs().max()) < (0.2 if kind == "fp8" else 0.05) * float(outputs.abs().max())
    assert not result.layer("body").weight[3].any()


def test_an_activation_that_is_always_0_is_told() -> None:
    def dead(net: Channels) -> None:
        net.stem.bias.fill_(-100.0)

    result, record = run(captured(Channels(dead)), Quantize())
    assert "activations that are 0 on all calibration images, so that their scale is 1: relu" in record.notes
    [quantizer] = quantizers(result.graph).values()
    assert quantizer.scale == 1
    assert result.plan["body"].rounding_error == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = captured(Channels())
    with torch.no_grad():
        model.layer("body").weight[5, 5] = value
    with pytest.raises(PassError, match="quantize failed"):
        run(model, PLAIN)


@pytest.mark.parametrize("observer", ["mse", None])
def test_activations_that_are_not_finite_are_refused(observer: str | None) -> None:
    model = tiny_mlp()
    with torch.no_grad():
        model.layer("stem").weight.mul_(1e38)
    text = "an activation on the calibration images is not finite, the output of gelu; check that --mean and --std"
    with pytest.raises(PassError, match=text):
        run(model, Quantize(observer=observer))


def test_grouped_and_depthwise_convolutions_and_lanes() -> None:
    result, _ = run(tiny_cnn(), Quantize(observer="min-max", lanes="pairs"))
    assert {"depthwise", "grouped"} <= result.scales().keys()
    assert_exact(result)
    for name in result.scales():
        assert (reach(integers_of(result, name), PAIRS) <= LIMIT).all()


def test_tied_weights_have_one_scale_that_holds_all_their_biases() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = (nn.Linear(n, m) for n, m in ((64, 8), (8, 8), (8, 8), (8, 3)))
            self.b.weight = self.a.weight
            with torch.no_grad():
                self.b.bias.fill_(1e9)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.a(F.gelu(self.stem(x.flatten(1)))))
            return self.head(torch.tanh(self.b(x)))  # type: ignore[no-any-return]

    result, _ = run(captured(Tied()), PLAIN)
    scale = result.plan["a"].scale
    assert scale is not None
    assert result.plan["b"].scale is not None
    assert torch.equal(scale, result.plan["b"].scale)
    first = quantizers(result.graph)["quantizers.gelu"].scale.double()
    for name in "ab":
        bias = result.layer(name).bias
        assert bias is not None
        # A file stores biases as int32 multiples of input scale × weight scale.
        assert (bias.double().abs() / (first * scale.double()) < 2**31).all()


def test_fetched_weights_are_quantised() -> None:
    class Fetched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.stem(x.flatten(1)))
            return self.head(F.gelu(F.linear(x, self.a.weight, self.a.bias)))  # type: ignore[no-any-return]

    model = captured(Fetched())
    result, _ = run(model, PLAIN)
    assert_exact(result)
    assert torch.equal(result.layer("a").bias, model.layer("a").bias)  # type: ignore[arg-type]


def test_after_scale_migration() -> None:
    result, _ = run(tiny_vit(), ScaleMigration(), MASKS, Quantize())
    assert_exact(result)


def test_a_single_calibration_image() -> None:
    model = tiny_cnn()
    result, _ = run(model, Quantize(), data=Data(Split(Noise((1, 8, 8), 1), (0,), labelled=False)))
    assert result(model.example).isfinite().all()


# ---- the observer


def test_the_observer_that_shifts_the_logits_least_is_taken_and_told() -> None:
    _, record = run(tiny_vit(), Quantize())
    [note] = [note for note in record.notes if note.startswith("ranges of activations by ")]
    shifts = [float(word) for word in note.replace("(", " ").replace(",", " ").split() if word[0].isdigit()]
    assert len(shifts) == 4
    assert shifts[0] == min(shifts)


def test_a_given_observer_is_used() -> None:
    model = tiny_mlp()
    data = tiny_data(model, 48)
    result, record = run(model, PLAIN, data=data)
    assert "ranges of activations by min-max" in record.notes
    with torch.no_grad():
        x = F.gelu(model.graph.get_submodule("stem")(data.calibration.first(48).flatten(1)))
    [quantizer] = quantizers(result.graph).values()
    # Outputs of other batch sizes may differ in their last bit.
    assert float(quantizer.scale) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-5)


# ---- errors


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"max_drop": -1.0}, "max_drop is -1.0; give a limit of 0 or more"),
        ({"max_drop": float("nan")}, "max_drop is nan; give a limit of 0 or more"),
        ({"damping": 0.0}, "damping is 0.0; give a number above 0, as "),
        ({"activations": "fp8", "lanes": "pairs"}, "lanes is 'pairs' and activations fp8, which has no integer lanes"),
        ({"activations": "fp8", "observer": "mse"}, "observer is 'mse', and ranges of fp8 are those of min-max; leave"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Quantize(**values)  # type: ignore[arg-type]


def test_an_unknown_observer_is_refused_where_types_are_not_checked() -> None:
    step = copy.copy(PLAIN)
    object.__setattr__(step, "observer", "median")
    with pytest.raises(UsageError, match="observer is 'median'; the observers are min-max, percentile, mse, entropy"):
        step.__post_init__()


def test_without_calibration_images_nothing_runs() -> None:
    text = "the ranges of activations are measured on calibration images; give --data"
    with pytest.raises(PassError, match=f"quantize cannot run: {text}"):
        PassManager([PLAIN]).require_inputs(tiny_mlp(), Data())
    with pytest.raises(PassError, match=text):
        run(tiny_mlp(), PLAIN, data=Data())


def test_a_quantised_model_is_not_quantised_again() -> None:
    with pytest.raises(PassError, match="already quantised; leave one of the two quantize passes out"):
        run(tiny_mlp(), PLAIN, PLAIN)


def test_a_model_in_which_no_layer_can_be_quantised_is_refused_with_reasons() -> None:
    text = r"no layer can be quantised \(stem: stem: it reads the image itself; hidden: excluded by 'h\*'"
    with pytest.raises(PassError, match=text):
        run(tiny_mlp(), replace(PLAIN, exclude=("h*",)))


def test_a_pattern_of_names_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer name matches 'x'; the layers are stem, hidden, head"):
        run(tiny_mlp(), replace(PLAIN, include=("x",)))
