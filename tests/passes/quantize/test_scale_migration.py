"""Scale migration: the same function, zeros stay zeros, less error in 8 bits, and norms that must be left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpcompile.data.images import Data, Split
from mpcompile.errors import PassError, UsageError
from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.passes import NMMask, Quantize, ScaleMigration
from mpcompile.passes.quantize.scale_migration import LARGEST_FACTOR, LEAST_GAIN, _error, best_factor
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import Noise, assert_same_function, check_contract, tiny_data, tiny_mlp, tiny_source, tiny_vit


class Normed(nn.Module):
    """A residual block whose norm has a few channels far larger than the others; `forward` is written by subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 3)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.norm.weight.mul_(torch.tensor([40.0, 15.0] + [1.0] * 14))
            self.norm.bias.add_(torch.linspace(-3, 3, 16))
            self.a.weight[:, 3] = 0  # a masked column

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x.flatten(1)))
        y = self.normalize(x)
        return self.head(F.gelu(x + self.a(y) * self.b(y)))  # type: ignore[no-any-return]

    def normalize(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


class Functional(Normed):
    def normalize(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (16,), self.norm.weight, bias=self.norm.bias)


class ReadByAnother(Normed):
    """An operation that is no layer reads the norm too."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x.flatten(1)))
        y = self.norm(x)
        return self.head(F.gelu(y + self.a(y) * self.b(y)))  # type: ignore[no-any-return]


class TiedReaders(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight


class TiedBiases(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.b.bias = self.a.bias


class TiedNorms(Normed):
    """A second norm has the same γ."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.LayerNorm(16)
        self.other.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x.flatten(1)))
        y = self.norm(x)
        return self.head(F.gelu(self.other(x) + self.a(y) * self.b(y)))  # type: ignore[no-any-return]


