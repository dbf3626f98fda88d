"""Import paths of before: they work for one release, and each name says where it is now."""

import importlib
import sys
from collections.abc import Iterator

import pytest

import mpcompile
from mpcompile.system.moved_modules import MOVED, MovedModule, install_moved_modules


@pytest.fixture(autouse=True)
def _without_old_modules() -> Iterator[None]:
    """Other tests find mpcompile as it is before an old module is imported."""
    yield
    for old in MOVED:
        sys.modules.pop(old, None)
        name = old.rpartition(".")[2]
        if isinstance(vars(mpcompile).get(name), MovedModule):
            delattr(mpcompile, name)


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("mpcompile.lower", "Exported", "mpcompile.export.onnx_export"),
        ("mpcompile.layers", "eligible", "mpcompile.analysis.eligibility"),
        ("mpcompile.bench", "Settings", "mpcompile.driver.compare_engines"),
        ("mpcompile.model", "NM", "mpcompile.ir.pattern"),
        ("mpcompile.resolve", "step_of", "mpcompile.driver.run_plan"),
        ("mpcompile.progress", "tracked", "mpcompile.system.progress"),
    ],
)
def test_a_name_is_found_where_it_was(old: str, name: str, new: str) -> None:
    module = importlib.import_module(old)
    with pytest.warns(
        DeprecationWarning, match=f"{old}.{name} is now {new}.{name}; the next release removes the old path"
    ):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(new), name)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("mpcompile.runtimes", "Judging", "ReportsKernels"),
        ("mpcompile.runtimes.protocol", "Staging", "TimesDevice"),
        ("mpcompile.recipe", "Bench", "BenchOptions"),
        ("mpcompile.recipe.schema", "Bench", "BenchOptions"),
    ],
)
def test_a_renamed_class_is_found_under_its_old_name(module: str, old: str, new: str) -> None:
    home = importlib.import_module(module)
    with pytest.warns(
        DeprecationWarning, match=f"{module}.{old} is now called {new}; the next release removes the old name"
    ):
        found = getattr(home, old)
    assert found is getattr(home, new)
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'Never'"):
        getattr(home, "Never")  # noqa: B009


def test_every_old_path_leads_to_modules_that_there_are() -> None:
    for homes in MOVED.values():
        for home in homes:
            importlib.import_module(home)


def test_a_function_stays_a_function_after_its_old_module_was_imported() -> None:
    importlib.import_module("mpcompile.lower")
    with pytest.raises(TypeError, match="missing"):
        mpcompile.lower()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="module 'mpcompile.layers' is not callable"):
        importlib.import_module("mpcompile.layers")()  # type: ignore[operator]


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(AttributeError, match="module 'mpcompile.lower' has no attribute 'raise_up'"):
        getattr(importlib.import_module("mpcompile.lower"), "raise_" + "up")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mpcompile.never")
    before = list(sys.meta_path)
    install_moved_modules()
    assert sys.meta_path == before
