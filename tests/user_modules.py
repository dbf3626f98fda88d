"""A small model of the modules that users have: Conv1d, weight_norm, nn.MultiheadAttention, a tied weight."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mpcompile.frontend.capture import capture
from mpcompile.ir.model import Model
from mpcompile.testing import tiny_source

WIDTH = 16


class UserModules(nn.Module):
    """Tokens from 1-d convolutions, one attention to the tokens and one to half of them, two layers with one weight."""

    pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.conv = weight_norm(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, bias=False))
        self.conv_norm = nn.BatchNorm1d(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.to_half = nn.MultiheadAttention(WIDTH, 2, batch_first=False)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x.flatten(1, 2))).relu()
        x = self.conv_norm(self.conv(x)).relu().transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        tokens = x.transpose(0, 1)
        half = tokens[:4]
        x = x + self.to_half(tokens, half, half)[0].transpose(0, 1)
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def user_modules(seed: int = 0) -> UserModules:
    """The model with random weights and batch-norm statistics."""
    torch.manual_seed(seed)
    module = UserModules().eval()
    for norm in (module.norm, module.conv_norm):
        norm.running_mean = torch.randn(WIDTH) / 4
        norm.running_var = torch.rand(WIDTH) + 0.5
    for attention in (module.attention, module.to_half):
        nn.init.normal_(attention.in_proj_bias, std=0.2)
    return module


def captured_user_modules(seed: int = 0) -> Model:
    """The same, captured."""
    return capture(user_modules(seed), tiny_source())
