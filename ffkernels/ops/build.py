"""One compiler command each turns csrc into plain shared libraries: one for the CPU, one for NVIDIA GPUs.

Standard library only and no import from the package: setup.py runs this file under build isolation, where
torch is absent, and `native.build_native` and `native_cuda.build_cuda` run it on a user's machine.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = ("align_cpu.cpp", "step_cpu.cpp")
HEADERS = ("ffkernels.h", "groups_cpu.h", "groups_cuda.h", "loops_cpu.h", "stream_cpu.h")
LIBRARY = "libffkernels.so"
CUDA_SOURCES = ("align_cuda.cu", "step_cuda.cu")
CUDA_LIBRARY = "libffkernels_cuda.so"

# Contraction to fma would skip the rounding of k·Δ: results must not depend on the processor.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")

# Machine code for each of these that nvcc knows, and PTX of the newest for the GPUs after it. Code for 8.0
# runs on all of 8.x. The CUDA runtime is linked in: any build of torch, or none, may be in the process.
CUDA_ARCHITECTURES = (80, 90, 100)
CUDA_FLAGS = (
    *("-std=c++17", "-O3", "--fmad=false", "--shared", "--cudart=static"),
    "--compiler-options=-fPIC,-fvisibility=hidden",
)


class BuildError(RuntimeError):
    """No library could be built; the message says why and what to do."""


def source_id(source_dir: Path) -> str:
    """Digest of sources and flags, compiled into the library so that a stale binary is recognised."""
    return _digest(source_dir, SOURCES, FLAGS)


def cuda_source_id(source_dir: Path) -> str:
    """The same of the CUDA kernels."""
    return _digest(source_dir, CUDA_SOURCES, CUDA_FLAGS)


def _digest(source_dir: Path, sources: tuple[str, ...], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for name in (*HEADERS, *sources):
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


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error


def _compile(sources: list[Path], target: Path, commands: list[list[str]]) -> list[str]:
    """Put what the first successful command makes of `sources` into `target`, and return that command.

    The file appears in one move, so a concurrent process never loads half a library.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        built = Path(scratch) / target.name
        for start in commands:
            command = [*start, *map(str, sources), "-o", str(built)]
            result = _run(command)
            if result.returncode == 0:
                os.replace(built, target)
                return command
    names = ", ".join(source.name for source in sources)
    errors = (result.stderr or result.stdout)[-2000:].strip()
    raise BuildError(f"{command[0]} failed on {names}:\n{errors}")


def _define(source_id: str) -> str:
    return f'-DFFK_SOURCE_ID="{source_id}"'


def compile_library(source_dir: Path, target: Path) -> list[str]:
    """Compile `source_dir` into `target` and return the command that did it.

    With OpenMP first; where the compiler or its runtime lacks it, without.
    """
    compiler = find_compiler()
    if compiler is None:
        chosen = os.environ.get("CXX")
        raise BuildError(
            f"CXX={chosen!r} is not an executable; unset it or name a C++ compiler"
            if chosen
            else "no C++ compiler on PATH (c++, g++ or clang++); install one or set CXX"
        )
    # Our flags come last: CXXFLAGS may add to them, not switch contraction back on.
    common = [*compiler, *shlex.split(os.environ.get("CXXFLAGS", "")), *FLAGS, _define(source_id(source_dir))]
    sources = [source_dir / name for name in SOURCES]
    return _compile(sources, target, [[*common, "-fopenmp"], common])


def find_nvcc() -> Path | None:
    """The CUDA compiler: of $CUDA_HOME when that is set, else on PATH. A GPU is not looked for."""
    home = os.environ.get("CUDA_HOME", "").strip()
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    return Path(found) if found else None


def cuda_wanted() -> bool | None:
    """FFKERNELS_BUILD_CUDA: 1 must build, 0 must not, auto (the default, None) builds where nvcc is found."""
    value = os.environ.get("FFKERNELS_BUILD_CUDA", "auto").strip().lower()
    allowed = {"0": False, "1": True, "auto": None, "": None}
    if value not in allowed:
        raise BuildError(f"FFKERNELS_BUILD_CUDA={value!r}: must be 0, 1 or auto")
    return allowed[value]


def _cuda_targets(nvcc: Path) -> list[str]:
    """-gencode arguments for what this nvcc can make: it gains new architectures and loses old ones."""
    listed = _run([str(nvcc), "--list-gpu-code"])
    known = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in listed.stdout.split()]
    if not known:
        named = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHITECTURES)
        raise BuildError(f"{nvcc} makes none of {named}; ffkernels needs CUDA 12 or newer")
    newest = known[-1]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*targets, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def compile_cuda_library(source_dir: Path, target: Path) -> list[str]:
    """Compile the GPU kernels of `source_dir` into `target` and return the command that did it."""
    nvcc = find_nvcc()
    if nvcc is None:
        home = os.environ.get("CUDA_HOME")
        raise BuildError(
            f"CUDA_HOME={home!r} has no bin/nvcc; unset it or name a CUDA toolkit"
            if home
            else "no nvcc on PATH; install a CUDA toolkit or set CUDA_HOME"
        )
    # The architectures are compiled side by side, on all cores.
    targets = ["--threads=0", *_cuda_targets(nvcc), _define(cuda_source_id(source_dir))]
    sources = [source_dir / name for name in CUDA_SOURCES]
    return _compile(sources, target, [[str(nvcc), *CUDA_FLAGS, *targets]])
