"""Which way imports point, and what importing mpcompile costs."""

import ast
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


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_loads_no_runtime_and_no_cuda() -> None:
    heavy = ("onnxruntime", "tensorrt", "timm", "torchvision", "matplotlib", "rich", "typer", "jinja2")
    code = (
        f"import sys, torch, mpcompile; print([m for m in {heavy!r} if m in sys.modules], torch.cuda.is_initialized())"
    )
    assert run_python(code) == "[] False"


def test_importing_adds_little_to_torch() -> None:
    code = (
        "import time; a = time.process_time(); import torch; b = time.process_time(); import mpcompile; "
        "print((time.process_time() - b) / (b - a))"
    )
    # The process's own time, beside that of torch in the same process: a slow or busy machine slows both. The best of
    # five; it is about a fifth, 0.2 s where torch takes 1.
    assert min(float(run_python(code)) for _ in range(5)) < 1 / 3


def test_bare_imports_from_the_root_are_refused() -> None:
    for name in ("passes", "runtimes"):
        code = f"import {name}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert f"import mpcompile.{name}, not {name}" in done.stderr
