"""A segmentation model of torchvision is compressed the whole way: masks, a refit on images, ONNX, and verdicts."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import mpcompile
from mpcompile.frontend.load_model import Request
from mpcompile.recipe.schema import Recipe

SIDE, CLASSES = 64, 5
FCN = Request(f"{__name__}:segmenter", input_size=(3, SIDE, SIDE))
QUICK = Recipe.checked(
    {
        "target": "ort",
        "bench": {"batches": [1], "seconds": 0.05, "threads": 1},
        "passes": ["permute", {"nm-mask": {"pattern": "2:4"}}],
    }
)


def segmenter() -> nn.Module:
    """A FCN of torchvision with an auxiliary head, on a ResNet with one block in each stage."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.resnet import BasicBlock, ResNet
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    torch.manual_seed(0)
    backbone = IntermediateLayerGetter(ResNet(BasicBlock, [1, 1, 1, 1]), {"layer3": "out", "layer2": "aux"})
    module: nn.Module = FCN(backbone, FCNHead(256, CLASSES), FCNHead(128, CLASSES))
    return module.eval()


@pytest.mark.slow
def test_a_segmentation_model_gives_maps_of_both_heads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(16):
        low = rng.integers(0, 256, (4, 4, 3), np.uint8)
        picture = Image.fromarray(low).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "images" / f"{index}.png")
    artifact = mpcompile.compile(FCN, QUICK, data=tmp_path / "images", output=tmp_path / "out")
    report = artifact.report
    assert report.captured is not None
    assert [row.name for row in report.captured.outputs] == ["out", "aux"]
    masked = {row.layer for row in artifact.verify()}
    assert {"backbone.layer3.0.conv2", "classifier.0", "aux_classifier.0"} <= masked

    # Maps of classes are values, with an error and a cosine; no decision is claimed to be the same.
    assert report.comparison is not None
    assert report.comparison.agreement is None
    assert report.comparison.values is not None
    assert 0 < report.comparison.values.relative_error_mean < 1
    assert {row.layer for row in report.verdicts} <= masked

    again = artifact.load("torch", allow_factory=True)
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        maps = again(images)
    assert isinstance(maps, OrderedDict)
    assert {name: tuple(one.shape) for name, one in maps.items()} == dict.fromkeys(
        ("out", "aux"), (3, CLASSES, SIDE, SIDE)
    )
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["out", "aux"], {session.get_inputs()[0].name: images.numpy()})
    for one, wanted in zip(found, maps.values(), strict=True):
        np.testing.assert_allclose(one, wanted.numpy(), atol=1e-4 * float(wanted.abs().max()))
