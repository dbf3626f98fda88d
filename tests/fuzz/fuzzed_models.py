"""Requests and files of weights that the fuzz tests of models share."""

import argparse
import io
import math
from pathlib import Path
from typing import Any

import torch
from mutations import answer
from safetensors.torch import save

from mpcompile.frontend.load_model import Loaded, Request, load
from mpcompile.testing import TinyMLP

STATE = TinyMLP().state_dict()


TINY = Request("", arch="mpcompile.testing:TinyMLP", input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))


VIT = "vit_tiny_patch16_224"


def torch_file(content: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


BASES = {
    "safetensors": save(STATE, metadata={"format": "pt"}),
    "zip": torch_file(STATE),
    "legacy": torch_file(STATE, zipped=False),
    "checkpoint": torch_file({"arch": VIT, "args": argparse.Namespace(num_classes=3, img_size=16), "epoch": 1,
    "state_dict": STATE}),
}  # fmt: skip


def loaded(path: Path, request: Request = TINY) -> Any:
    """The answer to a file; what was loaded is finite, and its folder holds no more than before."""
    before = sorted(path.parent.iterdir())
    content = path.read_bytes()
    found = answer(
        lambda: load(Request(**{**{f: getattr(request, f) for f in request.__dataclass_fields__}, "model": str(path)}))
    )
    if isinstance(found, Loaded):
        for value in found.module.state_dict().values():
            assert not value.is_floating_point() or value.isfinite().all()
        assert all(map(math.isfinite, found.source.mean + found.source.std))
        assert all(isinstance(side, int) and side > 0 for side in found.source.size)
    assert sorted(path.parent.iterdir()) == before
    assert path.read_bytes() == content
    return found
