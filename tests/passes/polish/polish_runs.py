"""Models and images for tests of the pass polish."""

import torch
from failing_images import Failing
from torch import Tensor

from mpcompile.data.images import Data, Split
from mpcompile.ir.model import Model
from mpcompile.passes import NMMask, Polish
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.pipeline.pass_record import PassRecord
from mpcompile.testing import Noise

MASKS = NMMask(criterion="magnitude", refit="none")
SHORT = Polish(steps=40, batch=8)


def images(most: int = 1 << 30, count: int = 64) -> Data:
    """64 images to train on, of which `most` can be read, and `count` others for validation."""
    training = Split(Failing((1, 8, 8), 64, most=most), tuple(range(64)), labelled=True)
    return Data(training=training, validation=Split(Noise((1, 8, 8), count, 1), tuple(range(count)), labelled=False))


def run(model: Model, *passes: object, data: Data | None = None) -> tuple[Model, PassRecord]:
    """The model after the passes, and the record of the last."""
    result, records = PassManager(passes).run(model, data or images())  # type: ignore[arg-type]
    return result, records[-1]


def weights(model: Model) -> dict[str, Tensor]:
    """Every tensor of the graph by name, copied."""
    return {name: value.detach().clone() for name, value in model.graph.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)
