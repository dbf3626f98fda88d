"""Lazy attributes of a package (PEP 562): a name is imported from the module that defines it when it is first used.

`import mpcompile` and `mpcompile --help` then load neither torch nor pydantic. Type checkers and editors cannot follow
the table of names, so a package that uses it repeats its imports under `if TYPE_CHECKING:`; a test compares the two.
"""

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy_names(
    package: str, names_by_module: Mapping[str, Collection[str]], submodules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` for a package whose names are imported on first use.

    Args:
        package: full name of the package, its `__name__`.
        names_by_module: full name of a module -> the names that the package re-exports from it.
        submodules: submodules and sub-packages that are attributes of the package without an import of their own.
    """
    module_of = {name: module for module, names in names_by_module.items() for name in names}

    def getattr_of_package(name: str) -> Any:
        if name in module_of:
            value = getattr(importlib.import_module(module_of[name]), name)
        elif name in submodules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next use does not come here
        return value

    def dir_of_package() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of, *submodules})

    return getattr_of_package, dir_of_package
