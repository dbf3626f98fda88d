"""Operators that torch.onnx writes for some inputs only: each file gives what torch gives."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.export.onnx_export import lower
from mpcompile.frontend.capture import capture, noise
from mpcompile.testing import tiny_source

SIDE = 8


class Attentions(nn.Module):
    """Attention with 3, 4 and 5 axes and with each kind of mask, on tokens (b, 16, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, stride=2)
        mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
        mask[3] = False  # torch gives zeros for such a row
        self.mask = nn.Buffer(mask)
        self.bias = nn.Buffer(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The results by what is special of each."""
        three = self.embed(x).flatten(2).transpose(1, 2)
        five = three.reshape(-1, 2, 1, 8, 4)
        four = five.squeeze(2)
        eight = self.mask[:8, :8]
        attend = F.scaled_dot_product_attention
        return {
            "three axes": attend(three, three, three, scale=0.3),
            "three axes, mask": attend(three, three, three, attn_mask=self.mask),
            "three axes, bias": attend(three, three, three, attn_mask=self.bias),
            "three axes, causal": attend(three, three, three, is_causal=True),
            "four axes, mask": attend(four, four, four, attn_mask=eight),
            "five axes": attend(five, five, five),
            "five axes, mask": attend(five, five, five, attn_mask=eight),
        }


class ClampedTwice(nn.Module):
    """onnxscript fuses both pairs of clamps, and leaves the bounds of the fused ones out of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Two rows of values for each image."""
        y = self.layer(x)
        first, second = y.clamp(-1, 1).clamp(0, 2), y.clamp(-1, 1).clamp(-2, 0)
        means: Tensor = (first - 2 * second).mean((2, 3))
        return means


@pytest.mark.parametrize("kind", [Attentions, ClampedTwice])
def test_the_file_gives_what_torch_gives(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = capture(kind().eval(), tiny_source(), noise((3, SIDE, SIDE)))
    lower(model, path := tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = noise((3, SIDE, SIDE), batch=3, seed=1)
    found = session.run(list(model.output_names), {model.input_names[0]: images.numpy()})
    for name, one, wanted in zip(model.output_names, found, model.outputs((images,)), strict=True):
        np.testing.assert_allclose(one, wanted.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
