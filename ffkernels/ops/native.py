"""The compiled kernels of csrc, loaded over a plain C ABI with ctypes.

Looked for, in this order: the file named by FFKERNELS_LIBRARY (then only that one), the library that
installation built next to this module, the one `build_native` put into the user's cache. Nothing is loaded
at import; the first question loads, and the answer, also a negative one with its reason, is kept.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor, get_num_threads
from torch.autograd.graph import increment_version

from ffkernels.ops import build
from ffkernels.ops.plan import DTYPE_CODES, Plan

ABI = 3
CURE = "run `ffkernels doctor --build` (needs a C++ compiler), or reinstall ffkernels where one is present"

_PACKAGED = Path(__file__).parent / build.LIBRARY


class Group(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


@dataclass(frozen=True)
class NativeLibrary:
    """An open library, or the reason why there is none."""

    library: ctypes.CDLL | None
    path: Path | None
    reason: str


def source_dir() -> Path | None:
    """Where the sources are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if all((folder / name).is_file() for name in (*build.HEADERS, *build.SOURCES)):
            return folder
    return None


def cache_dir() -> Path:
    """FFKERNELS_CACHE, else XDG_CACHE_HOME/ffkernels, else ~/.cache/ffkernels."""
    chosen = os.environ.get("FFKERNELS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ffkernels"


def cached_path(kind: str, digest: str, library: str) -> Path:
    """Where the user's cache has, or would have, a library built from the sources of this digest."""
    # Machine in the name: a home directory may be shared between architectures.
    return cache_dir() / f"{kind}-{os.uname().machine}-{digest}" / library


def candidates(variable: str, packaged: Path, cached: Path | None) -> list[Path]:
    """Files to try in order: the one that the environment variable names, or else those that exist."""
    chosen = os.environ.get(variable)
    if chosen:
        return [Path(chosen)]
    return [path for path in (packaged, cached) if path is not None and path.is_file()]


def open_library(path: Path, prefix: str, digest: str | None, signatures: dict[str, tuple]) -> ctypes.CDLL:
    """Load one library, check that it speaks this ABI and comes from these sources, declare its functions.

    `prefix` begins all its names; `digest` is that of the installed sources, None where there are none;
    `signatures` are the argument types of the functions that return a code.
    """
    library = ctypes.CDLL(str(path))
    abi = getattr(library, f"{prefix}abi")
    abi.restype = ctypes.c_int32
    if abi() != ABI:
        raise OSError(f"it has ABI {abi()}, this ffkernels needs {ABI}")
    source_id = getattr(library, f"{prefix}source_id")
    source_id.restype = ctypes.c_char_p
    if digest is not None and source_id().decode() != digest:
        raise OSError("it was built from other sources or with other flags than those installed")
    for name, arguments in signatures.items():
        function = getattr(library, prefix + name)
        function.argtypes = arguments
        function.restype = ctypes.c_int32
    return library


def load_first(paths: Sequence[Path], opened: Callable[[Path], ctypes.CDLL], otherwise: str) -> NativeLibrary:
    """The first of `paths` that opens; where none does, every refusal, or `otherwise` without any."""
    refused = []
    for path in paths:
        try:
            return NativeLibrary(opened(path), path, f"loaded {path.name}")
        except (OSError, AttributeError) as error:
            refused.append(f"{path} was refused: {error}")
    return NativeLibrary(None, None, "; ".join(refused) or otherwise)


def _digest() -> str | None:
    sources = source_dir()
    return None if sources is None else build.source_id(sources)


def _cached() -> Path | None:
    digest = _digest()
    known = digest is not None and hasattr(os, "uname")
    return cached_path("cpu", digest, build.LIBRARY) if known else None


def build_native(*, again: bool = False) -> Path:
    """Compile csrc into the user's cache, load it, and return its path. `BuildError` says what is missing.

    A library of the same sources and flags that is there and opens is taken as it is, unless `again`.
    """
    sources = source_dir()
    if sources is None:
        raise build.BuildError("the C++ sources are not part of this installation; reinstall ffkernels")
    if not hasattr(os, "uname"):
        raise build.BuildError("the compiled ops are built on Linux and macOS only")
    target = _cached()
    if again or load_first([target], _open, "").library is None:
        build.compile_library(sources, target)
    load.cache_clear()
    _open(target)
    return target


def _open(path: Path) -> ctypes.CDLL:
    groups = (ctypes.POINTER(Group), ctypes.c_int64)
    threads, result = ctypes.c_int32, ctypes.POINTER(ctypes.c_float)
    signatures = {
        "cpu_threaded": (),
        "cpu_isa": (ctypes.c_int32,),
        "cpu_checkpoint": (*groups, threads),
        "cpu_delta": (*groups, threads),
        "cpu_step": (*groups, ctypes.c_int32, ctypes.c_float, threads),
        "cpu_absmax": (*groups, threads, result),
        "cpu_align": (*groups, *(ctypes.c_void_p,) * 3, threads),
    }
    return open_library(path, "ffk_", _digest(), signatures)


@cache
def load() -> NativeLibrary:
    """The library, opened once per process."""
    found = candidates("FFKERNELS_LIBRARY", _PACKAGED, _cached())
    return load_first(found, _open, "the C++ ops were not built on this machine")


def isa() -> str:
    """The instruction set the kernels use on this processor."""
    library = load().library
    return "none" if library is None else ("baseline", "avx2", "avx512")[library.ffk_cpu_isa(-1)]


def groups_of(plan: Plan) -> tuple[ctypes.Array, int]:
    """The plan's groups as the ABI wants them, and how many there are."""
    groups = [
        Group(g.rows.data_ptr(), g.places.data_ptr(), len(g.rows), DTYPE_CODES[g.dtype]) for g in plan.groups
    ]
    return (Group * len(groups))(*groups), len(groups)


class Moves:
    """The library's functions bound to one plan: what a call needs is looked up and laid out once."""

    def __init__(self, plan: Plan) -> None:
        library = load().library
        if library is None:
            raise RuntimeError(f"the C++ ops are not available: {load().reason}; {CURE}")
        self.table, self.count = groups_of(plan)
        self.checkpoint = library.ffk_cpu_checkpoint
        self.delta = library.ffk_cpu_delta
        self.step = library.ffk_cpu_step
        self.absmax = library.ffk_cpu_absmax
        self.align = library.ffk_cpu_align


def _bound(plan: Plan) -> Moves:
    if plan.native is None:
        plan.native = Moves(plan)
    return plan.native


def _check(code: int) -> None:
    if code != 0:
        raise RuntimeError(f"the C++ ops refused their table with code {code}; this is a bug in ffkernels")


# The moves below take, beside the plan, the tensors whose autograd version counter they move on: those
# written to. Views of one memory share a counter, so a table hands over its arenas, not the views into them.


def checkpoint_(plan: Plan, best: Sequence[Tensor]) -> None:
    """best ← W"""
    moves = _bound(plan)
    _check(moves.checkpoint(moves.table, moves.count, get_num_threads()))
    increment_version(best)


def delta_(plan: Plan, deltas: Sequence[Tensor], best: Sequence[Tensor]) -> None:
    """Δ ← W − best ; best ← W"""
    moves = _bound(plan)
    _check(moves.delta(moves.table, moves.count, get_num_threads()))
    increment_version(deltas)
    increment_version(best)


def step_(plan: Plan, weights: Sequence[Tensor], best: Sequence[Tensor], accept: bool, k: float) -> None:
    """base = accept ? W : best ; best ← base ; W ← base + k·Δ"""
    moves = _bound(plan)
    _check(moves.step(moves.table, moves.count, accept, k, get_num_threads()))
    if accept:
        increment_version(best)
    if k != 0 or not accept:
        increment_version(weights)


def delta_absmax(plan: Plan) -> float:
    """max |Δ|, NaN if any is"""
    moves, result = _bound(plan), ctypes.c_float()
    _check(moves.absmax(moves.table, moves.count, get_num_threads(), ctypes.byref(result)))
    return result.value


def align_(plan: Plan, best: Sequence[Tensor], out: Tensor) -> None:
    """out ← ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W"""
    moves, gradients = _bound(plan), plan.gradients
    addresses = (gradients.table.data_ptr(), gradients.scratch.data_ptr(), out.data_ptr())
    _check(moves.align(moves.table, moves.count, *addresses, get_num_threads()))
    increment_version(best)
    increment_version(out)
