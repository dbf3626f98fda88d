"""Computed weights (weight_norm, spectral_norm, prune, parametrizations) become plain ones, in a copy."""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from mpcompile.analysis.eligibility import eligible
from mpcompile.frontend.capture import capture, noise
from mpcompile.frontend.plain_copy import copied, plain_copy
from mpcompile.ir.pattern import TWO_OF_FOUR
from mpcompile.testing import TinyMLP, tiny_source

Wrap = Callable[[nn.Module], object]


class Exp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def old(wrap: Wrap) -> Wrap:
    """The same, without torch's word that it is deprecated."""

    def quiet(layer: nn.Module) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wrap(layer)

    return quiet


KINDS: dict[str, tuple[str, Wrap]] = {
    "weight_norm, hook": ("weight_norm", old(nn.utils.weight_norm)),
    "weight_norm, parametrization": ("weight_norm", parametrizations.weight_norm),
    "spectral_norm, hook": ("spectral_norm", nn.utils.spectral_norm),
    "spectral_norm, parametrization": ("spectral_norm", parametrizations.spectral_norm),
    "orthogonal": ("orthogonal", parametrizations.orthogonal),
    "own": ("Exp", partial(parametrize.register_parametrization, tensor_name="weight", parametrization=Exp())),
    "prune": ("torch.nn.utils.prune", partial(prune.l1_unstructured, name="weight", amount=0.5)),
}


def wrapped_mlp(wrap: Wrap) -> nn.Module:
    torch.manual_seed(0)
    module = TinyMLP()
    wrap(module.hidden)
    module(noise((1, 8, 8)))  # hooks leave a tensor with a gradient behind, which torch does not copy
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_computed_weights_become_plain_in_a_copy(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    name, wrap = KINDS[kind]
    module, images = wrapped_mlp(wrap), noise((1, 8, 8))
    keys, expected = list(module.state_dict()), module(images)
    plain, notes = plain_copy(module)
    assert torch.equal(plain(images), expected)
    assert plain.state_dict().keys() == TinyMLP().state_dict().keys()
    assert type(plain.hidden) is nn.Linear
    assert notes == (f"{name} computes 1 tensor before each use (hidden.weight); they are taken as plain weights",)
    model = capture(module, tiny_source())
    assert isinstance(model.layer("hidden")._parameters["weight"], nn.Parameter)
    assert f"TinyMLP: {notes[0]}" in caplog.text
    # The module itself still computes its weight, as it did.
    assert list(module.state_dict()) == keys
    assert torch.equal(module(images), expected)
    assert torch.equal(copied(module)(images), expected)


def test_parameters_that_several_modules_share() -> None:
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    second.weight = third.weight = first.weight
    for layer in (first, second):
        parametrize.register_parametrization(layer, "weight", Exp())
    plain, notes = plain_copy(nn.Sequential(first, second, third))
    assert plain[0].weight is plain[1].weight  # type: ignore[index]
    assert torch.equal(plain[2].weight.exp(), plain[0].weight)  # type: ignore[index]
    assert notes[0].startswith("Exp computes 2 tensors before each use (0.weight, 1.weight)")
    pruned = nn.Linear(4, 4)
    pruned.weight = third.weight
    prune.l1_unstructured(pruned, "weight", 0.5)
    plain, _ = plain_copy(nn.Sequential(pruned, third))
    assert torch.equal(plain[1].weight, third.weight)  # type: ignore[index]


def test_a_compiled_forward_is_not_copied() -> None:
    module = TinyMLP()
    compiled = torch.compile(module.hidden.forward)
    vars(module.hidden)["forward"] = compiled  # bound to the layer, so a copy would run its weights
    plain, _ = plain_copy(module)
    assert "forward" not in vars(plain.hidden)
    assert "forward" in vars(module.hidden)


class Counted(TinyMLP):
    """Asks for the number of images with `len`, which a recorded run cannot keep; torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(1, 64))
        parametrizations.weight_norm(self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) + self.offset.expand(len(x), 64))  # type: ignore[no-any-return]


def test_a_model_that_torch_export_captures_has_plain_weights() -> None:
    model = capture(Counted(), tiny_source())
    assert model.captured_by == "export"
    assert eligible(model, TWO_OF_FOUR)["hidden"] is None
