"""Kinds of checkpoints: the accuracy of the weights that are meant is reported, or the cause of the refusal is named.

Each set of weights permutes the classes by its seed, so each has another accuracy, which is known by construction.
"""

import itertools
import logging
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzed_models import loaded, torch_file
from hypothesis import given
from hypothesis import strategies as st
from known_accuracy import reported, require_right
from mutations import share
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from mpcompile.data.images import Data, Split
from mpcompile.errors import LoadError
from mpcompile.frontend.capture import capture
from mpcompile.frontend.load_model import Loaded, Request

pytestmark = pytest.mark.filterwarnings("ignore")

ARCH = f"{__name__}:Permuted"
REQUEST = Request("", arch=ARCH, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))
CLASSES, COUNT = 4, 32
ORDERS = list(itertools.permutations(range(CLASSES)))
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
PREFIXES = ("", "", "module.", "model.", "_orig_mod.", "module._orig_mod.", "net.backbone.")
FORMATS = ("zip", "zip", "legacy", "safetensors", "parameters", "ordered")
WRAPPERS = ("plain", "key", "key", "lightning", "averaged", "ema", "ema first", "twins", "two keys", "shard")
CHANGES = ("none", "none", "old", "prune", "weight_norm", "quantised", "transposed", "extra", "renamed", "cut", "nan")


class Permuted(nn.Module):
    """Decides which of the first pixels is bright, by weights that are exact in every type, in an order of classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)
        self.register_buffer("table", torch.arange(4), persistent=False)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(8, 64))
            self.stem.bias.zero_()
            self.norm.running_mean.fill_(0.25)  # type: ignore[union-attr]
            self.norm.running_var.fill_(4.0)  # type: ignore[union-attr]
            self.head.weight.zero_()
            self.head.weight[ORDERS[seed], range(CLASSES)] = 8.0
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.stem(x.flatten(1))))
        return logits


class Spots:
    """Images with one bright pixel, whose place is the label."""

    classes = CLASSES

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.zeros(64)
        image[index % CLASSES] = 1
        return image.reshape(1, 8, 8), index % CLASSES


SPLIT = Split(Spots(), tuple(range(COUNT)), labelled=True)
DATA = Data(SPLIT, SPLIT)


def known_accuracy(seed: int) -> float:
    return sum(label == index for index, label in enumerate(ORDERS[seed])) / CLASSES


@cache
def state_of(seed: int) -> dict[str, Tensor]:
    return dict(Permuted(seed).state_dict())


def changed(seed: int, change: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of a seed, of another type and gone through a tool or an accident."""
    module = Permuted(seed)
    if change == "prune":
        prune.custom_from_mask(module.head, "weight", torch.ones_like(module.head.weight))
    elif change == "weight_norm":
        parametrizations.weight_norm(module.head)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in module.state_dict().items()
    }
    if change == "quantised":
        state["head.weight"] = torch.quantize_per_tensor(state_of(seed)["head.weight"], 0.1, 0, torch.qint8)
    elif change == "transposed":
        state["head.weight"] = state["head.weight"].T.contiguous().T
    elif change == "extra":
        state["table"] = torch.arange(4)  # a buffer that is not saved any more
    elif change == "renamed":
        state["fc.weight"] = state.pop("head.weight")
    elif change == "cut":
        state["head.weight"] = state["head.weight"][:, :4]
    elif change == "nan":
        state["stem.bias"] = state["stem.bias"] * float("nan")
    return state


@dataclass(frozen=True)
class Case:
    seed: int
    other: int
    dtype: torch.dtype
    prefix: str
    file: str
    wrapper: str
    change: str
    beside: bool

    def content(self) -> Any:
        """What is saved; the weights of `seed` are those that are meant, beside those of `other`."""
        meant, others = (
            OrderedDict((self.prefix + name, value) for name, value in changed(s, self.change, self.dtype).items())
            for s in (self.seed, self.other)
        )
        if self.change == "old":  # torch before 0.4.1
            meant, others = (
                OrderedDict((k, v) for k, v in state.items() if "tracked" not in k) for state in (meant, others)
            )
        if self.file == "parameters":
            meant = OrderedDict(
                (k, nn.Parameter(v, v.is_floating_point() and v.dtype != torch.qint8)) for k, v in meant.items()
            )
        extra: dict[str, Any] = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
        wrapped: dict[str, Any] = {
            "plain": meant,
            "key": {"weights_of_net": meant},
            "lightning": {"state_dict": {**meant, "loss.weight": torch.ones(3)}},
            "averaged": {**meant, "n_averaged": torch.tensor(7)},
            "ema": {"model": others, "model_ema": meant},
            "ema first": {"state_dict_ema": meant, "state_dict": others},
            "twins": {"student": meant, "teacher": others},
            "two keys": {"student": meant, "copy": dict(meant)},
            "shard": OrderedDict(list(meant.items())[: len(meant) // 2]),
        }
        found = wrapped[self.wrapper]
        if self.beside and self.wrapper not in ("plain", "averaged", "shard"):
            found = {**found, **extra}
        return found

    def bytes(self) -> bytes:
        content = self.content()
        if self.file == "safetensors":
            return save({name: value.contiguous().clone() for name, value in content.items()})
        return torch_file(content, zipped=self.file != "legacy")

    @property
    def causes(self) -> tuple[str, ...]:
        """What an error has to say, one of them; empty if the weights fit."""
        causes = {"quantised": "quantised", "renamed": "head.weight", "cut": "against", "nan": "NaN"}
        found = [causes[self.change]] if self.change in causes else []
        found += ["shard 1 of 2"] if self.wrapper == "shard" else []
        found += ["--weights-key"] if self.wrapper == "twins" and self.seed != self.other else []
        # Without a prefix, nothing tells other entries from the weights.
        beside = {"lightning": "unexpected: loss.weight", "averaged": "unexpected: n_averaged"}
        found += [beside[self.wrapper]] if not self.prefix and self.wrapper in beside else []
        return tuple(found)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    case = Case(
        seed=draw(st.integers(0, len(ORDERS) - 1)),
        other=draw(st.integers(0, len(ORDERS) - 1)),
        dtype=draw(st.sampled_from(DTYPES)),
        prefix=draw(st.sampled_from(PREFIXES)),
        file=draw(st.sampled_from(FORMATS)),
        wrapper=draw(st.sampled_from(WRAPPERS)),
        change=draw(st.sampled_from(CHANGES)),
        beside=draw(st.booleans()),
    )
    flat = case.wrapper in ("plain", "averaged", "shard") and case.change != "quantised"
    return case if flat or case.file != "safetensors" else Case(**{**vars(case), "file": "zip"})


@share(60, 3000)
@given(cases())
def test_accuracy_of_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, case: Case
) -> None:
    shard = case.wrapper == "shard"
    suffix = "safetensors" if case.file == "safetensors" else "bin"
    folder = tmp_path_factory.mktemp("kinds")
    path: Path = folder / (f"model-00001-of-00002.{suffix}" if shard else f"model.{suffix}")
    path.write_bytes(case.bytes())
    with caplog.at_level(logging.WARNING, "mpcompile"):
        found = loaded(path, REQUEST)
    path.unlink()
    folder.rmdir()
    if case.causes:
        assert isinstance(found, LoadError), case
        assert any(cause in str(found) for cause in case.causes), found
        return
    assert isinstance(found, Loaded), found
    comparison, notes = reported(capture(found.module, found.source), DATA)
    assert comparison.dense is not None
    require_right(comparison, notes, known_accuracy(case.seed))
