"""Import paths and class names of version 0.1, each with a DeprecationWarning that gives the new one. For one release.

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

# Old module -> where its names are now: those that left it first, since what is left imports some of them.
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
        "mpcompile.ir.model",
    ),
    "mpcompile.progress": ("mpcompile.system.progress",),
    "mpcompile.resolve": ("mpcompile.driver.run_plan",),
}
# Modules that are functions of mpcompile, too: an import of the module must not hide the function.
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
        text = f"{module}.{name} is now called {renamed[name]}; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], renamed[name])

    return getattr_of_module


class MovedModule(ModuleType):
    """A module of before, whose names are looked up where they are now."""

    def __getattr__(self, name: str) -> Any:
        """The value of that name, with a warning. Raises AttributeError."""
        if not name.startswith("__"):
            for home in MOVED[self.__name__]:
                module = importlib.import_module(home)
                if hasattr(module, name):
                    told = f"{self.__name__}.{name} is now {home}.{name}; the old path goes with the next release"
                    warnings.warn(told, DeprecationWarning, stacklevel=2)
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The function of that name, for the four modules that share one with a function."""
        if self.__name__ not in FUNCTIONS:
            raise TypeError(f"module {self.__name__!r} is not callable")
        function = getattr(importlib.import_module(MOVED[self.__name__][-1]), self.__name__.rpartition(".")[2])
        return function(*arguments, **options)


class MovedModuleFinder(MetaPathFinder, Loader):
    """Finds the modules of before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for a module of before, None for others."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The stand-in for it."""
        return MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: names are looked up when they are asked for."""


def keep_moved_modules() -> None:
    """Lets the modules of before be imported in this process."""
    if not any(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedModuleFinder())
