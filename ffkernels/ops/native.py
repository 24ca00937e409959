"""The compiled kernels of csrc, loaded over a plain C ABI with ctypes: how both libraries are, and the CPU's.

Looked for, in this order: the file named by FFKERNELS_LIBRARY (then only that one), the library that
installation built next to this module, the one `build_native` put into the user's cache. Nothing is loaded
at import; the first question loads, and the answer, also a negative one with its reason, is kept.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor, get_num_threads

from ffkernels.ops import build
from ffkernels.ops.plan import DTYPE_CODES, Plan

ABI = 3
CURE = "run `ffkernels doctor --build` (needs a C++ compiler), or reinstall ffkernels where one is present"


class Group(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


GROUPS = (ctypes.POINTER(Group), ctypes.c_int64)


@dataclass(frozen=True)
class NativeLibrary:
    """An open library, or the reason why there is none."""

    library: ctypes.CDLL | None
    path: Path | None
    reason: str


def cache_dir() -> Path:
    """FFKERNELS_CACHE, else XDG_CACHE_HOME/ffkernels, else ~/.cache/ffkernels."""
    chosen = os.environ.get("FFKERNELS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ffkernels"


@dataclass
class Recipe:
    """One of the two libraries: what it is made of, where it is looked for, and how it is opened."""

    kind: str  # begins the name of its folder in the cache
    name: str  # what messages call its kernels
    cure: str
    variable: str  # of the environment; names the only file to be tried
    file: str
    sources: tuple[str, ...]  # in csrc, beside build.HEADERS
    source_id: Callable[[Path], str]
    compile: Callable[[Path, Path], object]
    prefix: str  # of all functions
    signatures: dict[str, tuple]  # argument types of the functions that return a code

    def __post_init__(self) -> None:
        self.packaged = Path(__file__).parent / self.file

    def source_dir(self) -> Path | None:
        """Where the sources are: inside the installed package, or beside it in a checkout."""
        package = Path(__file__).parents[1]
        for folder in (package / "csrc", package.parent / "csrc"):
            if all((folder / name).is_file() for name in (*build.HEADERS, *self.sources)):
                return folder
        return None

    def digest(self) -> str | None:
        """That of the installed sources and flags, None where there are no sources."""
        sources = self.source_dir()
        return None if sources is None else self.source_id(sources)

    def cached(self) -> Path | None:
        """Where the user's cache has, or would have, the library of these sources."""
        digest = self.digest()
        if digest is None or not hasattr(os, "uname"):
            return None
        # Machine in the name: a home directory may be shared between architectures.
        return cache_dir() / f"{self.kind}-{os.uname().machine}-{digest}" / self.file

    def open(self, path: Path) -> ctypes.CDLL:
        """Load one, check that it speaks this ABI and comes from these sources, declare its functions."""
        library = ctypes.CDLL(str(path))
        abi = getattr(library, f"{self.prefix}abi")
        abi.restype = ctypes.c_int32
        if abi() != ABI:
            raise OSError(f"it has ABI {abi()}, this ffkernels needs {ABI}")
        source_id, digest = getattr(library, f"{self.prefix}source_id"), self.digest()
        source_id.restype = ctypes.c_char_p
        if digest is not None and source_id().decode() != digest:
            raise OSError("it was built from other sources or with other flags than those installed")
        for name, arguments in self.signatures.items():
            function = getattr(library, self.prefix + name)
            function.argtypes = arguments
            function.restype = ctypes.c_int32
        return library

    def first_of(self, *paths: Path | None) -> NativeLibrary:
        """The first of `paths` that opens; where none does, every refusal."""
        refused = []
        for path in filter(None, paths):
            try:
                return NativeLibrary(self.open(path), path, f"loaded {path.name}")
            except (OSError, AttributeError) as error:
                refused.append(f"{path} was refused: {error}")
        reason = "; ".join(refused) or f"the {self.name} were not built on this machine"
        return NativeLibrary(None, None, reason)

    def find(self) -> NativeLibrary:
        """The file that the environment variable names, or else the first that is there and opens."""
        chosen = os.environ.get(self.variable)
        if chosen:
            return self.first_of(Path(chosen))
        return self.first_of(*(path for path in (self.packaged, self.cached()) if path and path.is_file()))

    def build(self, again: bool) -> Path:
        """Compile into the user's cache where that has no library that opens, or `again`; its path.

        Raises:
            BuildError: with what is missing.
        """
        sources, target = self.source_dir(), self.cached()
        if sources is None:
            raise build.BuildError(
                f"the sources of the {self.name} are not part of this installation; reinstall ffkernels"
            )
        if target is None:
            raise build.BuildError(f"the {self.name} are not built on Windows")
        if again or self.first_of(target).library is None:
            self.compile(sources, target)
        self.open(target)
        return target


