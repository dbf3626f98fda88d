"""Which zip files count as .pt2 archives: only what torch.export.save writes, without tricks of the zip format."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pt2_files import (
    EXAMPLES,
    PROGRAM,
    WEIGHTS,
    archive_of,
    fixed_file,
    members_of,
    small_file,
    with_json,
    with_members,
)

from mpcompile.frontend.exported.expressions import require_size_expression
from mpcompile.frontend.exported.guards import is_size_guard
from mpcompile.frontend.exported.read_program import read_program
from mpcompile.frontend.exported.refusal import ProgramRefused


def test_the_program_of_torch_is_read() -> None:
    program = read_program(small_file())
    assert [(given.name, given.shape, given.free) for given in program.inputs] == [("input", (2, 3, 8, 8), (0,))]
    assert read_program(fixed_file()).inputs[0].free == ()
    loaded = torch.export.load(io.BytesIO(small_file())).state_dict
    assert set(program.tensors) == loaded.keys()
    for name, value in loaded.items():
        assert torch.equal(program.tensors[name], value), name
        assert program.tensors[name].requires_grad == value.requires_grad, name
        assert type(program.tensors[name]) is type(value), name


def twice(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members_of(small_file()).items():
            archive.writestr(f"a/{member}", content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(f"a/{name}", b"{}")
    return file.getvalue()


def outside() -> bytes:
    file = io.BytesIO(small_file())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../evil", b"")
    return file.getvalue()


def overlapping() -> bytes:
    """Two entries of the directory that point to the same bytes, which multiplies what a reader unpacks."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members_of(small_file()).items():
            archive.writestr(f"a/{member}", content)
        archive.writestr("a/data/weights/weight_50", bytes(50_000))
        first = archive.getinfo("a/data/weights/weight_50")
        for index in range(60, 90):
            copy = zipfile.ZipInfo(f"a/data/weights/weight_{index}")
            copy.header_offset, copy.CRC = first.header_offset, first.CRC
            copy.file_size = copy.compress_size = first.file_size
            archive.filelist.append(copy)
    return file.getvalue()


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (
        lambda: archive_of(members_of(small_file()), compression=zipfile.ZIP_DEFLATED),
        "torch never compress",
    ),
    "a member twice": (lambda: twice(PROGRAM), "twice"),
    "outside": (outside, "no name inside an archive"),
    "overlapping": (overlapping, "overlap"),
    "unknown member": (lambda: with_members(small_file(), data__more=b""), "does not know"),
    "shared library": (lambda: with_members(small_file(), data__aotinductor__model__x=b""), "compiled library"),
    "second program": (lambda: archive_of({**members_of(small_file()), "models/b.json": b"{}"}), "second program"),
    "cut": (lambda: small_file()[:-200], "cut short or damaged"),
    "behind other bytes": (lambda: b"MZ" + small_file(), "cut short or damaged"),
    "no program": (lambda: archive_of({"archive_format": b"pt2"}), "lacks its member"),
    "other version": (lambda: with_members(small_file(), archive_version=b"9"), "pt2 and 0 are read"),
    "big endian": (lambda: with_members(small_file(), byteorder=b"big"), "another byte order"),
    "deep JSON": (lambda: archive_of({**members_of(small_file()), PROGRAM: b"[" * 100_000}), "no readable JSON"),
    "no JSON": (lambda: archive_of({**members_of(small_file()), PROGRAM: b"\xff{"}), "no readable JSON"),
    "key twice": (
        lambda: archive_of({**members_of(small_file()), PROGRAM: b'{"graph_module": {}, "graph_module": {}}'}),
        "a key stands twice",
    ),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_another_archive_is_refused(name: str) -> None:
    build, reason = ARCHIVES[name]
    with pytest.raises(ProgramRefused, match=reason):
        read_program(build())


def edited(*path: Any, value: Any) -> Callable[[Any], None]:
    """An edit that sets one value of a JSON document."""

    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return edit


