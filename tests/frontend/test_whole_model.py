"""Parts of models of torchvision and transformers: what they get, and that they can be put back."""

from typing import Any

import pytest
import torch
from part_models import Detector
from torch import nn

from mpcompile.errors import CaptureError
from mpcompile.frontend.capture import capture
from mpcompile.frontend.submodule import candidates, submodule_named, suggestion
from mpcompile.frontend.whole_model import open_whole
from mpcompile.ir.output_tree import flattened


def put_back(module: nn.Module, pattern: str, *size: int) -> tuple[int, int]:
    """Captures the part, and asserts that the model returns the same with it in place of the part.

    Returns the number of inputs and of outputs of the part.
    """
    torch.manual_seed(1)
    images, others = torch.randn(2, *size), torch.randn(3, *size)
    whole = open_whole(module, pattern, images, others)
    model = capture(whole.held_part(), example=whole.part_inputs(images))
    assert all(name.startswith(whole.call.part) for name, _ in model.layers())
    (_, wanted), (_, found) = flattened(whole.run(others)), flattened(whole.run_with(model, others))
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (_, one), (_, two) in zip(wanted, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    return len(model.input_names), len(model.output_names)


@pytest.mark.parametrize(
    ("name", "pattern", "outputs"),
    [
        ("ssdlite320_mobilenet_v3_large", "backbone", 6),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "backbone", 3),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "backbone.body", 2),
    ],
)
def test_the_backbone_of_a_torchvision_detector(name: str, pattern: str, outputs: int) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"min_size": 64, "max_size": 64} if name.startswith("faster") else {}
    module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, **sizes)
    assert put_back(module, pattern, 3, 64, 64) == (1, outputs)


def test_parts_of_segformer() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[16, 16], depths=[1, 1], num_attention_heads=[1, 2], num_encoder_blocks=2, sr_ratios=[2, 1],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    module = transformers.SegformerForSemanticSegmentation(config)
    for pattern in ("segformer", "segformer.stages.1"):
        inputs, outputs = put_back(module, pattern, 3, 32, 32)
        assert (inputs, outputs >= 1) == (1, True)
    assert put_back(module, "decode_head", 3, 32, 32) == (2, 1)  # two maps, and one map of scores


def test_stages_of_a_torchvision_classifier() -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    module = models.resnet18(weights=None, num_classes=4)
    assert put_back(module, "layer4", 3, 32, 32) == (1, 1)
    assert submodule_named(module, "layer4*") == "layer4"  # of nested ones the outermost
    assert candidates(module).startswith("layer4 (75.1% of the parameters)")


def test_a_model_that_cannot_be_captured_whole_gets_the_option_for_its_part() -> None:
    class Chosen(Detector):
        def forward(self, images: Any, targets: Any = None) -> Any:
            scores = self.head(self.backbone(images)["coarse"])
            return scores[scores[:, 4].flatten(1).mean(1) > 0]

    what = r"ompress only its part backbone, which has 98% of the parameters: --submodule backbone$"
    for module, why in ((Chosen(), "with --leaf NAME, or c"), (Detector(), r"takes a list of images, .*\. C")):
        with pytest.raises(CaptureError, match=why + what):
            capture(module, example=torch.randn(2, 3, 16, 16))
    small = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    assert suggestion(small) == ""
    assert suggestion(Detector(), around=["backbone", "backbone.one", "backbone.two"]) == ""
