"""Compress a segmentation model by a metric of its own: mean IoU over shapes that this script draws.

    python examples/segmentation.py OUTPUT

The command line does the same with a trained checkpoint, in the folder of this file:

    mpcompile WEIGHTS --arch segmentation:Segmenter --pattern 2:4 --data segmentation:samples \
        --metric segmentation:iou --max-drop 0.02 -o OUTPUT
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from mpcompile import NM, Artifact, Recipe, compile
from mpcompile.passes import NMMask, Restore
from mpcompile.recipe.schema import BenchOptions, DataChoice, Gates

SIZE, CLASSES = 32, 3  # background, disc, square
MAX_DROP = 0.02  # of mean IoU
RECIPE = Recipe(
    gates=Gates(max_drop=MAX_DROP),
    data=DataChoice(calibration=64, validation=64),
    bench=BenchOptions(batches=(1,), seconds=0.2),
)


class Segmenter(nn.Module):
    """A small encoder and decoder; returns the logits of the classes at each pixel, (b, 3, 32, 32)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, SIZE, SIZE), "mean": (0.5,), "std": (0.5,)}
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.stem(x))
        deep = torch.relu(self.deep(torch.relu(self.down(fine))))
        deep = nn.functional.interpolate(deep, scale_factor=2.0, mode="nearest")
        return self.head(fine + torch.relu(self.up(deep)))  # type: ignore[no-any-return]


def sample(index: int) -> tuple[Tensor, Tensor]:
    """An image (1, 32, 32) with a disc and a square in noise, and the class of each pixel (32, 32)."""
    rng = torch.Generator().manual_seed(index)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    cy, cx, top, left = (int(torch.randint(5, SIZE - 9, (), generator=rng)) for _ in range(4))
    classes = torch.zeros(SIZE, SIZE, dtype=torch.long)
    classes[(y >= top) & (y < top + 8) & (x >= left) & (x < left + 8)] = 2
    classes[(y - cy) ** 2 + (x - cx) ** 2 <= 16] = 1
    image = classes.float() - 1 + 0.2 * torch.randn(SIZE, SIZE, generator=rng)
    return image[None], classes


def samples(count: int = 384) -> list[tuple[Tensor, Tensor]]:
    """Samples that the training has not seen."""
    return [sample(100_000 + index) for index in range(count)]


def iou(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over classes of the intersection over union, for each image (b,)."""
    found = outputs.argmax(1)
    ratios = []
    for one in range(CLASSES):
        both = ((found == one) & (targets == one)).sum((1, 2))
        either = ((found == one) | (targets == one)).sum((1, 2))
        ratios.append((both + 1e-6) / (either + 1e-6))
    return torch.stack(ratios).mean(0)


def trained(steps: int = 60) -> Segmenter:
    """The model after a short training on other samples."""
    torch.manual_seed(0)
    model = Segmenter()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, classes = map(torch.stack, zip(*(sample(index) for index in range(256)), strict=True))
    for step in range(steps):
        chosen = torch.arange(32) + 32 * step
        loss = nn.functional.cross_entropy(model(images[chosen % 256]), classes[chosen % 256])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def compress(output: Path) -> Artifact:
    """The compressed model, whose mean IoU on held-out images is at most MAX_DROP lower."""
    return compile(
        trained(),
        RECIPE,
        passes=[NMMask(NM(1, 4)), Restore(max_drop=MAX_DROP / 2)],
        data=samples(),
        metric=iou,
        output=output,
    )


if __name__ == "__main__":
    [folder] = sys.argv[1:]
    report = compress(Path(folder)).report
    print(*report.verdict, sep="\n")