_THREADS = ctypes.c_int32
RECIPE = Recipe(
    kind="cpu",
    name="C++ ops",
    cure=CURE,
    variable="FFKERNELS_LIBRARY",
    file=build.LIBRARY,
    sources=build.SOURCES,
    source_id=build.source_id,
    compile=build.compile_library,
    prefix="ffk_",
    signatures={
        "cpu_threaded": (),
        "cpu_isa": (ctypes.c_int32,),
        "cpu_checkpoint": (*GROUPS, _THREADS),
        "cpu_delta": (*GROUPS, _THREADS),
        "cpu_step": (*GROUPS, ctypes.c_int32, ctypes.c_float, _THREADS),
        "cpu_absmax": (*GROUPS, _THREADS, ctypes.POINTER(ctypes.c_float)),
        "cpu_align": (*GROUPS, *(ctypes.c_void_p,) * 3, _THREADS),
    },
)


@cache
def load() -> NativeLibrary:
    """The library, opened once per process."""
    return RECIPE.find()


def build_native(*, again: bool = False) -> Path:
    """Compile csrc into the user's cache, load it, and return its path. `BuildError` says what is missing.

    A library of the same sources and flags that is there and opens is taken as it is, unless `again`.
    """
    path = RECIPE.build(again)
    load.cache_clear()
    return path


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
    """A library's functions bound to one plan: what a call needs is looked up and laid out once."""

    def __init__(self, plan: Plan, recipe: Recipe, loaded: NativeLibrary, prefix: str) -> None:
        if loaded.library is None:
            raise RuntimeError(f"the {recipe.name} are not available: {loaded.reason}; {recipe.cure}")
        self.loaded = loaded
        self.table, self.count = groups_of(plan)
        for move in ("checkpoint", "delta", "step", "align"):
            setattr(self, move, getattr(loaded.library, prefix + move))


def _bound(plan: Plan) -> Moves:
    if plan.native is None:
        plan.native = Moves(plan, RECIPE, load(), "ffk_cpu_")
    return plan.native


def _check(code: int) -> None:
    if code != 0:
        raise RuntimeError(f"the C++ ops refused their table with code {code}; this is a bug in ffkernels")


def _call(plan: Plan, move: str, *arguments) -> None:
    bound = _bound(plan)
    _check(getattr(bound, move)(bound.table, bound.count, *arguments, get_num_threads()))


def checkpoint_(plan: Plan) -> None:
    """best ← W"""
    _call(plan, "checkpoint")


def delta_(plan: Plan) -> None:
    """Δ ← W − best ; best ← W"""
    _call(plan, "delta")


def step_(plan: Plan, accept: bool, k: float) -> None:
    """base = accept ? W : best ; best ← base ; W ← base + k·Δ"""
    _call(plan, "step", accept, k)


def align_(plan: Plan, out: Tensor) -> None:
    """out ← ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W"""
    gradients = plan.gradients
    _call(plan, "align", gradients.table.data_ptr(), gradients.scratch.data_ptr(), out.data_ptr())


def delta_absmax(plan: Plan) -> float:
    """max |Δ|, NaN if any is"""
    bound, result = _bound(plan), ctypes.c_float()
    absmax = bound.loaded.library.ffk_cpu_absmax
    _check(absmax(bound.table, bound.count, get_num_threads(), ctypes.byref(result)))
    return result.value
