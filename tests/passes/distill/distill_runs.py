"""Runs of the distillation that several test files share."""

import torch
from torch import Tensor

from mpcompile.data.images import Data
from mpcompile.ir.model import Model
from mpcompile.passes import Distill, NMMask
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import tiny_data

QUICK = Distill(epochs=2, batch=16, rate=1e-3, warmup=2)


MASKS = NMMask(criterion="magnitude", refit="none")


def run(model: Model, *passes: object, data: Data | None = None) -> Model:
    result, _ = PassManager(passes).run(model, data or tiny_data(model))  # type: ignore[arg-type]
    return result


def weights(model: Model) -> dict[str, Tensor]:
    return dict(model.graph.state_dict())


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
