"""Kinds of modules: wrappers are taken off, float64 is converted with a warning, quantised modules are refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mpcompile.errors import LoadError
from mpcompile.frontend.capture import capture
from mpcompile.frontend.module_kinds import plain_module
from mpcompile.system.tensor_hashing import state_sha256
from mpcompile.testing import TinyMLP, tiny_source


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = TinyMLP()
    assert plain_module(wrap(module), "models:wrapped") is module
    assert plain_module(nn.DataParallel(wrap(module)), "models:wrapped") is module


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, AveragedModel])
def test_wrappers_around_a_part_are_taken_off_in_a_copy(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = nn.Sequential(wrap(TinyMLP()), nn.Identity())
    found = plain_module(module, "models:wrapped")
    assert found.state_dict().keys() == nn.Sequential(TinyMLP()).state_dict().keys()
    assert type(module[0]) is not TinyMLP
    assert capture(module, tiny_source()).layer("0.head").weight.shape == (10, 32)


def test_float64_is_converted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    module = TinyMLP().double()
    found = plain_module(module, "models:double")
    assert {value.dtype for value in found.parameters()} == {torch.float32}
    assert next(module.parameters()).dtype == torch.float64
    assert "models:double: 6 of its parameters are float64 (the first is stem.weight)" in caplog.text
    assert plain_module(TinyMLP().half(), "models:half").state_dict()["head.weight"].dtype == torch.float16


@pytest.mark.filterwarnings("ignore")
def test_modules_without_floating_point_weights_are_refused() -> None:
    dynamic = torch.ao.quantization.quantize_dynamic(TinyMLP().eval(), {nn.Linear}, dtype=torch.qint8)
    scripted = nn.Module()
    scripted.net = torch.jit.script(TinyMLP())
    for module, text in (
        (
            dynamic,
            r"models:x is quantised: stem is torch.ao.nn.quantized.dynamic.*give the module before quantisation",
        ),
        (scripted, "models:x: net is TorchScript, which torch.fx cannot trace; give the module it was made from"),
        (nn.LazyLinear(2), "models:x: weight has no shape yet"),
        (TinyMLP().to("meta"), "models:x: stem.weight is on the device meta and has no values"),
    ):
        with pytest.raises(LoadError, match=text):
            plain_module(module, "models:x")


class Remembers(TinyMLP):
    """Saves a text beside its tensors."""

    def get_extra_state(self) -> str:
        return "a text"

    def set_extra_state(self, state: str) -> None:
        pass


def test_a_module_with_extra_state_has_a_hash() -> None:
    module = Remembers()
    assert state_sha256(module) == state_sha256(copy.deepcopy(module)) != state_sha256(TinyMLP())
