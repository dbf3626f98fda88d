"""Files of weights gone wrong: each loads with finite weights of the right shapes or is refused; no pickle runs."""

import argparse
import io
import json
import math
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzed_models import BASES, STATE, VIT, loaded, torch_file
from hypothesis import given
from hypothesis import strategies as st
from mutations import Canary, damaged, deep, odd, pickled, share, values

from mpcompile.errors import LoadError, MpcompileError

pytestmark = pytest.mark.filterwarnings("default")  # warnings are errors in the suite, and not where it is used


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.pt"


def rezipped(content: bytes, changes: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> bytes:
    """A torch archive with some records replaced or removed (by the end of their names), or all of them compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", method) as new:
        for name in old.namelist():
            change = next((end for end in changes if name.endswith(end)), None)
            if change is None or changes[change] is not None:
                new.writestr(name, old.read(name) if change is None else changes[change] or b"")
    return file.getvalue()


@share(200, 5000)
@given(st.sampled_from(sorted(BASES)).flatmap(lambda kind: damaged(BASES[kind])))
def test_damaged_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    loaded(path)


def odd_tensors() -> dict[str, torch.Tensor]:
    """Tensors that no layer has."""
    weight = STATE["hidden.weight"]
    shared = torch.zeros(4)
    found = {
        "complex": weight.to(torch.complex64),
        "coo": weight.to_sparse(),
        "csr": weight.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "per channel": torch.quantize_per_channel(weight, torch.ones(32), torch.zeros(32), 0, torch.qint8),
        "wide": shared[:1].expand(2**20, 2**20),
        "overlapping": torch.zeros(2**21).as_strided((2**20, 2**20), (1, 1)),
        "expanded": shared[:1].expand(32, 32),
        "meta": torch.empty(32, 32, device="meta"),
        "empty": torch.zeros(0, 32),
        "scalar": torch.zeros(()),
        "nan": torch.full((32, 32), math.nan),
        "inf": torch.full((32, 32), math.inf),
        "overflow": torch.full((32, 32), 1e300, dtype=torch.float64),
        "parameter": torch.nn.Parameter(weight.clone()),
        "transposed": weight.T,
        "negated": torch.view_as_complex(torch.zeros(32, 32, 2)).conj().imag,
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    }
    names = (
        "float64",
        "float16",
        "bfloat16",
        "int8",
        "uint8",
        "int64",
        "bool",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e8m0fnu",
    )
    found |= {name: weight.to(getattr(torch, name)) for name in names if hasattr(torch, name)}
    if hasattr(torch, "float4_e2m1fn_x2"):
        found["float4"] = torch.zeros(32, 32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    return found


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # sparse and nested tensors are prototypes, says torch
    TENSORS = odd_tensors()
NAMES = [*STATE, "", "x", "module.head.bias", "head", "head.weight.", "\x1b[0m", "num_batches_tracked"]


@st.composite
def contents(draw: st.DrawFn) -> Any:
    """What a torch file might hold, with odd tensors, keys and values."""
    state: dict[Any, Any] = dict(STATE)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(NAMES) | st.integers(-1, 1) | st.none() | st.tuples(st.integers()))
        how = draw(st.integers(0, 3))
        if how == 0:
            state.pop(key, None)
        elif how == 1:
            state[key] = draw(odd | values)
        else:
            state[key] = TENSORS[draw(st.sampled_from(sorted(TENSORS)))]
    for wrapper in draw(
        st.lists(st.sampled_from(["state_dict", "model", "module", "state_dict_ema", "net"]), max_size=2)
    ):
        state = {wrapper: state, draw(st.sampled_from(["arch", "epoch", "args"])): draw(values)}
    if draw(st.integers(0, 9)) == 0:
        state["state_dict"] = state
    return state if draw(st.integers(0, 19)) else draw(values)


@share(150, 2500)
@given(contents(), st.booleans())
def test_contents(path: Path, content: Any, zipped: bool) -> None:
    try:
        path.write_bytes(torch_file(content, zipped))
    except Exception:  # torch cannot write it; then no file has it
        return
    loaded(path)


@pytest.mark.parametrize("name", sorted(TENSORS))
@pytest.mark.parametrize("key", ["hidden.weight", "head.bias", "more"])
def test_every_odd_tensor(path: Path, name: str, key: str) -> None:
    path.write_bytes(torch_file({**STATE, key: TENSORS[name]}))
    found = loaded(path)
    plain = key == "hidden.weight" and name != "nested"  # which has no shape to ask for
    fits = plain and TENSORS[name].shape == (32, 32) and TENSORS[name].is_floating_point()
    assert isinstance(found, MpcompileError) or (fits and name not in ("nan", "inf", "overflow"))


@share(60, 1500)
@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from(["bare", "zip", "legacy", "inside", "record", "args"]),
    st.data(),
)
def test_no_pickled_code_runs(path: Path, way: int, protocol: int, where: str, data: st.DataObject) -> None:
    canary = path.parent / "canary"
    trap = Canary(canary, way)
    content = {
        "bare": lambda: pickled(trap, protocol),
        "zip": lambda: torch_file(trap),
        "legacy": lambda: torch_file(trap, zipped=False),
        "inside": lambda: torch_file({**STATE, "x": [trap]}, zipped=data.draw(st.booleans())),
        "record": lambda: rezipped(BASES["zip"], {"data.pkl": pickled(trap, protocol)}),
        "args": lambda: torch_file({"arch": VIT, "args": argparse.Namespace(img_size=trap), "state_dict": STATE}),
    }[where]()
    path.write_bytes(data.draw(damaged(content)) if data.draw(st.booleans()) else content)
    loaded(path)
    assert not canary.exists()


# ---- safetensors' header


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A safetensors file whose header says something else."""
    size = struct.unpack("<Q", BASES["safetensors"][:8])[0]
    header, rest = json.loads(BASES["safetensors"][8 : 8 + size]), BASES["safetensors"][8 + size :]
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(header)))
        if not isinstance(header[name], dict):
            continue
        kinds = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "Q9", "", None, 3]
        shapes = st.lists(st.sampled_from([0, 1, 32, -1, 2**32, 2**63, 2**64, 10**30, 1.5, "3", None]), max_size=4)
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more", ""]))
        header[name][field] = draw(
            st.sampled_from(kinds) if field == "dtype" else shapes if field else values.map(repr)
        )
    text = json.dumps(header)
    if draw(st.integers(0, 4)) == 0:
        text = text[:-1] + ', "x": ' + deep("[", "]", draw(st.sampled_from([10, 200, 100_000]))) + "}"
    content = text.encode() + b" " * draw(st.integers(0, 8))
    claimed = draw(st.sampled_from([len(content)] * 6 + [0, 1, 2**31, 2**60, 2**64 - 1]))
    return struct.pack("<Q", claimed) + content + rest


@share(100, 2000)
@given(headers())
def test_safetensors_headers(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    loaded(path)


# ---- archives


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (rezipped(BASES["zip"], {}, zipfile.ZIP_DEFLATED), None),
        (rezipped(BASES["zip"], {"data.pkl": None}), "without torch data"),
        (rezipped(BASES["zip"], {"data/0": None}), "damaged"),
        (rezipped(BASES["zip"], {"data/0": b""}), "damaged"),
        (rezipped(BASES["zip"], {"version": b"9" * 30}), None),
        (rezipped(BASES["zip"], {"byteorder": b"middle"}), None),
        (rezipped(BASES["zip"], {"data/0": bytes(2**26)}, zipfile.ZIP_DEFLATED), "compressed"),
        (BASES["zip"].replace(b"PK\x01\x02", b"PK\x01\x03"), "damaged"),
    ],
)  # fmt: skip
def test_archives(path: Path, content: bytes, text: str | None) -> None:
    path.write_bytes(content)
    found = loaded(path)
    if text is not None:
        assert isinstance(found, LoadError)
        assert text in str(found)


# ---- what a file says of its architecture
