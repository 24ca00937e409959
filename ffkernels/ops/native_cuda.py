"""The CUDA kernels of csrc, loaded over the same plain C ABI, and looked for in the same way as those of the
CPU (`native`), with FFKERNELS_CUDA_LIBRARY and `build_cuda`. Neither library needs the other.

Loading needs no GPU; whether one can run the kernels is asked once per device.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ffkernels.ops import build
from ffkernels.ops.native import GROUPS, Moves, NativeLibrary, Recipe
from ffkernels.ops.plan import Plan

CURE = "run `ffkernels doctor --build` (needs nvcc), or reinstall ffkernels where nvcc is present"

_AT = _STREAM = ctypes.c_void_p
RECIPE = Recipe(
    kind="cuda",
    name="CUDA kernels",
    cure=CURE,
    variable="FFKERNELS_CUDA_LIBRARY",
    file=build.CUDA_LIBRARY,
    sources=build.CUDA_SOURCES,
    source_id=build.cuda_source_id,
    compile=build.compile_cuda_library,
    prefix="ffk_cuda_",
    signatures={
        "prepare": (),
        "checkpoint": (*GROUPS, _STREAM),
        "delta": (*GROUPS, _STREAM),
        "step": (*GROUPS, _AT, _AT, ctypes.c_int32, ctypes.c_float, _STREAM),
        "align": (*GROUPS, _AT, _AT, _AT, _AT, _STREAM),
    },
)


@cache
def load() -> NativeLibrary:
    """The library, opened once per process."""
    loaded = RECIPE.find()
    if loaded.library is not None:
        loaded.library.ffk_cuda_error_string.argtypes = (ctypes.c_int32,)
        loaded.library.ffk_cuda_error_string.restype = ctypes.c_char_p
    return loaded


def build_cuda(*, again: bool = False) -> Path:
    """Compile the CUDA kernels into the user's cache, load them; `BuildError` says why not.

    A library of the same sources and flags that is there and opens is taken as it is, unless `again`.
    """
    path = RECIPE.build(again)
    load.cache_clear()
    usable.cache_clear()
    return path


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


def _launch(plan: Plan, move: str, *arguments) -> None:
    if plan.native is None:
        plan.native = Moves(plan, RECIPE, load(), RECIPE.prefix)
    bound = plan.native
    with _current(plan.device.index):
        stream = torch.cuda.current_stream(plan.device).cuda_stream
        code = getattr(bound, move)(bound.table, bound.count, *arguments, stream)
    if code != 0:
        raise RuntimeError(f"the launch on {plan.device} failed: {_message(bound.loaded, code)}")


def checkpoint_(plan: Plan) -> None:
    """best ← W"""
    _launch(plan, "checkpoint")


def delta_(plan: Plan) -> None:
    """Δ ← W − best ; best ← W"""
    _launch(plan, "delta")


def step_(plan: Plan, accept: bool | Tensor, k: float | Tensor) -> None:
    """base = accept ? W : best ; best ← base ; W ← base + k·Δ

    `accept` (int32 [1]) and `k` (float32 [1]) are on the device and read by the kernel, or they are host
    numbers and part of the launch.
    """
    # Names of their own: rebinding `accept` or `k` could free a tensor before the kernel is launched on it.
    accept_at, accept_now = (accept.data_ptr(), 0) if isinstance(accept, Tensor) else (None, int(accept))
    k_at, k_now = (k.data_ptr(), 0.0) if isinstance(k, Tensor) else (None, k)
    _launch(plan, "step", accept_at, k_at, accept_now, k_now)


def align_(plan: Plan, out: Tensor) -> None:
    """out ← ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W"""
    _launch(plan, "align", *(tensor.data_ptr() for tensor in (*plan.gradients.tensors(), out)))
