"""Compress a detector without anchors by a metric of its own: the IoU of its boxes with those of drawn squares.

    python examples/detection.py OUTPUT

The model returns a map (b, 5, 8, 8): for each cell the logit that a square has its centre there, and four distances.
A map has no classes, so the report compares maps by their relative error and cosine similarity, and --max-drop limits
the metric.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from mpcompile import NM, Artifact, Recipe, compile
from mpcompile.passes import NMMask, Restore
from mpcompile.recipe.schema import BenchOptions, DataChoice, Gates

SIZE, STRIDE = 32, 4
CELLS = SIZE // STRIDE
MAX_DROP = 0.03  # of mean IoU
RECIPE = Recipe(
    head="values",
    gates=Gates(max_drop=MAX_DROP),
    data=DataChoice(calibration=64, validation=64),
    bench=BenchOptions(batches=(1,), seconds=0.2),
)


class Detector(nn.Module):
    """A convolution net with a head for the centre and the size of the square."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, SIZE, SIZE), "mean": (0.5,), "std": (0.5,)}
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(2 * width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(torch.relu(self.stem(x))))  # type: ignore[no-any-return]


def sample(index: int) -> tuple[Tensor, Tensor]:
    """An image (1, 32, 32) with a bright square in noise, and its box: left, top, right, bottom in pixels."""
    rng = torch.Generator().manual_seed(index)
    side = int(torch.randint(6, 14, (), generator=rng))
    left, top = (int(torch.randint(0, SIZE - side, (), generator=rng)) for _ in range(2))
    image = 0.3 * torch.randn(1, SIZE, SIZE, generator=rng)
    image[:, top : top + side, left : left + side] += 1.5
    return image, torch.tensor([left, top, left + side, top + side], dtype=torch.float32)


def samples(count: int = 384) -> list[tuple[Tensor, Tensor]]:
    """Samples that the training has not seen."""
    return [sample(100_000 + index) for index in range(count)]


def cell_of(boxes: Tensor) -> Tensor:
    """The number of the cell that holds the centre of each box (b,)."""
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2 / STRIDE).long()
    return centre[:, 1] * CELLS + centre[:, 0]


def boxes_of(outputs: Tensor) -> Tensor:
    """The box of the likeliest cell (b, 4)."""
    flat = outputs.flatten(2)
    cell = flat[:, 0].argmax(1)
    distance = STRIDE * flat[torch.arange(len(flat)), 1:, cell]
    centre = (torch.stack([cell % CELLS, cell // CELLS], 1) + 0.5) * STRIDE
    return torch.cat([centre - distance[:, :2], centre + distance[:, 2:]], 1)


def box_iou(outputs: Tensor, targets: Tensor) -> Tensor:
    """The intersection over union of the found box and the drawn one, for each image (b,)."""
    found = boxes_of(outputs)
    overlap = (torch.minimum(found[:, 2:], targets[:, 2:]) - torch.maximum(found[:, :2], targets[:, :2])).clamp_min(0)
    areas = [(box[:, 2:] - box[:, :2]).clamp_min(0).prod(1) for box in (found, targets)]
    both = overlap.prod(1)
    return both / (areas[0] + areas[1] - both)


def loss_of(outputs: Tensor, boxes: Tensor) -> Tensor:
    """Cross-entropy over the cells, and the error of the four distances at the right cell."""
    flat, cell = outputs.flatten(2), cell_of(boxes)
    centre = (torch.stack([cell % CELLS, cell // CELLS], 1) + 0.5) * STRIDE
    wanted = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], 1) / STRIDE
    found = flat[torch.arange(len(flat)), 1:, cell]
    return nn.functional.cross_entropy(flat[:, 0], cell) + nn.functional.smooth_l1_loss(found, wanted)


def trained(steps: int = 120) -> Detector:
    """The model after a short training on other samples."""
    torch.manual_seed(0)
    model = Detector()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, boxes = map(torch.stack, zip(*(sample(index) for index in range(512)), strict=True))
    for step in range(steps):
        chosen = (torch.arange(32) + 32 * step) % 512
        loss = loss_of(model(images[chosen]), boxes[chosen])
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
        metric=box_iou,
        output=output,
    )


if __name__ == "__main__":
    [folder] = sys.argv[1:]
    report = compress(Path(folder)).report
    print(*report.verdict, sep="\n")
