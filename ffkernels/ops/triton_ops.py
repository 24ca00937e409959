"""The weight moves as Triton kernels: one launch per dtype, whatever the number and sizes of the tensors.

    checkpoint   best ← W                                                   reads  N, writes  N
    delta        Δ ← W − best ; best ← W                                    reads 2N, writes 2N
    step         base = accept ? W : best ; best ← base ; W ← base + k·Δ    reads 2N, writes 2N, or less

N is the bytes of the weights. A program moves one row of the plan, int64 (W, Δ, best, elements), so none has
to search for its tensor. `accept` (int32) and `k` (float32) are read from device memory: nothing on the host
decides or waits. A step moves no more than it must: best is written only when accepted (else 3N in all), and
with k = 0 it is a plain copy that never reads Δ (2N).

A row of BLOCK elements whose three addresses are multiples of 16 takes 128-bit accesses without a mask. Any
other row, the end of a tensor or a misaligned view, takes masked accesses of single elements, in the same
launch.
Arithmetic is float32, k·Δ rounded before the sum (no fma), the result rounded once to the storage dtype.
Addresses and offsets are 64-bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffkernels.ops.table import GPU_CHUNK, Group, Plan

# With 8 warps a step fits in 32 registers: a multiprocessor then holds as many threads as it has room for.
WARPS = 8
# Elements per masked access. Other than GPU_CHUNK, because Triton lays out all accesses of one shape alike:
# in the shape of the wide path the narrow one would send its elements through shared memory.
PIECE = tl.constexpr(512)

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _row(rows):
    row = rows + tl.program_id(0).to(tl.int64) * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if WIDE else pointer


@triton.jit
def _copy(source, target, n, DTYPE: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    source = _pointer(source, DTYPE, WIDE)
    target = _pointer(target, DTYPE, WIDE)
    start = tl.full([], 0, tl.int64)
    while start < n:
        i = tl.multiple_of(start, SIZE) + tl.arange(0, SIZE)
        mask = None if WIDE else i < n
        tl.store(target + i, tl.load(source + i, mask), mask)
        start += SIZE


@triton.jit
def _subtract(w, delta, best, n, DTYPE: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr):
    w = _pointer(w, DTYPE, WIDE)
    delta = _pointer(delta, DTYPE, WIDE)
    best = _pointer(best, DTYPE, WIDE)
    start = tl.full([], 0, tl.int64)
    while start < n:
        i = tl.multiple_of(start, SIZE) + tl.arange(0, SIZE)
        mask = None if WIDE else i < n
        after = tl.load(w + i, mask)
        before = tl.load(best + i, mask)
        tl.store(delta + i, (after.to(tl.float32) - before.to(tl.float32)).to(DTYPE), mask)
        tl.store(best + i, after, mask)
        start += SIZE


@triton.jit
def _add(
    w, delta, best, n, accept, k, minus_zero, DTYPE: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr
):
    source = _pointer(tl.where(accept, w, best), DTYPE, WIDE)
    w = _pointer(w, DTYPE, WIDE)
    delta = _pointer(delta, DTYPE, WIDE)
    best = _pointer(best, DTYPE, WIDE)
    start = tl.full([], 0, tl.int64)
    while start < n:
        i = tl.multiple_of(start, SIZE) + tl.arange(0, SIZE)
        mask = None if WIDE else i < n
        base = tl.load(source + i, mask)
        change = tl.load(delta + i, mask).to(tl.float32)
        if accept:
            tl.store(best + i, base, mask)
        # fma(Δ, k, -0.0) is k·Δ rounded, signs of zero included. A plain product beside a sum is contracted
        # by ptxas of CUDA 12.9 and 13.0 for sm_100, even where both are marked as rounded.
        moved = base.to(tl.float32) + tl.fma(change, k, minus_zero)
        tl.store(w + i, moved.to(DTYPE), mask)
        start += SIZE


@triton.jit
def _checkpoint_kernel(rows, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    w, _, best, n = _row(rows)
    if (n == BLOCK) & (((w | best) & 15) == 0):
        _copy(w, best, n, DTYPE, BLOCK, True)
    else:
        _copy(w, best, n, DTYPE, PIECE, False)


@triton.jit
def _delta_kernel(rows, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    w, delta, best, n = _row(rows)
    if (n == BLOCK) & (((w | delta | best) & 15) == 0):
        _subtract(w, delta, best, n, DTYPE, BLOCK, True)
    else:
        _subtract(w, delta, best, n, DTYPE, PIECE, False)


@triton.jit(do_not_specialize=("accept_ptr", "k_ptr"))  # one build, wherever the two lie in memory
def _step_kernel(rows, accept_ptr, k_ptr, minus_zero, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    w, delta, best, n = _row(rows)
    accept = tl.load(accept_ptr) != 0
    k = tl.load(k_ptr)
    wide = (n == BLOCK) & (((w | delta | best) & 15) == 0)
    if k == 0:  # base + 0·Δ is not base where Δ is not finite or base is -0.0
        source = tl.where(accept, w, best)
        target = tl.where(accept, best, w)
        if wide:
            _copy(source, target, n, DTYPE, BLOCK, True)
        else:
            _copy(source, target, n, DTYPE, PIECE, False)
    else:
        if wide:
            _add(w, delta, best, n, accept, k, minus_zero, DTYPE, BLOCK, True)
        else:
            _add(w, delta, best, n, accept, k, minus_zero, DTYPE, PIECE, False)


def _launch(kernel, plan: Plan, *arguments) -> None:
    with torch.cuda.device(plan.device) if plan.device.type == "cuda" else nullcontext():
        for group in plan.groups:
            kernel[(len(group.rows),)](
                group.rows,
                *arguments,
                DTYPE=_DTYPES[group.dtype],
                BLOCK=GPU_CHUNK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )


def prepare(device: torch.device) -> None:
    """Compile and load every kernel there: for the first time this must not happen while a graph is captured.

    A grid of no programs is compiled and loaded for like any other, and not launched.
    """
    rows = torch.empty((0, 4), dtype=torch.int64, device=device)
    plan = Plan(device, 0, [Group(dtype, rows) for dtype in _DTYPES])
    _launch(_checkpoint_kernel, plan)
    _launch(_delta_kernel, plan)
    _launch(_step_kernel, plan, rows.view(torch.int32), rows.view(torch.float32), -0.0)


def checkpoint_(plan: Plan, best: Sequence[Tensor]) -> None:
    """best ← W"""
    _launch(_checkpoint_kernel, plan)
    torch.autograd.graph.increment_version(best)


def delta_(plan: Plan, deltas: Sequence[Tensor], best: Sequence[Tensor]) -> None:
    """Δ ← W − best ; best ← W"""
    _launch(_delta_kernel, plan)
    torch.autograd.graph.increment_version(deltas)
    torch.autograd.graph.increment_version(best)


def step_(
    plan: Plan,
    weights: Sequence[Tensor],
    best: Sequence[Tensor],
    accept: Tensor,
    k: Tensor,
) -> None:
    """base = accept ? W : best ; best ← base ; W ← base + k·Δ, with accept int32 [1] and k float32 [1]"""
    # -0.0 is an argument so that no compiler can know it.
    _launch(_step_kernel, plan, accept, k, -0.0)
    # What accept and k say is not known here: both sides count as written.
    torch.autograd.graph.increment_version(best)
    torch.autograd.graph.increment_version(weights)
