"""Builds csrc into one plain shared library, and ships its sources beside it.

Everything else about the package is in pyproject.toml. No torch is needed to build: the kernels speak a C
ABI. Where there is no C++ compiler the package installs as pure Python and its ops run as torch ops;
ffkernels says so once.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
log = logging.getLogger(__name__)


def _load_build():
    """`ffkernels/ops/build.py` on its own: importing the package would want torch."""
    spec = importlib.util.spec_from_file_location("ffkernels_build", ROOT / "ffkernels" / "ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()
LIBRARY = Extension(
    "ffkernels.ops.libffkernels",
    sources=[f"csrc/{name}" for name in build.SOURCES],
    depends=[f"csrc/{name}" for name in build.HEADERS],
    optional=True,
)


class BuildLibrary(build_ext):
    """One compiler command instead of a Python extension module: the library knows nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(Path(build.LIBRARY).suffix))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        try:
            log.info("ffkernels: %s", " ".join(build.compile_library(CSRC, target)))
        except build.BuildError as error:
            log.warning(
                "ffkernels: the C++ ops were not built, so the slower torch ops will run. Cause: %s."
                " Cure: install a C++ compiler, then reinstall or run `ffkernels doctor --build`.",
                error,
            )


class BuildPackage(build_py):
    """Adds csrc to the wheel, so that `ffkernels doctor --build` can compile it on the user's machine."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self._copy_sources()

    def _sources(self) -> list[tuple[Path, Path]]:
        target = Path(self.build_lib) / "ffkernels" / "csrc"
        return [(CSRC / name, target / name) for name in (*build.HEADERS, *build.SOURCES)]

    def _copy_sources(self) -> None:
        for source, target in self._sources():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        added = [] if self.editable_mode else [str(target) for _, target in self._sources()]
        return [*super().get_outputs(include_bytecode), *added]


class AnyPythonWheel(bdist_wheel):
    """The library fits a platform, not a Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=[LIBRARY],
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPackage, "bdist_wheel": AnyPythonWheel},
)
