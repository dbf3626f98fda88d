"""The bytes of a safetensors file: the same for the same content, and what the library reads."""

import hashlib
import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from mpcompile.system.safetensors_io import tensor_bytes

METADATA = {"format": "pt", "arch": "vit", "source_sha256": "0" * 64, "ü": "é\n"}


def test_the_same_content_is_the_same_bytes_in_every_process() -> None:
    code = (
        "import hashlib, torch\n"
        "from mpcompile.system.safetensors_io import tensor_bytes\n"
        f"content = tensor_bytes({{'b': torch.arange(3), 'a': torch.ones(2, 2)}}, {METADATA!r})\n"
        "print(hashlib.sha256(content).hexdigest())\n"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = tensor_bytes({"b": torch.arange(3), "a": torch.ones(2, 2)}, METADATA)
    assert hashlib.sha256(here).hexdigest() == there


@given(st.permutations(list(METADATA)), st.lists(st.sampled_from("abcde"), unique=True))
def test_the_order_of_metadata_does_not_matter_and_it_is_read_back(keys: list[str], names: list[str]) -> None:
    tensors = {name: torch.arange(len(names) + place).float() for place, name in enumerate(names)}
    content = tensor_bytes(tensors, {key: METADATA[key] for key in keys})
    assert content == tensor_bytes(tensors, METADATA)
    read = load(content)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in read.items())


def test_tied_and_strided_tensors_are_written_out() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    read = load(tensor_bytes({"a": weight, "b": weight, "c": weight.T, "none": torch.zeros(0, 3)}, {}))
    assert torch.equal(read["a"], read["b"])
    assert torch.equal(read["c"], weight.T)
    assert read["none"].shape == (0, 3)
