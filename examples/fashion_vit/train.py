"""Train the small ViT of this folder on Fashion-MNIST; writes model.safetensors (fp16) and config.json.

    python examples/fashion_vit/train.py --data /usr/share/datasets/fashion-mnist

--data has the four idx files of https://github.com/zalandoresearch/fashion-mnist (MIT), or of Debian's package
`dataset-fashion-mnist`. 5,000 training images are held out to choose the epochs, the learning rate and the
augmentation. The test images are used once, after the last epoch.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from fashion_mnist import read_split
from safetensors.torch import save_file
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

HERE = Path(__file__).parent
CLASSES = [
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
]  # fmt: skip
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 28,
    "patch_size": 4,  # 49 tokens, enough for token merging
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "class_token": False,
    "global_pool": "avg",  # learns much faster than a class token on so few images
}
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images
HELD_OUT = 5000


def tensors(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Returns normalised images (n, 1, 28, 28) and labels (n,) of the split `train` or `t10k`."""
    images, labels = read_split(folder, split)
    x = torch.from_numpy(images.copy()).unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
    return x, torch.from_numpy(labels.astype(np.int64))


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Returns the images (n, 1, 28, 28), each mirrored with probability 1/2 and shifted by up to 2 pixels per axis."""
    flip = torch.rand(len(x), generator=rng) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    padded = nn.functional.pad(x, (2, 2, 2, 2), value=-MEAN / STD)
    dy, dx = torch.randint(0, 5, (2, len(x)), generator=rng)
    rows = (dy[:, None] + torch.arange(28))[:, :, None]
    columns = (dx[:, None] + torch.arange(28))[:, None, :]
    return padded[torch.arange(len(x))[:, None, None], 0, rows, columns].unsqueeze(1)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns top-1 in 0 ... 1; sets the model to evaluation mode."""
    model.eval()
    hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return hits / len(y)


def main() -> None:
    """Trains, measures the stored weights on the test images, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four Fashion-MNIST .gz files")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate after warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16; faster on CPUs with bfloat16")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for both files")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    x, y = tensors(args.data, "train")
    order = torch.randperm(len(x), generator=rng)
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]

    model = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), drop_path_rate=0.05, **MODEL_ARGS)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.rate, weight_decay=0.05)
    steps = len(train) // args.batch
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=steps * args.epochs,
        lr_min=1e-5,
        warmup_t=steps // 2,
        warmup_lr_init=1e-5,
        t_in_epochs=False,
    )
    loss_of = LabelSmoothingCrossEntropy(0.1)

    for epoch in range(args.epochs):
        model.train()
        started, total = time.perf_counter(), 0.0
        shuffled = train[torch.randperm(len(train), generator=rng)]
        for i, batch in enumerate(shuffled[: steps * args.batch].split(args.batch)):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = loss_of(model(augment(x[batch], rng)), y[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step_update(epoch * steps + i + 1)
            total += loss.item()
        top1 = accuracy(model, x[held_out], y[held_out])
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}: loss {total / steps:.4f}, held-out {top1:.4f}, {seconds:.0f} s", flush=True)

    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    model.load_state_dict(half)  # so that the rounded weights are measured
    test_top1 = accuracy(model, *tensors(args.data, "t10k"))
    print(f"test accuracy of the stored weights: {test_top1:.4f} (10,000 images)")

    args.output.mkdir(parents=True, exist_ok=True)
    save_file(half, args.output / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(CLASSES),
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [1, 28, 28],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [MEAN],
            "std": [STD],
            "num_classes": len(CLASSES),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "label_names": CLASSES,
            "license": "mit",
        },
        "measured": {"data": "Fashion-MNIST test, 10,000 images", "top1": round(test_top1, 4), "weights": "fp16"},
    }
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
