"""Runs of the pass quantize that several test files share, and the check that weights are scale × integer."""

import torch
from torch import Tensor

from mpcompile.data.images import Data
from mpcompile.ir.model import Model
from mpcompile.ir.pattern import NM
from mpcompile.ir.weight_groups import flat
from mpcompile.passes import NMMask, Quantize
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.pipeline.pass_record import PassRecord
from mpcompile.testing import tiny_data

MASKS = NMMask(NM(2, 4))
PLAIN = Quantize(observer="min-max")


def run(model: Model, *passes: object, data: Data | None = None) -> tuple[Model, PassRecord]:
    result, records = PassManager(passes).run(model, data or tiny_data(model, 48))  # type: ignore[arg-type]
    return result, records[-1]


def integers_of(model: Model, name: str) -> Tensor:
    """The integers of a quantised layer, after checking that its weight is scale × integer exactly."""
    weight, scale = flat(model.layer(name).weight.detach()), model.plan[name].scale
    assert scale is not None
    assert torch.equal(scale, scale.float().to(scale.dtype))  # a file stores float32
    integers = (weight.double() / scale.double()[:, None]).round()
    # No tolerance: the weight is the product, rounded to the dtype of the weight.
    assert torch.equal((integers * scale.double()[:, None]).to(weight.dtype), weight)
    return integers


def assert_exact(model: Model) -> None:
    assert model.scales()
    for name in model.scales():
        assert integers_of(model, name).abs().max() <= 127
