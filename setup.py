"""Builds csrc into plain shared libraries, and ships their sources beside them.

Everything else about the package is in pyproject.toml. No torch is needed to build: the kernels speak a C
ABI. Where there is no C++ compiler the package installs as pure Python and its ops run as torch ops;
ffkernels says so once.

The CUDA kernels are built where nvcc is found, in CUDA_HOME or on PATH; a GPU is neither needed nor looked
for. FFKERNELS_BUILD_CUDA=0 leaves them out, FFKERNELS_BUILD_CUDA=1 makes their absence an error.
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
CUDA_LIBRARY = Extension(
    "ffkernels.ops.libffkernels_cuda",
    sources=[f"csrc/{name}" for name in build.CUDA_SOURCES],
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
        if ext is CUDA_LIBRARY:
            return self._build_cuda(target)
        try:
            log.info("ffkernels: %s", " ".join(build.compile_library(CSRC, target)))
        except build.BuildError as error:
            log.warning(
                "ffkernels: the C++ ops were not built, so the slower torch ops will run. Cause: %s."
                " Cure: install a C++ compiler, then reinstall or run `ffkernels doctor --build`.",
                error,
            )

    def _build_cuda(self, target: Path) -> None:
        wanted = build.cuda_wanted()
        if wanted is False or (wanted is None and build.find_nvcc() is None):
            target.unlink(missing_ok=True)
            log.info("ffkernels: no CUDA kernels (%s)", "switched off" if wanted is False else "no nvcc")
            return
        try:
            log.info("ffkernels: %s", " ".join(build.compile_cuda_library(CSRC, target)))
        except build.BuildError as error:
            target.unlink(missing_ok=True)
            if wanted:
                raise
            log.warning(
                "ffkernels: the CUDA kernels were not built, so Triton's or torch's will run. Cause: %s."
                " Cure: repair the CUDA toolkit, then reinstall or run `ffkernels doctor --build`.",
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
        names = (*build.HEADERS, *build.SOURCES, *build.CUDA_SOURCES)
        return [(CSRC / name, target / name) for name in names]

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
    ext_modules=[LIBRARY, CUDA_LIBRARY],
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPackage, "bdist_wheel": AnyPythonWheel},
)