GRAPH = ("graph_module", "graph")
VALUES = (*GRAPH, "tensor_values", "input", "sizes")
BIAS = ("config", "5.bias")
PROGRAMS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "later schema": (PROGRAM, edited("schema_version", value={"major": 9, "minor": 0}), "version 9 .* 8 is read"),
    "unknown field": (PROGRAM, edited(*GRAPH, "hook", value="os.system"), "has the field 'hook'"),
    "unknown name": (PROGRAM, edited(*GRAPH, "outputs", value=[{"as_tensor": {"name": "x"}}]), "no earlier call gives"),
    "too many outputs": (PROGRAM, edited(*GRAPH, "outputs", value=[{"as_none": True}] * 3), "other numbers"),
    "text as size": (PROGRAM, edited(*VALUES, 1, value={"as_int": "3"}), "an integer of 64 bits"),
    "huge size": (PROGRAM, edited(*VALUES, 1, value={"as_int": 10**30}), "an integer of 64 bits"),
    "path": (WEIGHTS, edited("config", "../x", value={}), "names of tensors have letters"),
    "dunder": (WEIGHTS, edited("config", "__class__", value={}), "names of tensors have letters"),
    "another file": (WEIGHTS, edited(*BIAS, "path_name", value="../../secret"), "lacks 'data/weights"),
    "more values": (WEIGHTS, edited(*BIAS, "tensor_meta", "storage_offset", value={"as_int": 9}), "needs more"),
    "no place": (WEIGHTS, edited(*BIAS, "tensor_meta", value=None), "an object is needed"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_another_program_is_refused(name: str) -> None:
    member, edit, reason = PROGRAMS[name]
    with pytest.raises(ProgramRefused, match=reason):
        read_program(with_json(small_file(), member, edit))


def test_a_few_bytes_cannot_claim_to_be_terabytes() -> None:
    def edit(config: Any) -> None:
        meta = config["config"]["5.bias"]["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": 2**38}], [{"as_int": 0}]

    with pytest.raises(ProgramRefused, match="repeats the values"):
        read_program(with_json(small_file(), WEIGHTS, edit))


def test_example_inputs_may_be_missing_and_texts_of_the_user_are_left_aside() -> None:
    members = members_of(small_file())
    del members[EXAMPLES]
    assert read_program(archive_of({**members, "extra/notes.txt": b"open('x', 'w')"})).inputs


@pytest.mark.parametrize(
    "size",
    [
        "s0",
        "2*s0 + 1",
        "(s0 // 2) * 3 - s1 % 4",
        "s77**2",
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s77', integer=True))",
        "Pow(Symbol('s0'), Integer(2))",
        "FloorDiv(Add(Symbol('u3', integer=True), Integer(-1)), Integer(2))",
        "Max(1, s0)",
        "Eq(s0, 4)",
    ],
)
def test_sizes_are_expressions(size: str) -> None:
    assert require_size_expression(size, "x") == size


@pytest.mark.parametrize(
    "size",
    [
        "open('x', 'w')",
        "s0.__class__",
        "__import__('os').system('x')",
        "().__class__.__bases__[0]",
        "[s0 for s0 in (1,)]",
        "lambda: 1",
        "s0 if open else 1",
        "exec",
        "print",
        "'s0'",
        "Symbol('os.system')",
        "Symbol('s0', commutative=open('x'))",
        "Function('f')(s0)",
        "sympify('1')",
        "Lambda(s0, s0)",
        "Mul(*[s0])",
        "Mul(s0, evaluate=open('x'))",
        "9**9**9**9",
        "Pow(Integer(9), Integer(999999999))",
        "s0**(s0**8)",
        "(9**8)**8",
        "2**99999999",
        "s0 #",
        "s0\n",
        "s0;s0",
        "(" * 1500 + "s0" + ")" * 1500,
        "-" * 1900 + "1",
        "９",
        7,
        None,
    ],
)
def test_anything_else_is_none(size: object) -> None:
    if size == "s0\n":
        assert require_size_expression(size, "x") == size  # a line's end is no code
        return
    with pytest.raises(ProgramRefused, match="it is not a size, and loading would run it"):
        require_size_expression(size, "x")


def test_guards_are_comparisons_of_sizes() -> None:
    assert is_size_guard("L['x'].size()[0] >= 2")
    assert is_size_guard("Mod(L['args'][0].size()[2], 8) == 0 and not L['x'].size()[1] < 3")
    for guard in (
        "L['x'].numpy()[0] == 1",
        "open('x') is None",
        "L.clear() == 1",
        "len(L['x']) == 1",
        'L[open("x")] == 1',
    ):
        assert not is_size_guard(guard), guard


def test_torch_writes_what_the_grammar_takes() -> None:
    """Expressions of a program with halved and padded sizes, as torch prints them."""

    class Halves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(torch.cat([x, x], 2), 2).flatten(1)

    dims = {0: torch.export.Dim("b", min=1, max=64), 2: torch.export.Dim("h", min=4, max=128)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(Halves(), (torch.zeros(2, 3, 16, 8),), dynamic_shapes=(dims,)), file)
    assert b"FloorDiv" in members_of(file.getvalue())[PROGRAM] or b"Mul" in members_of(file.getvalue())[PROGRAM]
    assert read_program(file.getvalue()).inputs[0].free == (0, 2)
    assert json.loads(members_of(file.getvalue())[PROGRAM])["range_constraints"]


def test_a_folder_is_not_needed(tmp_path: Path) -> None:
    """Members are found below any root folder."""
    content = archive_of(members_of(small_file()), root="another_name")
    assert read_program(content).inputs
