"""Splits along an axis that holds the batch: the file takes any batch size, and never fixes one without a word."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mpcompile.errors import BuildError
from mpcompile.export.onnx_export import lower
from mpcompile.export.split_sizes import with_piece_sizes
from mpcompile.frontend.capture import capture, noise
from mpcompile.ir.model import Model
from mpcompile.testing import tiny_source

SIDE = 8


class Pair(nn.Module):
    """Features of two batches that stand behind each other in one."""

    def forward(self, both: Tensor) -> Tensor:
        """The first batch and twice the second."""
        first, second = both.chunk(2)
        return first + 2 * second


class Views(nn.Module):
    """Splits a batch of two views of each image by number and by size, and splits channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 5)
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        """Scores of each image."""
        both = self.layer(torch.cat([x, x.flip(-1)])).mean((2, 3))
        first, second = both.split(x.shape[0], dim=0)
        left, right = (self.pair(both) + first - second).chunk(2, dim=-1)
        scores: Tensor = self.head(left * right)
        return scores


def views(*leaves: str) -> Model:
    torch.manual_seed(0)
    return capture(Views().eval(), tiny_source(), noise((3, SIDE, SIDE)), leaves)


def test_a_file_with_splits_of_the_batch_takes_any_batch_size(tmp_path: Path) -> None:
    model = views()
    lower(model, path := tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = noise((3, SIDE, SIDE), batch=batch, seed=1)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
        torch.testing.assert_close(found, model.graph(images), rtol=1e-5, atol=1e-5)


def test_only_splits_along_the_batch_are_rewritten() -> None:
    model = views()
    code = model.graph.code
    rewritten = with_piece_sizes(model.graph, model.example_inputs)
    assert model.graph.code == code  # passes read the graph as it was recorded
    assert rewritten.code.count("torch.functional.split") == 2
    assert rewritten.code.count(".chunk(2, dim = -1)") == 1
    images = noise((3, SIDE, SIDE), batch=3, seed=1)
    assert torch.equal(rewritten(images), model.graph(images))
    assert with_piece_sizes(rewritten, model.example_inputs) is rewritten


def test_a_batch_that_torch_fixes_is_an_error_and_no_file(tmp_path: Path) -> None:
    """torch.onnx falls back to the example's batch size, and says so in a warning at most."""
    model = views("pair")  # kept whole, so that its chunk is no node of the graph
    with pytest.raises(BuildError, match=r"fixed images to a batch of 2.*--batch 1"):
        lower(model, tmp_path / "free.onnx")
    assert not (tmp_path / "free.onnx").exists()
    assert lower(model, tmp_path / "one.onnx", batch=1).batch == 1
