"""The accuracy that a training checkpoint records for its weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Keys of common training scripts: torchvision's and PyTorch's ImageNet examples, and CIFAR scripts. `metric` is timm's.
ACCURACY_KEYS = (
    "best_acc1",
    "best_prec1",
    "best_top1",
    "best_acc",
    "best_accuracy",
    "acc1",
    "prec1",
    "top1",
    "val_acc",
    "acc",
    "accuracy",
)


def claimed_accuracy(content: Mapping[Any, Any]) -> float | None:
    """The top-1 accuracy in [0, 1] that a checkpoint records, or None. Values above 1 are in percent."""
    keys = [key for key in ACCURACY_KEYS if key in content]
    if "metric" in content and _timm_metric(content.get("args")) == "top1":
        keys.append("metric")
    for key in keys:
        value = content[key]
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 100:
            return float(value) if value <= 1 else value / 100
    return None


def _timm_metric(args: object) -> object:
    """The name of the metric that timm's training script recorded as `metric`; None for another script's file."""
    return args.get("eval_metric") if isinstance(args, Mapping) else getattr(args, "eval_metric", None)
