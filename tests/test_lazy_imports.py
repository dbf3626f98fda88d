"""The public names of mpcompile are imported on first use; editors and type checkers see the same names."""

import ast
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import mpcompile

ROOT = Path(__file__).parents[1]
LAZY = ("mpcompile", "mpcompile.data", "mpcompile.ir", "mpcompile.pipeline")


def fresh(code: str) -> Any:
    """What the code prints as JSON in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_mpcompile_imports_no_torch() -> None:
    code = "import json, sys, {}; print(json.dumps([n for n in ('torch', 'onnx', 'pydantic') if n in sys.modules]))"
    for module in ("mpcompile", "mpcompile.ir.pattern", "mpcompile.cli", "mpcompile.cli.parse"):
        assert fresh(code.format(module)) == []


def test_reading_a_report_imports_no_torch() -> None:
    """`compare` and `explain` run no model, so that they start quickly."""
    code = "import json, sys, {}; print(json.dumps([n for n in ('torch', 'onnx', 'scipy') if n in sys.modules]))"
    for module in ("mpcompile.report.schema", "mpcompile.driver.compare_runs", "mpcompile.report.explained_layer"):
        assert fresh(code.format(module)) == []


@pytest.mark.parametrize("package", LAZY)
def test_the_table_of_names_agrees_with_the_imports_for_type_checkers(package: str) -> None:
    tree = ast.parse((ROOT / Path(*package.split(".")) / "__init__.py").read_text(encoding="utf-8"))
    [branch] = [node for node in tree.body if isinstance(node, ast.If)]
    imports = {node.module: tuple(alias.name for alias in node.names) for node in branch.body}  # type: ignore[attr-defined]
    [table] = [ast.literal_eval(node) for node in ast.walk(ast.Module(branch.orelse, [])) if isinstance(node, ast.Dict)]
    assert imports == table
    module = importlib.import_module(package)
    assert sorted(name for names in imports.values() for name in names) == sorted(module.__all__)
    for home, names in table.items():
        for name in names:
            assert getattr(module, name) is getattr(importlib.import_module(home), name)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'never'"):
        getattr(module, "nev" + "er")


def test_sub_packages_are_attributes_after_one_import() -> None:
    code = "import mpcompile, json; print(json.dumps([mpcompile.passes.__name__, mpcompile.errors.__name__, {}]))"
    assert fresh(code.format("mpcompile.runtimes.ort.cpu.__name__")) == [
        "mpcompile.passes", "mpcompile.errors", "mpcompile.runtimes.ort.cpu",
    ]  # fmt: skip
    for name in ("analysis", "data", "driver", "errors", "export", "frontend", "ir", "measure", "passes", "pipeline"):
        assert isinstance(getattr(mpcompile, name), types.ModuleType)
        assert name in dir(mpcompile)


def test_names_that_are_old_module_paths_are_functions() -> None:
    """`mpcompile.compile` was a module and is still importable as one; the attribute is the function."""
    names = ("capture", "compile", "load", "lower")
    code = f"import json, mpcompile; print(json.dumps([type(getattr(mpcompile, n)).__name__ for n in {names}]))"
    assert fresh(code) == ["function"] * 4
    code = "import json; from mpcompile import compile, load; print(json.dumps([compile.__module__, load.__module__]))"
    assert fresh(code) == ["mpcompile.driver.compile", "mpcompile.frontend.load_model"]
