"""The CUDA kernels of csrc, loaded over the same plain C ABI.

The library stands apart from the CPU's, so that neither needs the other. It is looked for in the same way:
the file named by FFKERNELS_CUDA_LIBRARY (then only that one), what installation built, what `build_cuda` put
into the user's cache. Loading needs no GPU; whether one can run the kernels is asked once per device.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ffkernels.ops import build
from ffkernels.ops.native import (
    Group,
    NativeLibrary,
    cached_path,
    candidates,
    groups_of,
    load_first,
    open_library,
    source_dir,
)
from ffkernels.ops.plan import Plan

CURE = "run `ffkernels doctor --build` (needs nvcc), or reinstall ffkernels where nvcc is present"

_PACKAGED = Path(__file__).parent / build.CUDA_LIBRARY


def _sources() -> Path | None:
    folder = source_dir()
    if folder is None or not all((folder / name).is_file() for name in build.CUDA_SOURCES):
        return None
    return folder


def _digest() -> str | None:
    sources = _sources()
    return None if sources is None else build.cuda_source_id(sources)


def _cached() -> Path | None:
    digest = _digest()
    known = digest is not None and hasattr(os, "uname")
    return cached_path("cuda", digest, build.CUDA_LIBRARY) if known else None


def build_cuda(*, again: bool = False) -> Path:
    """Compile the CUDA kernels into the user's cache, load them; `BuildError` says why not.

    A library of the same sources and flags that is there and opens is taken as it is, unless `again`.
    """
    sources = _sources()
    if sources is None:
        raise build.BuildError("the CUDA sources are not part of this installation; reinstall ffkernels")
    if not hasattr(os, "uname"):
        raise build.BuildError("the CUDA kernels are built on Linux only")
    target = _cached()
    if again or load_first([target], _open, "").library is None:
        build.compile_cuda_library(sources, target)
    load.cache_clear()
    usable.cache_clear()
    _open(target)
    return target


def _open(path: Path) -> ctypes.CDLL:
    groups = (ctypes.POINTER(Group), ctypes.c_int64)
    pointer = stream = ctypes.c_void_p
    signatures = {
        "prepare": (),
        "checkpoint": (*groups, stream),
        "delta": (*groups, stream),
        "step": (*groups, pointer, pointer, ctypes.c_int32, ctypes.c_float, stream),
        "align": (*groups, pointer, pointer, pointer, pointer, stream),
    }
    library = open_library(path, "ffk_cuda_", _digest(), signatures)
    library.ffk_cuda_error_string.argtypes = (ctypes.c_int32,)
    library.ffk_cuda_error_string.restype = ctypes.c_char_p
    return library


@cache
def load() -> NativeLibrary:
    """The library, opened once per process."""
    found = candidates("FFKERNELS_CUDA_LIBRARY", _PACKAGED, _cached())
    return load_first(found, _open, "the CUDA kernels were not built on this machine")


@cache
def usable(index: int) -> str | None:
    """None when the kernels run on CUDA device `index`, else why not. Loads them there."""
    loaded = load()
    if loaded.library is None:
        return loaded.reason
    with _current(index):
        code = loaded.library.ffk_cuda_prepare()
    return None if code == 0 else f"{loaded.path} does not run on cuda:{index}: {_message(loaded, code)}"


def _message(loaded: NativeLibrary, code: int) -> str:
    return f"{loaded.library.ffk_cuda_error_string(code).decode()} (code {code})"


def _current(index: int) -> AbstractContextManager:
    """CUDA device `index` as the current one, on which the library works; mostly it is that already.

    It is torch that switches, and switches back: the library's own copy of the CUDA runtime need not know
    which device torch has chosen.
    """
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


class Moves:
    """The library's functions bound to one plan: what a call needs is looked up and laid out once."""

    def __init__(self, plan: Plan) -> None:
        loaded = load()
        if loaded.library is None:
            raise RuntimeError(f"the CUDA kernels are not available: {loaded.reason}; {CURE}")
        self.loaded = loaded
        self.table, self.count = groups_of(plan)
        self.device = plan.device
        self.index = plan.device.index
        self.checkpoint = loaded.library.ffk_cuda_checkpoint
        self.delta = loaded.library.ffk_cuda_delta
        self.step = loaded.library.ffk_cuda_step
        self.align = loaded.library.ffk_cuda_align

    def launch(self, function, *arguments) -> None:
        with _current(self.index):
            stream = torch.cuda.current_stream(self.device).cuda_stream
            code = function(self.table, self.count, *arguments, stream)
        if code != 0:
            raise RuntimeError(f"the launch on {self.device} failed: {_message(self.loaded, code)}")


def _bound(plan: Plan) -> Moves:
    if plan.native is None:
        plan.native = Moves(plan)
    return plan.native


def checkpoint_(plan: Plan, best: Sequence[Tensor]) -> None:
    """best ← W"""
    moves = _bound(plan)
    moves.launch(moves.checkpoint)
    increment_version(best)


def delta_(plan: Plan, deltas: Sequence[Tensor], best: Sequence[Tensor]) -> None:
    """Δ ← W − best ; best ← W"""
    moves = _bound(plan)
    moves.launch(moves.delta)
    increment_version(deltas)
    increment_version(best)


def step_(
    plan: Plan,
    weights: Sequence[Tensor],
    best: Sequence[Tensor],
    accept: bool | Tensor,
    k: float | Tensor,
) -> None:
    """base = accept ? W : best ; best ← base ; W ← base + k·Δ

    `accept` (int32 [1]) and `k` (float32 [1]) are on the device and read by the kernel, or they are host
    numbers and part of the launch.
    """
    # Names of their own: rebinding `accept` or `k` could free a tensor before the kernel is launched on it.
    accept_at, accept_now = (accept.data_ptr(), 0) if isinstance(accept, Tensor) else (None, int(accept))
    k_at, k_now = (k.data_ptr(), 0.0) if isinstance(k, Tensor) else (None, k)
    moves = _bound(plan)
    moves.launch(moves.step, accept_at, k_at, accept_now, k_now)
    # What the device will decide is not known here: both may change.
    if accept_now or accept_at is not None:
        increment_version(best)
    if k_now != 0 or k_at is not None or not accept_now:
        increment_version(weights)


def align_(plan: Plan, best: Sequence[Tensor], out: Tensor) -> None:
    """out ← ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W"""
    moves = _bound(plan)
    moves.launch(moves.align, *(tensor.data_ptr() for tensor in (*plan.gradients.tensors(), out)))
    increment_version(best)
    increment_version(out)
