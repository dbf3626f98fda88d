"""Weights in several files: read by their index, and one of them alone is named for what it is."""

import json
from pathlib import Path

import pytest
import torch
from norm_model import ARCH, same, seeded

from mpcompile.errors import LoadError
from mpcompile.frontend.load_model import Request, load


def test_shards_name_the_cause(tmp_path: Path) -> None:
    state = seeded(1).state_dict()
    part = dict(list(state.items())[:2])
    path = tmp_path / "pytorch_model-00001-of-00003.bin"
    torch.save(part, path)
    with pytest.raises(
        LoadError,
        match=r"is shard 1 of 3, and holds only a part of the weights \(.*missing: .*give the index beside it",
    ):
        load(Request(str(path), arch=ARCH))
    torch.save(dict(state), tmp_path / "model-00001-of-00001.bin")
    request = Request(
        str(tmp_path / "model-00001-of-00001.bin"), arch=ARCH, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,)
    )
    load(request)  # the only one


def test_shards_by_their_index(tmp_path: Path) -> None:
    """An index was refused."""
    module = seeded(1)
    state = module.state_dict()
    names = [f"pytorch_model-0000{1 + count % 2}-of-00002.bin" for count in range(len(state))]
    for file in set(names):
        torch.save({key: state[key] for key, name in zip(state, names, strict=True) if name == file}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    request = Request(str(index), arch=ARCH, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))

    def write(files: dict[str, str]) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))

    files = dict(zip(state, names, strict=True))
    write(files)
    assert same(dict(load(request).module.state_dict()), module)
    for wrong, text in (
        ({}, "has no weight_map, which gives the file of each weight"),
        (files | {"x": "../secret.bin"}, r"lists '../secret.bin', which is not a file beside it; it was not opened"),
        (files | {"x": "pytorch_model-00003-of-00002.bin"}, "which is not beside it; copy all 3 files"),
        (files | {"x": names[0]}, f"has no x, which {index.name} lists there"),
        ({key: name for key, name in files.items() if key != "head.bias"}, "holds head.bias, which .* does not list"),
    ):
        write(wrong)
        with pytest.raises(LoadError, match=text):
            load(request)
