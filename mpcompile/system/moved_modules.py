"""Keeps the import paths and class names of version 0.1 for one release, with a DeprecationWarning for each.

`from mpcompile.lower import Exported` still works, and warns that `Exported` is now in `mpcompile.export.onnx_export`.
`from mpcompile.runtimes import Judging` still works, and warns that the class is now called `ReportsKernels`.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module -> the modules that hold its names now, searched in this order. Names may be imported by a later module, so
# the defining one comes first.
MOVED: Mapping[str, tuple[str, ...]] = {
    "mpcompile.artifact": (
        "mpcompile.system.safetensors_io",
        "mpcompile.driver.artifact",
    ),
    "mpcompile.bench": (
        "mpcompile.driver.compare_engines",
        "mpcompile.driver.bench",
    ),
    "mpcompile.capture": ("mpcompile.frontend.capture",),
    "mpcompile.compile": ("mpcompile.driver.compile",),
    "mpcompile.layers": ("mpcompile.analysis.eligibility",),
    "mpcompile.load": (
        "mpcompile.frontend.architectures",
        "mpcompile.frontend.preprocessing",
        "mpcompile.frontend.state_dict",
        "mpcompile.frontend.load_model",
    ),
    "mpcompile.lower": ("mpcompile.export.onnx_export",),
    "mpcompile.model": (
        "mpcompile.ir.pattern",
        "mpcompile.ir.results",
        "mpcompile.ir.source",
        "mpcompile.ir.model",
    ),
    "mpcompile.progress": ("mpcompile.system.progress",),
    "mpcompile.resolve": ("mpcompile.driver.run_plan",),
}
# Old modules with the name of a function of mpcompile: importing the module must not hide the function.
FUNCTIONS = ("mpcompile.capture", "mpcompile.compile", "mpcompile.load", "mpcompile.lower")


def renamed_names(module: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that returns the value under the new name for each old name, with a warning.

    Args:
        module: the full name of the module that defines or re-exports the values.
        renamed: old name -> new name.
    """

    def getattr_of_module(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        text = f"{module}.{name} is now called {renamed[name]}; the next release removes the old name"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], renamed[name])

    return getattr_of_module


class MovedModule(ModuleType):
    """Stands for an old module; looks its names up in their new modules."""

    def __getattr__(self, name: str) -> Any:
        """The value of that name in its new module, with a DeprecationWarning. Raises AttributeError."""
        if not name.startswith("__"):
            for home in MOVED[self.__name__]:
                module = importlib.import_module(home)
                if hasattr(module, name):
                    text = f"{self.__name__}.{name} is now {home}.{name}; the next release removes the old path"
                    warnings.warn(text, DeprecationWarning, stacklevel=2)
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Calls the function of the same name, for the modules in FUNCTIONS."""
        if self.__name__ not in FUNCTIONS:
            raise TypeError(f"module {self.__name__!r} is not callable")
        function = getattr(importlib.import_module(MOVED[self.__name__][-1]), self.__name__.rpartition(".")[2])
        return function(*arguments, **options)


class MovedModuleFinder(MetaPathFinder, Loader):
    """Import hook for the old modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an old module; None for any other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The MovedModule for an old module."""
        return MovedModule(spec.name, f"Names of {spec.name} are now in {' and '.join(MOVED[spec.name])}.")

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: names are looked up on access."""


def install_moved_modules() -> None:
    """Installs the import hook for old modules in this process; a second call does nothing."""
    if not any(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedModuleFinder())
