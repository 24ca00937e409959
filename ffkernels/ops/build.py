"""One compiler command turns csrc into a plain shared library.

Standard library only and no import from the package: setup.py runs this file under build isolation, where
torch is absent, and `native.build_native` runs it on a user's machine.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("step_cpu.cpp",)
HEADERS = ("ffkernels.h", "loops_cpu.h", "stream_cpu.h")
LIBRARY = "libffkernels.so"

# Contraction to fma would skip the rounding of k·Δ: results must not depend on the processor.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")


class BuildError(RuntimeError):
    """No library could be built; the message says why and what to do."""


def source_id(source_dir: Path) -> str:
    """Digest of the sources, compiled into the library so that a stale binary is recognised."""
    digest = hashlib.sha256()
    for name in (*HEADERS, *SOURCES):
        digest.update((source_dir / name).read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str] | None:
    """The C++ compiler as an argument list: $CXX when set, else the first of c++, g++, clang++ on PATH."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        command = shlex.split(chosen)
        return command if shutil.which(command[0]) else None
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found]
    return None


def compile_library(source_dir: Path, target: Path) -> list[str]:
    """Compile `source_dir` into `target` and return the command that did it.

    With OpenMP first; where the compiler or its runtime lacks it, without. The file appears in one move, so a
    concurrent process never loads half a library.
    """
    compiler = find_compiler()
    if compiler is None:
        chosen = os.environ.get("CXX")
        raise BuildError(
            f"CXX={chosen!r} is not an executable; unset it or name a C++ compiler"
            if chosen
            else "no C++ compiler on PATH (c++, g++ or clang++); install one or set CXX"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    sources = [str(source_dir / name) for name in SOURCES]
    define = f'-DFFK_SOURCE_ID="{source_id(source_dir)}"'
    errors = ""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        built = Path(scratch) / LIBRARY
        for openmp in (["-fopenmp"], []):
            # Our flags come last: CXXFLAGS may add to them, not switch contraction back on.
            command = [*compiler, *extra, *FLAGS, *openmp, define, *sources, "-o", str(built)]
            try:
                result = subprocess.run(command, capture_output=True, text=True, timeout=600)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"{compiler[0]} could not be run: {error}") from error
            if result.returncode == 0:
                os.replace(built, target)
                return command
            errors = result.stderr
    raise BuildError(f"{compiler[0]} failed on {', '.join(SOURCES)}:\n{errors[-2000:].strip()}")
