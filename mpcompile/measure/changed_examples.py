"""Example images whose decision the compression changed: what each model decided, by which margin, and a thumbnail."""

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpcompile.data.images import Split
from mpcompile.ir.head import Head
from mpcompile.ir.source import Source
from mpcompile.measure.changed_example import ChangedExample
from mpcompile.measure.margin_agreement import dense_margins

SIDE = 96  # pixels of the longer side of a thumbnail, at most
QUALITY = 80  # of its JPEG


def changed_examples(
    before: NDArray[Any], after: NDArray[Any], labels: NDArray[Any] | None, head: Head, count: int
) -> tuple[ChangedExample, ...]:
    """The images whose decision changed although the dense model's margin was largest, at most `count`, largest first.

    Args:
        before: outputs of the dense model (images, outputs).
        after: those of the compressed one.
        labels: (images,), or None.
        head: how outputs become decisions. Without one decision an image there are no examples.
        count: how many at most.
    """
    if head.kind in ("multilabel", "values") or before.ndim != 2 or not count:
        return ()
    decided = head.decisions(before), head.decisions(after)
    margins = [dense_margins(torch.from_numpy(outputs), head).numpy() for outputs in (before, after)]
    changed = np.flatnonzero(decided[0] != decided[1])
    shown = changed[np.argsort(-margins[0][changed], kind="stable")][:count]
    return tuple(
        ChangedExample(
            index=int(n),
            label=None if labels is None else int(labels[n]),
            dense=int(decided[0][n]),
            compressed=int(decided[1][n]),
            dense_margin=float(margins[0][n]),
            compressed_margin=float(margins[1][n]),
        )
        for n in shown
    )


def with_thumbnails(examples: Sequence[ChangedExample], images: Split, source: Source) -> tuple[ChangedExample, ...]:
    """The examples with a picture of each image, as the model gets it, before mean and deviation are taken out."""
    return tuple(
        replace(example, thumbnail=thumbnail(images.inputs_of([images.order[example.index]])[0][0], source))
        for example in examples
    )


def thumbnail(pixels: Tensor, source: Source) -> str | None:
    """The data URI of a JPEG of pixels (c, h, w) that were normalised as `source` says; None unless c is 1 or 3."""
    channels = len(pixels) if pixels.ndim == 3 else 0
    if channels not in (1, 3) or channels != len(source.mean):
        return None
    mean, std = (torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (source.mean, source.std))
    shades = (pixels.detach().cpu().float() * std + mean).nan_to_num().clamp(0, 1).mul(255).round().byte().numpy()
    if channels == 3 and source.channel_order == "bgr":
        shades = shades[::-1]
    from PIL import Image  # not with the package: it would add to the import of mpcompile

    picture = Image.fromarray(np.ascontiguousarray(shades.transpose(1, 2, 0)) if channels == 3 else shades[0])
    picture.thumbnail((SIDE, SIDE))
    stored = io.BytesIO()
    picture.save(stored, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}"
