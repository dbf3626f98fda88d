"""Output folders gone wrong: no changed file is ever taken for the one that was proven, and each refusal is a line."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from mutations import altered, answer, damaged, deep, share
from onnx import TensorProto
from safetensors.torch import load_file, save

import mpcompile
from mpcompile.driver.artifact import Artifact
from mpcompile.driver.bench import bench
from mpcompile.driver.compare_engines import Settings
from mpcompile.errors import LoadError, MpcompileError
from mpcompile.system.atomic_folder import foreign_names
from mpcompile.testing import TinyCNN

pytestmark = pytest.mark.filterwarnings("default")  # warnings are errors in the suite, and not where it is used

FILES = (
    "recipe.yaml",
    "model.safetensors",
    "masks.safetensors",
    "model.onnx",
    "dense.onnx",
    "report.json",
    "report.md",
    "report.html",
    "report.sha256",
)
PROVEN = FILES[:5]  # the report lists their hashes
REPORT = FILES[5:8]  # report.sha256 has their hashes
QUICK = {"passes": [{"nm-mask": {"pattern": "2:4"}}], "bench": {"batches": [1], "seconds": 0.01}}
SETTINGS = Settings(seconds=0.01, threads=1)  # one: `answer` limits the processor's time, and threads that wait spin


class Net(TinyCNN):
    pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}  # noqa: RUF012


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder of a tiny model."""
    output = tmp_path_factory.mktemp("fuzz") / "out"
    torch.manual_seed(0)
    mpcompile.compile(Net().eval(), mpcompile.Recipe.checked(QUICK), output=output)
    return output


def verified(folder: Path) -> Any:
    """The answer of verify; nothing in the folder changes by it."""
    before = sorted(path.name for path in folder.iterdir())
    found = answer(lambda: Artifact.open(folder).verify())
    assert sorted(path.name for path in folder.iterdir()) == before
    return found


class Changed:
    """Inside, a file of the folder has other bytes, which the report may list as its own; then it is as it was."""

    def __init__(self, folder: Path, name: str, content: bytes, listed: bool = False) -> None:
        self.path, self.content, self.report = folder / name, content, folder / "report.json"
        self.listed = listed and name != "report.json"

    def __enter__(self) -> None:
        self.before, self.told = self.path.read_bytes(), self.report.read_bytes()
        self.path.write_bytes(self.content)
        if self.listed:
            report = json.loads(self.told)
            for row in report["files"]:
                if row["name"] == self.path.name:
                    row |= {"sha256": hashlib.sha256(self.content).hexdigest(), "bytes": len(self.content)}
            self.report.write_text(json.dumps(report))

    def __exit__(self, *error: object) -> None:
        self.path.write_bytes(self.before)
        self.report.write_bytes(self.told)


@share(150, 3000)
@given(st.sampled_from(FILES), st.booleans(), st.data())
def test_damaged_bytes(folder: Path, name: str, listed: bool, data: st.DataObject) -> None:
    before = (folder / name).read_bytes()
    content = data.draw(damaged(before))
    with Changed(folder, name, content, listed):
        found = verified(folder)
        answer(lambda: Artifact.open(folder).recipe)
        answer(lambda: foreign_names(folder))
    if (name in PROVEN and content != before and not listed) or (name in REPORT and content != before):
        assert isinstance(found, MpcompileError)


@share(40, 1500)
@given(st.data())
def test_reports(folder: Path, data: st.DataObject) -> None:
    content = data.draw(altered(json.loads((folder / "report.json").read_text())))
    with Changed(folder, "report.json", json.dumps(content, default=repr).encode("utf-8", "surrogateescape")):
        verified(folder)
        answer(lambda: foreign_names(folder))


@pytest.mark.parametrize("name", PROVEN)
def test_a_report_that_leaves_a_file_out_proves_nothing(folder: Path, name: str) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["files"] = [row for row in report["files"] if row["name"] != name]
    with Changed(folder, "report.json", json.dumps(report).encode()):
        found = verified(folder)
    assert isinstance(found, LoadError)
    assert f"lists no hash of {name}" in str(found)


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "null", deep("[", "]", 100_000), '{"files": 3}', '{"files": [{"name": []}]}', "\x00"]
)
def test_reports_that_are_none(folder: Path, text: str) -> None:
    with Changed(folder, "report.json", text.encode()):
        assert isinstance(verified(folder), LoadError)
        assert "model.onnx" in foreign_names(folder)


# ---- masks


@share(40, 1500)
@given(st.data())
def test_masks(folder: Path, data: st.DataObject) -> None:
    masks: dict[str, torch.Tensor] = dict(load_file(folder / "masks.safetensors"))
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from([*masks, "", "stem", "nothing", "\x1b[0m"]))
        shape = data.draw(st.lists(st.integers(0, 24), max_size=5))
        kind = data.draw(
            st.sampled_from([torch.bool, torch.float32, torch.uint8, torch.int64, torch.complex64, torch.float8_e5m2])
        )
        masks[name] = torch.ones(shape[:4]).to(kind) if shape else masks["body"].to(kind, copy=True)
    patterns: Any = dict.fromkeys(masks, "2:4")
    if data.draw(st.booleans()):
        patterns = data.draw(altered(patterns))
    text = data.draw(
        st.sampled_from(
            [json.dumps(patterns, default=repr), deep("[", "]", 50_000), "{", '{"body": "0:4"}', '{"body": 24}']
        )
    )
    content = save(masks, metadata={"patterns": text.encode("utf-8", "replace").decode()})
    with Changed(folder, "masks.safetensors", content, data.draw(st.booleans())):
        verified(folder)


# ---- ONNX


