"""Which way imports point, and what importing mpcompile costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lower layers may not import higher ones; a file may import its own layer, save for passes and runtimes.
LAYERS = (
    ("errors", "model", "parity", "environment", "spectrum", "progress", "distributed", "verdict", "machine"),
    (
        "masks",
        "layers",
        "merging",
        "multihead",
        "checkpoint",
        "data",
        "timing",
        "proof",
        "recipe",
        "output",
        "plots",
        "charts",
        "tables",
    ),
    ("tensors", "shortage"),
    ("work", "fingerprint"),
    ("half",),
    ("watch", "attention", "tuning"),
    ("activations", "cost", "resume", "training_images"),
    ("conventions", "pipeline", "evaluate", "load", "lower"),
    ("checkpoints",),
    ("capture", "inputs"),
    (
        "passes",
        "runtimes",
        "report",
        "report_rows",
        "report_text",
        "report_tables",
        "report_layers",
        "report_charts",
        "tuning_chart",
        "report_views",
        "bench_report",
    ),
    ("plugins",),
    ("resolve",),
    ("deploy", "engines"),
    ("artifact",),
    ("bench",),
    ("tune",),
    ("produce",),
    ("compile", "doctor"),
    ("analyze",),
    ("testing", "console"),
    ("options",),
    ("cli",),
    ("__init__", "__main__"),
)
# They alone import passes and runtimes.
FRONT_DOORS = ("plugins", "resolve", "deploy", "engines", "bench", "tune", "produce", "compile", "analyze")
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(
    [*(ROOT / "mpcompile").glob("*.py"), *(ROOT / "passes").glob("*.py"), *(ROOT / "runtimes").rglob("*.py")]
)


def part_of(path: Path) -> str:
    folder = path.relative_to(ROOT).parts[0]
    return path.stem if folder == "mpcompile" else folder


def imported(path: Path) -> set[str]:
    """The parts of mpcompile that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {
            name.split(".")[1] if "." in name else "__init__" for name in names if name.split(".")[0] == "mpcompile"
        }
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = part_of(path)
    for other in imported(path) - {own}:
        assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}, which stands above it"
        assert {own, other} != {"passes", "runtimes"}, "passes and runtimes do not know each other"
        if other in ("passes", "runtimes"):
            assert own in FRONT_DOORS, f"{own} imports {other}; only {' and '.join(FRONT_DOORS)} may"


# What mpcompile itself imports at once, and what that imports in turn.
AT_ONCE = {"mpcompile", "torch", "numpy", "jaxtyping", "onnx", "pydantic", "yaml"}
IN_TURN = {"annotated_types", "google", "ml_dtypes", "pydantic_core", "typing_extensions", "typing_inspection"}
COMPILERS = ("torch._dynamo", "torch._inductor", "torch.onnx")


@pytest.fixture(scope="module")
def added() -> tuple[set[str], bool]:
    """The modules that importing mpcompile adds to those of torch, and whether CUDA is initialised then."""
    code = (
        "import json, sys, torch; before = set(sys.modules); import mpcompile; "
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