class UsedTwice(Normed):
    """The reader is applied to another value as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x.flatten(1)))
        y = self.norm(x)
        return self.head(F.gelu(self.a(x) + self.a(y) * self.b(y)))  # type: ignore[no-any-return]


class NormTwice(Normed):
    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x.flatten(1)))
        return self.head(F.gelu(self.b(self.norm(F.gelu(self.a(self.norm(x)))))))  # type: ignore[no-any-return]


class NotAffine(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16, elementwise_affine=False)


class ReadByConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.a = nn.Conv2d(1, 8, 3, padding=1), nn.LayerNorm(8), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head(F.relu(self.a(x)).mean((2, 3)))  # type: ignore[no-any-return]


def captured(net: nn.Module) -> Model:
    return capture(net.eval(), tiny_source())


def migrated(model: Model, step: ScaleMigration | None = None) -> Model:
    """The model after the pass, called without the manager, so that only the pass itself can find a fault."""
    copied = Model(copy.deepcopy(model.graph), model.example, model.source)
    return (step or ScaleMigration())(copied, tiny_data(model))


def double(net: nn.Module) -> Model:
    return capture(net.double().eval(), tiny_source(), torch.randn(3, 1, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["u8", "s8", "fp8"])
@pytest.mark.parametrize("net", [Normed, Functional])
def test_the_function_stays_the_same(net: type[Normed], kind: str) -> None:
    model = double(net())
    result = migrated(model, ScaleMigration(activations=kind))  # type: ignore[arg-type]
    assert result.notes[0].startswith("scales migrated at 1 of 1 layer norms")
    assert not torch.equal(result.layer("a").weight, model.layer("a").weight)
    images = torch.randn(20, 1, 8, 8, dtype=torch.float64)
    # Factors within 100, in float64: rounding of some hundred operations.
    assert_same_function(model.graph, result.graph, images, tolerance=1e-9)
    single = captured(net())
    # The same in float32.
    assert_same_function(single.graph, migrated(single).graph, images.float(), tolerance=1e-5)


@pytest.mark.parametrize("make", [tiny_vit, tiny_mlp])
def test_the_contract_of_passes_holds(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    result = check_contract(ScaleMigration(), model, tiny_data(model))
    assert "of 4 layer norms" in result.notes[0] or result.notes == ("scales migrated at 0 of 0 layer norms",)


def test_zeros_stay_zeros_and_nonzeros_stay_nonzero() -> None:
    model = captured(Normed())
    result = migrated(model)
    for name in "ab":
        assert torch.equal(result.layer(name).weight == 0, model.layer(name).weight == 0)


def test_the_error_of_quantised_products_falls() -> None:
    model = captured(Normed())
    result = migrated(model)
    assert float(result.notes[0].split(" by ")[1].split(" %")[0]) > 50

    def shift(of: Model) -> float:
        data = tiny_data(of)
        step = Quantize(observer="min-max", refit=False)
        quantised, _ = PassManager([step]).run(of, data)
        images = data.validation.first(64)
        return float((quantised(images) - of(images)).abs().mean())

    assert shift(result) < 0.9 * shift(model)


def test_functional_norms_and_modules_get_the_same_factors() -> None:
    torch.manual_seed(1)
    net = Normed()
    other = Functional()
    other.load_state_dict(net.state_dict())
    one, two = migrated(captured(net)), migrated(captured(other))
    assert torch.equal(one.layer("a").weight, two.layer("a").weight)


def test_readers_of_the_shape_do_not_count() -> None:
    class Shaped(Normed):
        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.stem(x.flatten(1)))
            y = self.norm(x)
            z = self.a(y) * self.b(y)
            return self.head(F.gelu(z.reshape(y.shape[0], y.size(1))))  # type: ignore[no-any-return]

    assert migrated(captured(Shaped())).notes[0].startswith("scales migrated at 1 of 1 ")


@pytest.mark.parametrize(
    "net", [ReadByAnother, TiedReaders, TiedBiases, TiedNorms, UsedTwice, NormTwice, NotAffine, ReadByConvolution]
)
def test_norms_that_other_operations_depend_on_are_left_alone(net: type[nn.Module]) -> None:
    model = captured(net())
    before = copy.deepcopy(model.graph.state_dict())
    result = migrated(model)
    assert result.notes == ("scales migrated at 0 of 0 layer norms",)
    assert all(torch.equal(value, before[name]) for name, value in result.graph.state_dict().items())


def test_a_norm_that_an_excluded_layer_reads_keeps_its_scale() -> None:
    result = migrated(captured(Normed()), ScaleMigration(exclude=("b",)))
    assert result.notes == ("scales migrated at 0 of 0 layer norms",)


def test_without_a_gain_nothing_changes() -> None:
    net = Normed()
    with torch.no_grad():
        net.a.weight.zero_()
        net.b.weight.zero_()
    model = captured(net)
    before = copy.deepcopy(model.graph.state_dict())
    result = migrated(model)
    assert result.notes == ("scales migrated at 0 of 1 layer norms",)
    assert all(torch.equal(value, before[name]) for name, value in result.graph.state_dict().items())


def test_products_that_are_exact_in_8_bits_get_no_factor() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (100, 8), generator=rng).double()
    weight = torch.randint(-127, 128, (5, 8), generator=rng).double()
    x[0, 0], x[1, 0], weight[:, 0] = 0, 255, 127
    assert best_factor(x, weight, "u8", shiftable=False) is None


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["u8", "s8", "fp8"]), st.booleans(), st.booleans())
def test_a_factor_is_taken_only_if_it_lowers_the_error(seed: int, kind: str, shiftable: bool, special: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 12, generator=rng, dtype=torch.float64) * torch.randn(12, generator=rng).exp() ** 2
    weight = torch.randn(7, 12, generator=rng, dtype=torch.float64)
    if special:  # a channel that is never active, a constant one, and one that no weight reads
        x[:, 0], x[:, 1], weight[:, 2] = 0, 3, 0
    found = best_factor(x, weight, kind, shiftable)  # type: ignore[arg-type]
    before = _error(x, weight, x @ weight.T, kind)  # type: ignore[arg-type]
    if found is None:
        return
    factor, shift, gain = found
    assert (factor <= LARGEST_FACTOR).all()
    assert (factor >= 1 / LARGEST_FACTOR).all()
    assert shiftable or not shift.any()
    expected = (x - shift) @ weight.T
    after = _error((x - shift) / factor, weight * factor, expected, kind)  # type: ignore[arg-type]
    assert gain == pytest.approx(1 - after / before, abs=1e-6)
    assert gain >= LEAST_GAIN


def test_no_shift_without_a_bias_to_take_it_up() -> None:
    net = Normed()
    net.a = nn.Linear(16, 16, bias=False)
    model = double(net)
    result = migrated(model)
    assert_same_function(model.graph, result.graph, torch.randn(9, 1, 8, 8).double(), tolerance=1e-9)  # as above


class Broken(Noise):
    """Images that make activations infinite."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return image * 1e38, label


def test_errors() -> None:
    model, data = tiny_vit(), tiny_data(tiny_vit(), 32)
    text = "the spread of activations is measured on calibration images; give --data"
    with pytest.raises(PassError, match=f"scale-migration cannot run: {text}"):
        PassManager([ScaleMigration()]).require_inputs(model, Data())
    with pytest.raises(PassError, match=text):
        PassManager([ScaleMigration()]).run(model, Data())
    with pytest.raises(UsageError, match="scale-migration comes after quantize; put it before"):
        PassManager([Quantize(observer="min-max"), ScaleMigration()]).run(model, data)
    masks = NMMask(NM(2, 4), "magnitude", "none")
    with pytest.raises(UsageError, match="scale-migration comes after a lossy pass; put it before"):
        PassManager([masks, ScaleMigration()]).run(model, data)
    broken = Data(Split(Broken((1, 8, 8), 16), tuple(range(16)), labelled=True))
    with pytest.raises(PassError, match="failed on .*norm.* an activation ranges from"):
        PassManager([ScaleMigration()]).run(model, broken)
