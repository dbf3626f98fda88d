"""Builds the N:M kernel for the CPU as part of the wheel; all other metadata is in pyproject.toml."""

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = "mpcompile.runtimes.native"


def load_build_module() -> ModuleType:
    """Loads runtimes/native/build.py by path, since mpcompile and its dependencies are not installed yet."""
    spec = importlib.util.spec_from_file_location("native_build", Path(__file__).parent / "runtimes/native/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernel(build_ext):
    """Builds the kernel's shared library in place of a Python extension; warns if it cannot be built."""

    def get_ext_filename(self, fullname: str) -> str:
        """Returns the library's path without Python's version in its name, since Python does not import it."""
        return str(Path(*fullname.split(".")[:-1], load_build_module().LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        """Builds the library at the path that setuptools expects; a failure is a warning, not an error."""
        build = load_build_module()
        try:
            build.build(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildFailed as error:
            self.warn(f"the CPU kernel is left out, everything else works: {error}")

    def copy_extensions_to_source(self) -> None:
        """Copies the library into the source tree in editable installs, unless it was built there."""
        if Path(self.get_ext_fullpath(f"{PACKAGE}.kernel")).is_file():
            return  # get_ext_fullpath points into the source already
        super().copy_extensions_to_source()


class AnyPython(bdist_wheel):
    """Tags the wheel for any Python 3 on this platform: the library does not use Python's C API."""

    def get_tag(self) -> tuple[str, str, str]:
        """Returns the tag: py3, no ABI, and the platform."""
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension(f"{PACKAGE}.kernel", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPython},
)