@st.composite
def rewritten(draw: st.DrawFn, content: bytes) -> bytes:
    """The ONNX file with one to three things in it that no exporter writes."""
    file = onnx.load_from_string(content)
    graph = file.graph
    for _ in range(draw(st.integers(1, 3))):
        node, tensor = draw(st.sampled_from(list(graph.node))), draw(st.sampled_from(list(graph.initializer)))
        how = draw(st.integers(0, 15))
        if how == 0:
            del node.input[draw(st.integers(0, len(node.input))) :]
        elif how == 1:
            node.input[:] = [draw(st.sampled_from([*node.input, *node.output, "", "no"])) for _ in node.input]
        elif how == 2:
            node.op_type = draw(
                st.sampled_from(["Conv", "MatMul", "Gemm", "Transpose", "Identity", "Cast", "", "If", "Loop"])
            )
        elif how == 3:
            del node.attribute[:]
        elif how == 4:
            node.attribute.append(
                onnx.helper.make_attribute("perm", draw(st.sampled_from([[0], [0, 0], [9, 9], [-1, 0], [1.5], ["a"]])))
            )
        elif how == 5:
            tensor.dims[:] = draw(st.lists(st.sampled_from([0, 1, 16, -1, 2**31, 2**62]), max_size=5))
        elif how == 6:
            tensor.data_type = draw(st.integers(0, 30))
        elif how == 7:
            tensor.raw_data = draw(st.sampled_from([b"", b"\0", bytes(4096)]))
        elif how == 8:
            tensor.data_location = TensorProto.EXTERNAL
            location = draw(
                st.sampled_from(["/etc/passwd", "../out/model.onnx", "/dev/zero", "", "\0", "model.onnx", "no"])
            )
            tensor.external_data.add(key="location", value=location)
            tensor.external_data.add(
                key=draw(st.sampled_from(["offset", "length"])),
                value=draw(st.sampled_from(["-1", "x", str(2**62), "0"])),
            )
            tensor.ClearField("raw_data")
        elif how == 9:
            tensor.name = draw(st.sampled_from([t.name for t in graph.initializer] + ["", "\x1b[0m"]))
        elif how == 10:
            scopes = draw(
                st.sampled_from(
                    ["", "3", "[", "(" * 300, "__import__('os')", "{1: 2}", "[[]]", "'a'", "\0", "-" * 9999 + "1"]
                )
            )
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
        elif how == 11:
            noted = draw(
                st.sampled_from(
                    ["", "3", "[]", "{", '{"x": 1}', '{"x": {}}', '{"x": {"layers": 3}}', deep("[", "]", 5000)]
                )
            )
            for entry in [p for p in file.metadata_props if p.key == "mpcompile.sparsity"]:
                entry.value = noted
        elif how == 12:
            del graph.initializer[:]
        elif how == 13:
            graph.node.extend(
                [
                    onnx.helper.make_node("Identity", ["loop"], ["loop"]),
                    onnx.helper.make_node("MatMul", ["x", "loop"], ["y"]),
                ]
            )
        elif how == 14:
            file.ClearField("graph") if draw(st.booleans()) else file.opset_import.add(domain="x", version=-1)
            return bytes(file.SerializeToString())
        else:
            del graph.node[draw(st.integers(0, len(graph.node) - 1))]
        if not graph.node or not graph.initializer:
            break
    return bytes(file.SerializeToString())


@share(100, 3000)
@given(st.data())
def test_onnx_files(folder: Path, data: st.DataObject) -> None:
    before = (folder / "model.onnx").read_bytes()
    content, listed = data.draw(rewritten(before)), data.draw(st.booleans())
    with Changed(folder, "model.onnx", content, listed):
        found = verified(folder)
    if content != before and not listed:
        assert isinstance(found, MpcompileError)


# ---- bench


@share(5, 500)
@given(st.sampled_from(["model.onnx", "dense.onnx"]), st.data())
def test_bench(folder: Path, name: str, data: st.DataObject) -> None:
    """The report agrees with the changed file, so that only what runs it can tell."""
    before = (folder / name).read_bytes()
    content = data.draw(rewritten(before) if data.draw(st.booleans()) else damaged(before))
    assume(content != before)
    with Changed(folder, name, content, listed=True):
        answer(lambda: bench(folder, SETTINGS))
        assert not list(folder.glob("bench/.*"))
    shutil.rmtree(folder / "bench", ignore_errors=True)


@share(5, 500)
@given(st.data())
def test_bench_by_another_report(folder: Path, data: st.DataObject) -> None:
    content = json.loads((folder / "report.json").read_text())
    content["model"] = data.draw(altered(content["model"]))
    if data.draw(st.booleans()):
        content["model"]["size"] = data.draw(
            st.lists(st.sampled_from([0, 1, -1, 8, 2**20, 2**62, 10**30]), min_size=3, max_size=3)
        )
    with Changed(folder, "report.json", json.dumps(content, default=repr).encode("utf-8", "replace")):
        answer(lambda: bench(folder, SETTINGS))
    shutil.rmtree(folder / "bench", ignore_errors=True)


@pytest.mark.parametrize("name", FILES[:6])
@pytest.mark.parametrize("what", ["fifo", "folder", "dangling", "device", "missing"])
def test_entries_that_are_no_files(folder: Path, name: str, what: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "out"))
    (copy / name).unlink()
    if what == "fifo":
        os.mkfifo(copy / name)
    elif what == "folder":
        (copy / name).mkdir()
    elif what != "missing":
        (copy / name).symlink_to("nowhere" if what == "dangling" else "/dev/zero")
    found = verified(copy)
    assert isinstance(found, LoadError)
    assert f"{name} missing" in str(found)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "no", Path("x" * 5000), Path("a\0b"), Path("/dev/zero"), Path()):
        assert isinstance(answer(lambda path=path: Artifact.open(path)), LoadError)  # type: ignore[misc]
