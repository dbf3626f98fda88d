"""CNNs with random weights, for timings: a CIFAR ResNet-20, and those of timm."""

from itertools import pairwise

import timm
import torch
from torch import nn

CIFAR = "cifar_resnet20"
CIFAR_PIXELS, PIXELS = 32, 224


class _Block(nn.Module):
    """A residual block of two 3×3 convolutions; a 1×1 convolution of stride 2 where the number of channels doubles."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = out // channels
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Identity() if stride == 1 else nn.Sequential(nn.Conv2d(channels, out, 1, 2), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.skip(x)).relu()  # type: ignore[no-any-return]


def _cifar_resnet() -> nn.Module:
    """Returns the ResNet-20 for images of 32 pixels, with 16, 32 and 64 channels."""
    channels = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [_Block(a, b) for a, b in pairwise(channels)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def pixels_of(name: str) -> int:
    """Returns the height and width of a model's images."""
    return CIFAR_PIXELS if name == CIFAR else PIXELS


def untrained(name: str) -> nn.Module:
    """Returns a CNN with random weights, in evaluation mode: CIFAR, or one of timm.

    Batch norms get random scales. timm starts the last one of each residual block at 0, which would fold into weights
    of zeros, and a kernel that skips zeros would skip the layer.
    """
    torch.manual_seed(0)
    net = (_cifar_resnet() if name == CIFAR else timm.create_model(name, pretrained=False)).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return net
