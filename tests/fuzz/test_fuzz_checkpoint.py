"""Checkpoints of known content: the right weights are loaded, or the cause of the refusal is named."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzed_models import TINY, loaded, torch_file
from hypothesis import given
from hypothesis import strategies as st
from mutations import share
from torch import Tensor

from mpcompile.errors import LoadError, UsageError
from mpcompile.frontend.checkpoint_weights import AVERAGED
from mpcompile.frontend.load_model import Loaded
from mpcompile.testing import TinyMLP

pytestmark = pytest.mark.filterwarnings("default")

KEYS = ("state_dict", "model", "model_state_dict", "ema", "model_ema", "swa_model", "student", "net", "weights")
PREFIXES = ("", "module.", "model.", "_orig_mod.", "module._orig_mod.", "backbone.", "student.net.")
BESIDE: Mapping[str, Any] = {
    "epoch": 3,
    "step": torch.tensor(7),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "hyper_parameters": {"width": 4, "classes": torch.ones(2)},
    "lr_schedulers": [{"last_epoch": 3}],
}


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(TinyMLP().state_dict())


def pruned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries that torch.nn.utils.prune would save if every weight were kept."""
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("weight"):
            split |= {f"{name}_orig": value, f"{name}_mask": torch.ones_like(value)}
        else:
            split[name] = value
    return split


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, int]]:
    """The content of a checkpoint, and the seed of the weights in it by their name."""
    content: dict[str, Any] = dict(
        draw(st.sets(st.sampled_from(sorted(BESIDE))).map(lambda k: {n: BESIDE[n] for n in k}))
    )
    seeds = {}
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True)):
        seed, prefix = draw(st.integers(0, 3)), draw(st.sampled_from(PREFIXES))
        state = pruned(weights(seed)) if draw(st.integers(0, 4)) == 0 else weights(seed)
        entries = {prefix + name: value for name, value in state.items()}
        if prefix and draw(st.booleans()):
            entries |= {"criterion.weight": torch.ones(4), "n_averaged": torch.tensor(1)}
        outer = draw(st.sampled_from([None, None, "checkpoint"]))
        name = ".".join(filter(None, [outer, key, prefix.rstrip(".")]))
        if outer:
            content.setdefault(outer, {})[key] = entries
        else:
            content[key] = entries
        seeds[name] = seed
    return content, seeds


def is_averaged(name: str) -> bool:
    return bool(AVERAGED & set(name.replace(".", "_").split("_")))


@share(60, 3000)
@given(checkpoints(), st.integers(0, 3), st.data())
def test_the_right_weights_or_a_question(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: tuple[dict[str, Any], dict[str, int]],
    how: int,
    data: st.DataObject,
) -> None:
    content, seeds = checkpoint
    path: Path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    path.write_bytes(torch_file(content))
    key = data.draw(st.sampled_from(sorted(seeds))) if how == 0 else "nothing" if how == 1 else None
    found = loaded(path, dataclasses.replace(TINY, weights_key=key))
    if key == "nothing":
        assert isinstance(found, UsageError)
        assert "--weights-key takes" in str(found)
        return
    names = [key] if key else list(seeds)
    averaged = {seeds[name] for name in names if is_averaged(name)}
    distinct = {seeds[name] for name in names}
    if len(distinct) == 1:
        [seed] = distinct
    elif len(averaged) == 1:
        [seed] = averaged
    else:
        assert isinstance(found, LoadError)
        assert "choose one with --weights-key" in str(found)
        return
    assert isinstance(found, Loaded), str(found)
    expected = weights(seed)
    state = found.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
