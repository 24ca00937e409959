"""The weight moves as Triton kernels: one launch per dtype, whatever the number and sizes of the tensors.

    checkpoint   best ← W                                                   reads  N, writes  N
    delta        Δ ← W − best ; best ← W                                    reads 2N, writes 2N
    step         base = accept ? W : best ; best ← base ; W ← base + k·Δ    reads 2N, writes 2N, or less
    align        ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W           reads 2N and g, writes N

N is the bytes of the weights. A program moves one row of the plan, int64 (W, Δ, best, elements). `accept`
(int32) and `k` (float32) are read from device memory. A row of BLOCK elements whose three addresses are
multiples of 16 takes 128-bit accesses without a mask, any other row masked accesses of single elements, in
the same launch. Arithmetic is float32, k·Δ rounded before the sum (no fma), the result rounded once to the
storage dtype; of an alignment d is float32 (float64 for float64 weights), products and sums are float64.
docs/kernels.md says why.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffkernels.ops.plan import DTYPE_CODES, DTYPES, GPU_CHUNK, SEGMENT, Group, Plan

# With 8 warps a step fits in 32 registers: a multiprocessor then holds as many threads as it has room for.
WARPS = 8
# Elements per masked access. Other than GPU_CHUNK, because Triton lays out all accesses of one shape alike:
# in the shape of the wide path the narrow one would send its elements through shared memory.
PIECE = tl.constexpr(512)

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
FLOAT32, BFLOAT16, _, FLOAT64 = (tl.constexpr(code) for code in DTYPE_CODES.values())


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


@triton.jit
def _element(gradient, code, i, mask):
    """PIECE elements of a gradient of any dtype, in float64; zeros where there is none."""
    if gradient == 0:
        value = tl.full([PIECE], 0.0, tl.float64)
    elif code == FLOAT64:
        value = tl.load(gradient.to(tl.pointer_type(tl.float64)) + i, mask, 0.0)
    else:
        if code == FLOAT32:
            single = tl.load(gradient.to(tl.pointer_type(tl.float32)) + i, mask, 0.0)
        elif code == BFLOAT16:
            single = tl.load(gradient.to(tl.pointer_type(tl.bfloat16)) + i, mask, 0.0).to(tl.float32)
        else:
            single = tl.load(gradient.to(tl.pointer_type(tl.float16)) + i, mask, 0.0).to(tl.float32)
        value = single.to(tl.float64)
    return value


@triton.jit
def _difference(after, before, DTYPE: tl.constexpr):
    if DTYPE == tl.float64:
        return after - before
    return (after.to(tl.float32) - before.to(tl.float32)).to(tl.float64)


@triton.jit
def _add_each(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _last_of(ticket, members):
    """Whether this program is the last of `members` to come here, with all that others stored in sight."""
    tl.debug_barrier()  # what any thread of this program has stored is stored
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == members - 1
    if last:
        tl.store(ticket, 0)  # for the next launch
    return last


@triton.jit
def _sums(at, stride, mask):
    """Sums that other programs stored; they are in the second cache, not in that of this multiprocessor."""
    dot = tl.load(at, mask, 0.0, cache_modifier=".cg")
    gradient = tl.load(at + stride, mask, 0.0, cache_modifier=".cg")
    difference = tl.load(at + 2 * stride, mask, 0.0, cache_modifier=".cg")
    return dot, gradient, difference


@triton.jit
def _store_sums(at, stride, dot, gradient, difference):
    tl.store(at, dot)
    tl.store(at + stride, gradient)
    tl.store(at + 2 * stride, difference)


@triton.jit(do_not_specialize=("places", "out", "count", "first"))  # one build, whatever their values
def _align_kernel(
    rows,
    places,
    gradients,
    scratch,
    tickets,
    out,
    count,
    first,
    DTYPE: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    w, _, best, n = _row(rows)
    place = places + tl.program_id(0).to(tl.int64) * 3
    tensor, begin = tl.load(place), tl.load(place + 1)
    gradient, code = tl.load(gradients + tensor * 2), tl.load(gradients + tensor * 2 + 1)
    same = gradient + begin * (DTYPE.primitive_bitwidth // 8)
    if (n == BLOCK) & (gradient != 0) & (code == CODE) & (((w | best | same) & 15) == 0):
        i = tl.arange(0, BLOCK)
        after = tl.load(_pointer(w, DTYPE, True) + i)
        before = tl.load(_pointer(best, DTYPE, True) + i)
        g = tl.load(_pointer(same, DTYPE, True) + i)
        tl.store(_pointer(best, DTYPE, True) + i, after)
        d = _difference(after, before, DTYPE)
        g = g.to(tl.float64) if DTYPE == tl.float64 else g.to(tl.float32).to(tl.float64)
        dot, square, length = tl.reduce((g * d, g * g, d * d), 0, _add_each)
    else:
        dots = tl.full([PIECE], 0.0, tl.float64)
        squares, lengths = dots, dots
        start = tl.full([], 0, tl.int64)
        while start < n:
            i = start + tl.arange(0, PIECE)
            mask = i < n
            after = tl.load(_pointer(w, DTYPE, False) + i, mask, 0.0)
            before = tl.load(_pointer(best, DTYPE, False) + i, mask, 0.0)
            g = _element(gradient, code, begin + i, mask)
            tl.store(_pointer(best, DTYPE, False) + i, after, mask)
            d = _difference(after, before, DTYPE)
            dots += g * d
            squares += g * g
            lengths += d * d
            start += PIECE
        dot, square, length = tl.reduce((dots, squares, lengths), 0, _add_each)
        if gradient == 0:  # not even times an infinite d does a missing gradient count
            dot = square

    # The last program of 128 neighbours adds up their sums, the last of all adds up those.
    program = tl.program_id(0)
    segment, segments = program // SEGMENT, (count + SEGMENT - 1) // SEGMENT
    _store_sums(scratch + program, count, dot, square, length)
    if _last_of(tickets + 1 + segment, tl.minimum(count - segment * SEGMENT, SEGMENT)):
        i = segment * SEGMENT + tl.arange(0, SEGMENT)
        dot, square, length = tl.reduce(_sums(scratch + i, count, i < count), 0, _add_each)
        of_segments = scratch + 3 * count.to(tl.int64)
        _store_sums(of_segments + segment, segments, dot, square, length)
        if _last_of(tickets, segments):
            dots = tl.full([SEGMENT], 0.0, tl.float64)
            squares, lengths = dots, dots
            start = tl.full([], 0, tl.int32)
            while start < segments:
                i = start + tl.arange(0, SEGMENT)
                more = _sums(of_segments + i, segments, i < segments)
                dots += more[0]
                squares += more[1]
                lengths += more[2]
                start += SEGMENT
            dot, square, length = tl.reduce((dots, squares, lengths), 0, _add_each)
            if first == 0:
                dot += tl.load(out)
                square += tl.load(out + 1)
                length += tl.load(out + 2)
            _store_sums(out, 1, dot, square, length)


def _launch(kernel, plan: Plan, *arguments) -> None:
    for group in plan.groups:
        _launch_one(kernel, plan.device, group, *arguments)


def _launch_one(kernel, device: torch.device, group: Group, *arguments, **constants) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(len(group.rows),)](
            group.rows,
            *arguments,
            DTYPE=_DTYPES[group.dtype],
            BLOCK=GPU_CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=False,
            **constants,
        )


def prepare(device: torch.device) -> None:
    """Compile and load what a stage launches: for the first time this must not happen during a capture.

    A grid of no programs is compiled and loaded for like any other, and not launched.
    """
    rows = torch.empty((0, 4), dtype=torch.int64, device=device)
    plan = Plan(device, 0, [Group(dtype, rows, rows) for dtype in DTYPES])
    _launch(_checkpoint_kernel, plan)
    _launch(_delta_kernel, plan)
    _launch(_step_kernel, plan, rows.view(torch.int32), rows.view(torch.float32), -0.0)


def checkpoint_(plan: Plan) -> None:
    """best ← W"""
    _launch(_checkpoint_kernel, plan)


def delta_(plan: Plan) -> None:
    """Δ ← W − best ; best ← W"""
    _launch(_delta_kernel, plan)


def step_(plan: Plan, accept: Tensor, k: Tensor) -> None:
    """base = accept ? W : best ; best ← base ; W ← base + k·Δ, with accept int32 [1] and k float32 [1]"""
    # -0.0 is an argument so that no compiler can know it.
    _launch(_step_kernel, plan, accept, k, -0.0)


def align_(plan: Plan, out: Tensor) -> None:
    """out ← ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W"""
    for i, group in enumerate(plan.groups):
        arguments = (group.places, *plan.gradients.tensors(), out, len(group.rows), int(i == 0))
        codes = {"CODE": DTYPE_CODES[group.dtype], "SEGMENT": SEGMENT}
        _launch_one(_align_kernel, plan.device, group, *arguments, **codes)
