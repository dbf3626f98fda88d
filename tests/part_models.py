"""Small models with a part to compress: a detector that takes a list of images, and a classifier."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


class Body(nn.Module):
    """Two maps of features by name, as a feature pyramid returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.one = nn.Conv2d(16, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.out_channels = 16

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        x = torch.relu(self.stem(x))
        fine = torch.relu(self.one(x))
        return OrderedDict([("fine", fine), ("coarse", torch.relu(self.two(fine)))])


class Detector(nn.Module):
    """Resizes and pads a list of images, runs `backbone`, and returns the boxes of each image above a score."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Body()
        self.head = nn.Conv2d(16, 5, 1)
        self.pretrained_cfg = {"input_size": (3, 12, 12)}

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        if not isinstance(images, list):
            raise TypeError("images are a list of tensors")
        resized = [nn.functional.interpolate(one[None], size=(16, 16))[0] for one in images]
        features = self.backbone(torch.stack(resized))
        assert self.backbone.out_channels == features["fine"].shape[1]
        found = []
        for row in self.head(features["coarse"]).flatten(2).transpose(1, 2):
            kept = row[:, 4] > row[:, 4].median()
            found.append({"boxes": row[kept][:, :4], "scores": row[kept][:, 4]})
        return found


class Classifier(nn.Module):
    """Three stages and a classifier; `stage2` gets features and two constants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stage1 = nn.Conv2d(3, 16, 3, padding=1)
        self.stage2 = Stage()
        self.stages = nn.ModuleList([nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)])
        self.register_buffer("shift", torch.arange(16.0)[:, None, None] / 16)
        self.fc = nn.Linear(16, 10)
        self.pretrained_cfg = {"input_size": (3, 8, 8)}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stage1(x))
        x = self.stage2(x, shift=self.shift, scale=0.5)
        for stage in self.stages:
            x = torch.relu(stage(x))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


class Fusing(Classifier):
    """A classifier whose part `fuse` gets two maps of features."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = Fuse()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stage1(x))
        result: Tensor = self.fc(self.fuse(coarse=nn.functional.avg_pool2d(x, 2), fine=x).mean((2, 3)))
        return result


class Fuse(nn.Module):
    """Joins a fine and a coarse map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        result: Tensor = self.b(torch.relu(self.a(fine) + nn.functional.interpolate(coarse, scale_factor=2)))
        return result


class Stage(nn.Module):
    """Two convolutions of features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0) -> Tensor:
        result: Tensor = self.b(torch.relu(self.a(x))) * scale + shift
        return result
