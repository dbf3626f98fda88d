"""The small model whose files the tests of this folder read."""

from typing import Any

import timm
from torch import nn

ARCH = "mobilenetv3_small_050"  # the smallest with BatchNorm statistics and a classifier


def build(**arguments: Any) -> nn.Module:
    module: nn.Module = timm.create_model(ARCH, **arguments)
    return module
