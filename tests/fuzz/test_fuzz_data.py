"""Images gone wrong: .npz files and folders are read or refused in a line; no pickled code runs."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import Canary, answer, damaged, share
from PIL import Image

from mpcompile.data.images import Data
from mpcompile.data.loading import load_data
from mpcompile.errors import LoadError
from mpcompile.testing import tiny_source

pytestmark = pytest.mark.filterwarnings("default")  # warnings are errors in the suite, and not where it is used

SOURCE = tiny_source()
RNG = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "calibration_images": RNG.integers(0, 256, (6, 8, 8), np.uint8),
    "calibration_labels": np.arange(6) % 3,
    "heldout_images": RNG.integers(0, 256, (4, 8, 8, 1), np.uint8),
    "heldout_labels": np.arange(4) % 3,
}


def npz(arrays: dict[str, Any], packed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(file, **arrays)
    return file.getvalue()


def used(path: Path) -> Any:
    """The answer to a file of images, and to using them."""

    def read() -> Data:
        data = load_data(path, SOURCE, 3, calibration=4)
        for split in (data.calibration, data.held_out):
            for images, labels in split.batches(2):
                assert images.isfinite().all()
                assert len(images) == len(labels)
        return data

    return answer(read)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "images.npz"


@share(100, 2000)
@given(st.booleans().flatmap(lambda packed: damaged(npz(ARRAYS, packed))))
def test_damaged_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    used(path)


def header(shape: str, kind: str) -> bytes:
    """An .npy file that claims a shape and a type, with nothing behind them."""
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


SHAPES = ("(4, 8, 8, 1)", "(0, 8, 8, 1)", "(1099511627776, 8, 8, 1)", "(30000000000, 8, 8)", "(-1, 8, 8, 1)", "()",
"(4,)", "(1e9,)", "4", "[4]",
          "((4,), 8)", "(4, 8, 8, True)", "(9" + "9" * 400 + ",)", "__import__('os').mkdir('canary')", "(" * 500,
          "None")  # fmt: skip
KINDS = ("|u1", "<u2", "|O", "<f8", "<c16", "|S8", "<U8", "|V8", "|b1", "<M8[s]", "x", "[('a', '|O')]")


@share(60, 1500)
@given(st.sampled_from(list(ARRAYS)), st.data())
def test_other_arrays(path: Path, name: str, data: st.DataObject) -> None:
    canary = path.parent / "canary"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for each, values in ARRAYS.items():
            content = io.BytesIO()
            np.save(content, values)
            body = content.getvalue()
            if each == name:
                how = data.draw(st.integers(0, 2))
                if how == 0:
                    body = header(data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(KINDS)))
                    body += bytes(data.draw(st.sampled_from([0, 256])))
                elif how == 1:
                    content = io.BytesIO()
                    np.save(
                        content, np.array([Canary(canary, data.draw(st.integers(0, 5)))], object), allow_pickle=True
                    )
                    body = content.getvalue()
                else:
                    body = data.draw(damaged(body))
            archive.writestr(f"{each}.npy", body)
    path.write_bytes(file.getvalue())
    used(path)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["npy", "object npy", "pickle", "text", "image", "empty"])
def test_files_that_are_no_npz(path: Path, kind: str) -> None:
    canary, file = path.parent / "canary", io.BytesIO()
    if kind.endswith("npy"):
        np.save(file, np.array([Canary(canary)], object) if kind != "npy" else np.zeros(3), allow_pickle=True)
    elif kind == "image":
        Image.new("L", (8, 8)).save(file, "png")
    else:
        import pickle

        file.write({"pickle": pickle.dumps(Canary(canary)), "text": b"a,b\n1,2\n", "empty": b""}[kind])
    path.write_bytes(file.getvalue())
    assert isinstance(used(path), LoadError)
    assert not canary.exists()


def test_an_archive_that_unpacks_past_the_memory_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ARRAYS:
            archive.writestr(f"{name}.npy", header("(1048576, 8192, 8192, 1)", "|u1"))
    found = used(path)
    assert isinstance(found, LoadError)
    assert "bytes of memory" in str(found)


def picture(size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, 3).save(file, "png")
    return file.getvalue()


@share(60, 1500)
@given(st.sampled_from(["png", "jpeg", "gif", "webp", "tiff", "bmp"]).flatmap(lambda kind: damaged(encoded(kind))))
def test_damaged_images(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = path_of_images(tmp_path_factory)
    (folder / "a" / "4.png").write_bytes(content)
    used(folder)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(ARRAYS["calibration_images"][0]).save(file, kind)
    return file.getvalue()


def path_of_images(factory: pytest.TempPathFactory) -> Path:
    """A folder of six images in two classes, made once."""
    folder = factory.getbasetemp() / "fuzz-images"
    if not folder.exists():
        for name in "ab":
            (folder / name).mkdir(parents=True)
            for index in range(3):
                (folder / name / f"{index}.png").write_bytes(picture())
    return folder


@pytest.mark.parametrize("what", ["fifo", "dangling", "loop", "folder", "device", "bomb", "none"])
def test_entries_that_are_no_images(tmp_path: Path, what: str) -> None:
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(picture())
    odd = tmp_path / "0.png"
    odd.unlink()
    if what == "fifo":
        os.mkfifo(odd)
    elif what == "folder":
        odd.mkdir()
    elif what == "bomb":  # a header of 2^31 by 2^31 pixels
        odd.write_bytes(picture()[:16] + (2**31 - 1).to_bytes(4, "big") * 2 + picture()[24:])
    elif what != "none":
        odd.symlink_to({"dangling": "nowhere", "loop": "0.png", "device": "/dev/zero"}[what])
    found = used(tmp_path)
    assert isinstance(found, Data if what in ("folder", "none") else LoadError)


def test_folders_that_hold_themselves(tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(picture())
    for name in "abc":
        (tmp_path / name).symlink_to(tmp_path)
    found = used(tmp_path)
    assert isinstance(found, LoadError)
    assert "contains a link to a folder above it" in str(found)


def test_paths_that_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    for name in ("fifo", "loop", "empty", "nowhere", "/dev/zero", "x" * 5000, "a\0b"):
        assert isinstance(used(tmp_path / name), LoadError), name
