"""What pyproject.toml cannot say: how the CPU kernel is built. All else is there."""

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = "mpcompile.runtimes.native"


def kernel() -> ModuleType:
    """runtimes/native/build.py, which needs nothing but the standard library."""
    spec = importlib.util.spec_from_file_location("native_build", Path(__file__).parent / "runtimes/native/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernel(build_ext):
    """A shared library with a C interface in place of a Python module; left out where it cannot be built."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's own name: Python does not import it, so its version is not in it."""
        return str(Path(*fullname.split(".")[:-1], kernel().LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        """Builds it where setuptools looks for it."""
        build = kernel()
        try:
            build.build(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildFailed as error:
            self.warn(f"the CPU kernel is left out, everything else works: {error}")

    def copy_extensions_to_source(self) -> None:
        """For editable installs; what was not built is not copied."""
        if Path(self.get_ext_fullpath(f"{PACKAGE}.kernel")).is_file():
            return  # get_ext_fullpath points into the source already
        super().copy_extensions_to_source()


class AnyPython(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """The platform's tag alone."""
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension(f"{PACKAGE}.kernel", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPython},
)
