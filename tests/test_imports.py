"""Which way imports point between packages, and what importing mpcompile loads."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package imports only from packages further up, at the top of a file and inside functions alike. Packages of one
# row do not know each other.
LEVELS = (
    ("errors",),
    ("system",),
    ("ir",),
    ("recipe",),
    ("data", "frontend", "export"),
    ("analysis", "measure"),
    ("pipeline",),
    ("passes", "runtimes", "report"),
    ("driver",),
    ("cli",),
    ("testing", "__init__", "__main__"),
)
LEVEL = {package: level for level, row in enumerate(LEVELS) for package in row}
# At the root of mpcompile/: what has to be there.
ALONE = {"__init__", "__main__", "errors", "testing"}
LONGEST_FILE = 320  # lines


def files(root: Path) -> list[Path]:
    """The Python files of the three folders; mpcompile/passes and mpcompile/runtimes are links to two of them."""
    own = [path for path in (root / "mpcompile").rglob("*.py") if path.relative_to(root).parts[1] not in LINKS]
    return sorted([*own, *(path for name in LINKS for path in (root / name).rglob("*.py"))])


LINKS = ("passes", "runtimes")


def package_of(path: Path, root: Path) -> str:
    """The package that a file belongs to, or the file's own name at the root of mpcompile/."""
    folder, *rest = path.relative_to(root).with_suffix("").parts
    return folder if folder in LINKS else rest[0]


def imported(path: Path) -> Iterator[str]:
    """The packages of mpcompile that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module == "mpcompile":
            modules = [f"mpcompile.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for name, _, rest in (module.partition(".") for module in modules):
            if name == "mpcompile":
                package = rest.partition(".")[0]
                yield package if package in LEVEL else "__init__"


def violations(root: Path) -> list[str]:
    """Each import that does not point up, as a sentence."""
    found = []
    for path in files(root):
        own = package_of(path, root)
        for other in sorted(set(imported(path)) - {own}):
            if LEVEL[other] >= LEVEL[own]:
                found.append(f"{path.relative_to(root)}: {own} imports {other}, which is not below it")
    return found


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("mpcompile/ir/model.py", "from mpcompile.data import Data\n", "ir imports data"),
        ("passes/a.py", "def f():\n    import mpcompile.driver.compile\n", "passes imports driver"),
        ("passes/b/c.py", "from mpcompile import runtimes\n", "passes imports runtimes"),
        ("runtimes/d.py", "from mpcompile.report import Report\n", "runtimes imports report"),
        ("mpcompile/driver/e.py", "import mpcompile\n", "driver imports __init__"),
    ],
)
def test_an_import_that_closes_a_circle_is_found(tmp_path: Path, file: str, text: str, said: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    [sentence] = violations(tmp_path)
    assert sentence == f"{file}: {said}, which is not below it"


def test_nothing_lies_flat_and_no_file_is_long() -> None:
    assert {path.stem for path in (ROOT / "mpcompile").glob("*.py")} == ALONE
    others = [path for folder in ("tests", "benchmarks", "examples", "docs") for path in (ROOT / folder).rglob("*.py")]
    for path in (*files(ROOT), *others):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST_FILE, f"{path.relative_to(ROOT)} has {lines} lines; split it by subject"


def ambiguous(root: Path) -> list[str]:
    """Names with two meanings: classes of one name, and modules that a value of their package hides."""
    found = []
    classes: dict[str, Path] = {}
    for path in files(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = path.relative_to(root)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                if node.name in classes:
                    found.append(f"class {node.name} is in {classes[node.name]} and in {own}")
                classes[node.name] = own
            elif isinstance(node, ast.ImportFrom) and path.name == "__init__.py":
                hidden = {alias.asname or alias.name for alias in node.names}
                hidden = {name for name in hidden if path.with_name(f"{name}.py").exists()}
                found += [f"{own} hides its module {name}.py" for name in sorted(hidden)]
    return found


def test_no_name_has_two_meanings() -> None:
    assert ambiguous(ROOT) == []


def test_a_name_with_two_meanings_is_found(tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("from mpcompile.passes.wanda import wanda\n")
    (tmp_path / "passes" / "wanda.py").write_text("class Plan: ...\ndef wanda(): ...\n")
    (tmp_path / "passes" / "other.py").write_text("class Plan: ...\n")
    assert ambiguous(tmp_path) == [
        "passes/__init__.py hides its module wanda.py",
        "class Plan is in passes/other.py and in passes/wanda.py",
    ]


# What the public names of mpcompile import, and what that imports in turn.
AT_ONCE = {"mpcompile", "torch", "numpy", "jaxtyping", "onnx", "pydantic", "yaml"}
IN_TURN = {"annotated_types", "google", "ml_dtypes", "pydantic_core", "typing_extensions", "typing_inspection"}
COMPILERS = ("torch._dynamo", "torch._inductor", "torch.onnx")


@pytest.fixture(scope="module")
def added() -> tuple[set[str], bool]:
    """The modules that the public names of mpcompile add to those of torch, and whether CUDA is initialised then."""
    code = (
        "import json, sys, torch; before = set(sys.modules); from mpcompile import *; "
        "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, cuda = json.loads(done.stdout)
    return set(modules), cuda


def test_importing_loads_no_runtime_and_no_cuda(added: tuple[set[str], bool]) -> None:
    modules, cuda = added
    heavy = ("onnxruntime", "tensorrt", "timm", "torchvision", "matplotlib", "rich", "typer", "jinja2")
    assert [name for name in heavy if name in modules] == []
    assert not cuda


def test_importing_adds_little_to_torch(added: tuple[set[str], bool]) -> None:
    """Not a measured time, which is the machine's: no package that a function can import when it is called."""
    modules, _ = added
    packages = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert {name for name in packages if not name.startswith("_")} <= AT_ONCE | IN_TURN
    assert [name for name in modules if name.startswith(COMPILERS)] == []


def test_bare_imports_from_the_root_are_refused() -> None:
    for name in ("passes", "runtimes"):
        code = f"import {name}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert f"import mpcompile.{name}, not {name}" in done.stderr
