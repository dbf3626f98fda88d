"""Coupling of channels: which may be exchanged after reductions, how groups print, and layers that share a weight."""

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.data.images import Data
from mpcompile.frontend.capture import capture
from mpcompile.passes import Permute
from mpcompile.passes.permute.coupling import couple
from mpcompile.pipeline.pass_manager import PassManager
from mpcompile.testing import assert_same_function, tiny_source, tiny_vit


class Summed(nn.Module):
    """A reduction between two layers, over all or part of the channel axis."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.mid, self.head, self.how = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x.squeeze(1))
        if self.how == "softmax":
            y = y.softmax(-1)
        elif self.how == "half":
            y = y - y[..., :8].mean(-1, keepdim=True)
        elif self.how == "all":
            y = y - y.mean(-1, keepdim=True)
        elif self.how == "heads":
            y = y.reshape(-1, 8, 4, 4)
            y = (y - y.mean(-1, keepdim=True)).reshape(-1, 8, 16)
        return self.head(self.mid(y).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("how", "sizes"), [("all", [16]), ("half", [8, 8]), ("softmax", []), ("heads", [])])
def test_reductions_keep_their_channels_together(how: str, sizes: list[int]) -> None:
    model = capture(Summed(how), tiny_source())
    groups = [group for group in couple(model).groups if any(axis.owner == "mid.weight" for axis in group.readers)]
    assert sorted(channels.size for group in groups for channels in group.sets) == sizes


def test_a_group_prints_its_layers_and_reasons() -> None:
    [text] = [str(group) for group in couple(tiny_vit()).groups if "blocks.0.attn.proj" in str(group)]
    assert text.splitlines()[0] == "32 channels in 2 sets of 16 read by blocks.0.attn.proj.weight"
    assert "reordered with them: blocks.0.attn.qkv.weight, blocks.0.attn.qkv.bias" in text
    assert "not moved: queries and keys are multiplied with each other, channel by channel" in text


def test_layers_that_share_a_weight_are_reordered_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = (nn.Linear(i, 16) for i in (64, 16, 16, 16))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.b(F.relu(self.a(self.stem(x.flatten(1)))))))  # type: ignore[no-any-return]

    model = capture(Tied(), tiny_source())
    result, _ = PassManager([Permute()]).run(model, Data())
    assert_same_function(model.graph, result.graph, model.example, 1e-5)
