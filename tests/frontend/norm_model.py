"""A small module with a batch norm, its state dicts, and what is loaded from a checkpoint of it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.frontend.load_model import Request, load

ARCH = "norm_model:Normed"


class Normed(nn.Module):
    """A convolution, a batch norm and a head, with a table that the state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.register_buffer("index", torch.arange(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(x)).mean((2, 3)))
        return out


class Computes(Normed):
    """A class whose layers compute their weights."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.conv)
        nn.utils.parametrizations.spectral_norm(self.head)


def seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Normed()


def loaded(path: Path, content: Any, key: str | None = None) -> dict[str, Tensor]:
    torch.save(content, path / "model.pt")
    request = Request(str(path / "model.pt"), arch=ARCH, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,), weights_key=key)
    return dict(load(request).module.state_dict())


def same(found: dict[str, Tensor], module: nn.Module) -> bool:
    return all(torch.equal(value, found[name]) for name, value in module.state_dict().items())
