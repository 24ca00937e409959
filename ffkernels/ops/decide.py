"""The searches over τ as one small kernel: what to do with a loss is decided where the loss is.

    begin(state, largest)       a fresh search, or none where the update, max |Δ|, is zero or not finite
    decide(state, loss, sums)   sure(loss, sums) of `search.significance`, then observe(τ, loss, sure) and
                                propose() of `search.search`

The kernel is the twin of `Rises`, `LinearSearch` and `ParabolicSearch`: float64 in the same order of
operations, no fma, so that equal losses give equal choices. It leaves the arguments of the `step_` that
follows in device memory: `accept`, and k = τ_next − τ_best, which is 0 when the search has ended, so that
this step then restores the best weights. `go` says whether there is a next τ, and is what the condition of
a CUDA WHILE node becomes (`condition`). After the end a call changes nothing. What lies where is said in
`decide_state`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import dtype, extern, extern_elementwise

from ffkernels.ops import condition
from ffkernels.ops.decide_state import MAX_TAU_LIMIT, REASONS, Decided, DecideState

__all__ = ["MAX_TAU_LIMIT", "REASONS", "DecideState", "Decided", "begin", "decide", "prepare"]

IMPROVEMENT_ENDED = tl.constexpr(1)
NO_IMPROVEMENT = tl.constexpr(2)
REACHED_MAX_TAU = tl.constexpr(3)
CONVERGED = tl.constexpr(4)
BUDGET_SPENT = tl.constexpr(5)
BASELINE_NOT_FINITE = tl.constexpr(6)
NO_UPDATE = tl.constexpr(7)
UPDATE_NOT_FINITE = tl.constexpr(8)
REFINE_TOLERANCE = tl.constexpr(1e-2)
GOLDEN = tl.constexpr(0.3819660112501051)
INF = tl.constexpr(math.inf)
# Instead of a number of vertices.
DOUBLING = tl.constexpr(-1)
HALVING = tl.constexpr(-2)
UNPROVEN = tl.constexpr(4)  # beside the vertices: the last loss in the bracket was a rise that is not sure

# What `_set_condition` links: a call that the driver resolves when it loads the kernel, as it does printf's.
# Triton itself does not offer it.
CONDITION_LIBRARY = {"ffk_condition": str(Path(__file__).with_name("condition.ll"))}


@extern
def _set_condition(handle, value, _semantic=None):
    signature, symbol = (dtype("int64"), dtype("int32")), ("ffk_set_condition", dtype("int32"))
    return extern_elementwise(
        "ffk_condition", "", [handle, value], {signature: symbol}, is_pure=False, _semantic=_semantic
    )


@triton.jit
def _golden(a, b, c):
    right = tl.floor((c - b).to(tl.float64) * GOLDEN + 0.5).to(tl.int64)
    left = tl.floor((b - a).to(tl.float64) * GOLDEN + 0.5).to(tl.int64)
    return tl.where(c - b >= b - a, b + tl.maximum(right, 1), b - tl.maximum(left, 1))


@triton.jit
def _parabola(tau, a, b, fb, left, curvature):
    return fb + (tau - b).to(tl.float64) * (left + curvature * (tau - a).to(tl.float64))


@triton.jit
def _linear(tau, accepted, max_tau):
    """The next τ, and why there is none (0: there is)."""
    failed = tl.where(tau > 1, IMPROVEMENT_ENDED, NO_IMPROVEMENT)
    return tau + 1, tl.where(accepted, tl.where(tau == max_tau, REACHED_MAX_TAU, 0), failed)


@triton.jit
def _higher(sums, best, examples, rows, critical):
    """`higher` of search.significance: one addition after the other, as on the host."""
    tokens = examples
    weights = examples + rows
    total = tl.full([], 0.0, tl.float64)
    size = tl.full([], 0.0, tl.float64)
    # No range(): the interpreter of Triton 3.6 cannot make one of a loaded number under NumPy 2.4 and newer.
    i = rows - rows
    while i < rows:
        total += tl.load(sums + i) - tl.load(best + i)
        size += tl.load(tokens + i)
        i += 1
    mean = total / size
    spread = tl.full([], 0.0, tl.float64)
    i = rows - rows
    while i < rows:
        moved = tl.load(sums + i) - tl.load(best + i)
        rest = (moved - tl.load(tokens + i) * mean) * tl.load(weights + i)
        spread += rest * rest
        i += 1
    return (total > 0.0) & (total * total > critical * spread)


@triton.jit
def _is_sure(loss, count, lowest, sums, best, examples, capacity):
    """Whether this loss is a real rise over the lowest one before it, whose sums `best` is to hold."""
    rows = tl.load(examples.to(tl.pointer_type(tl.int64)))
    sure = (rows == 0) | (loss == INF)
    if (count == 0) | (loss < lowest):
        sure = count < 0
        lane = tl.arange(0, 32)
        start = rows - rows
        while start < rows:
            inside = start + lane < rows
            tl.store(best + start + lane, tl.load(sums + start + lane, inside), inside)
            start += 32
    else:
        if sure == 0:
            critical = tl.load(examples + 2 + count)
            sure = _higher(sums, best, examples + 2 + capacity, rows, critical)
    return sure


@triton.jit
def _parabolic(tau, loss, accepted, sure, b, fb, best_tau, best_loss, start, integers, numbers, taus):
    """The next τ, and why there is none (0: there is). b is what was best before this loss."""
    count = tl.load(integers + 1) + 1
    a = tl.load(integers + 3)
    c = tl.load(integers + 4)
    vertices = tl.load(integers + 5)
    again = vertices >= UNPROVEN
    vertices = tl.where(again, vertices - UNPROVEN, vertices)
    max_tau = tl.load(integers + 6)
    capacity = tl.load(integers + 7)
    losses = (taus + capacity).to(tl.pointer_type(tl.float64))
    baseline = tl.load(numbers + 1)
    fa = tl.load(numbers + 2)
    fc = tl.load(numbers + 3)
    predicted = tl.load(numbers + 4)
    last_miss = tl.load(numbers + 5)

    following = tau
    stopped = tl.full([], 0, tl.int32)
    refine = tau > 0
    unproven = tau < 0
    miss = tl.full([], INF, tl.float64)
    doubling = vertices == DOUBLING
    if doubling:
        if accepted:
            a = tl.load(taus + count - 2)
            fa = tl.load(losses + count - 2)
            fa = tl.where(tl.abs(fa) < INF, fa, INF)
            c = tau - tau
            fc = tl.full([], INF, tl.float64)
        else:
            if c == 0:
                c = tau
                fc = loss
    else:
        if accepted:
            if tau > b:
                a = b
                fa = fb
            else:
                c = b
                fc = fb
        else:
            if tau > b:
                c = tau
                fc = loss
            else:
                a = tau
                fa = loss
    if vertices < 0:  # the bracket is not closed yet
        ends = (best_tau == 0) | (doubling & (best_tau == start))
        half_of = tl.where(ends, tl.where(doubling, start, tau), 0)
        refine = tau < 0
        if doubling & (tau < max_tau) & (accepted | (sure == 0)):
            following = tl.minimum(2 * tau, max_tau)
        elif half_of > 1:
            vertices = tau - tau + HALVING
            following = half_of // 2
        else:
            vertices = tau - tau
            refine = (best_tau > 0) & (c > 0)
            if best_tau == 0:
                stopped = tl.full([], NO_IMPROVEMENT, tl.int32)
            elif c == 0:  # still falling at the limit
                c = best_tau + 1
                following = best_tau - 1
                if best_tau - a == 1:
                    stopped = tl.full([], REACHED_MAX_TAU, tl.int32)
    else:
        miss = tl.abs(loss - predicted)
        miss = tl.where(miss < INF, miss, INF)
        unproven = (accepted == 0) & (sure == 0)
        if again & unproven & (last_miss <= miss) & (miss < INF):
            refine = tau < 0
            stopped = tl.where(b == max_tau, REACHED_MAX_TAU, CONVERGED)

    if refine:
        wrong = tl.where(last_miss > miss, last_miss, miss)
        last_miss = miss
        b = best_tau
        fb = best_loss
        if c - a <= 2:
            stopped = tl.where(b == max_tau, REACHED_MAX_TAU, CONVERGED)
        elif count >= capacity:
            stopped = tl.full([], BUDGET_SPENT, tl.int32)
        else:
            left = (fb - fa) / (b - a).to(tl.float64)
            right = (fc - fb) / (c - b).to(tl.float64)
            curvature = (right - left) / (c - a).to(tl.float64)
            if (curvature > 0.0) & (curvature < INF):
                vertex = 0.5 * (a + b).to(tl.float64) - 0.5 * left / curvature
                following = tl.floor(vertex + 0.5).to(tl.int64)
                following = tl.minimum(tl.maximum(following, a + 1), c - 1)
                promise = fb - _parabola(following, a, b, fb, left, curvature)
                if promise + wrong <= REFINE_TOLERANCE * (baseline - fb):
                    stopped = tl.full([], CONVERGED, tl.int32)
                else:
                    if vertices < 2:
                        vertices += 1
                        if following == b:
                            if c - b >= b - a:
                                following = b + tl.maximum((c - b) // 4, 1)
                            else:
                                following = b - tl.maximum((b - a) // 4, 1)
                    else:
                        following = _golden(a, b, c)
                    predicted = _parabola(following, a, b, fb, left, curvature)
            else:
                following = _golden(a, b, c)
                predicted = tl.full([], INF, tl.float64)

    tl.store(integers + 3, a)
    tl.store(integers + 4, c)
    tl.store(integers + 5, vertices + tl.where(unproven, UNPROVEN, 0))
    tl.store(numbers + 2, fa)
    tl.store(numbers + 3, fc)
    tl.store(numbers + 4, predicted)
    tl.store(numbers + 5, last_miss)
    return following, stopped


# The handle's type is pinned: an integer's own value would choose it, and each choice be another compilation.
@triton.jit(do_not_specialize=("state", "fresh", "largest_ptr", "handle"))
def _begin_kernel(state, fresh, largest_ptr, handle: tl.int64, CONDITION: tl.constexpr):
    largest = tl.load(largest_ptr)
    go = (largest > 0) & (largest < INF)
    stopped = tl.where(go, 0, tl.where(largest == 0, NO_UPDATE, UPDATE_NOT_FINITE)).to(tl.int64)
    # Flags and k are words 0 and 1: one store writes all, so that no two threads write the same address.
    word = tl.arange(0, 16)
    begun = tl.load(fresh + word)
    begun = tl.where(word == 0, go.to(tl.int64) << 32, tl.where(word == 1, stopped, begun))
    tl.store(state + word, begun)
    if CONDITION:
        _set_condition(handle, go.to(tl.int32))


@triton.jit(do_not_specialize=("state", "loss_ptr", "sums", "best", "examples", "handle"))
def _decide_kernel(
    state, loss_ptr, sums, best, examples, handle: tl.int64, PARABOLIC: tl.constexpr, CONDITION: tl.constexpr
):
    flags = state.to(tl.pointer_type(tl.int32))
    k = state.to(tl.pointer_type(tl.float32)) + 3
    integers = state + 2
    numbers = (state + 10).to(tl.pointer_type(tl.float64))
    taus = state + 16
    capacity = tl.load(integers + 7)
    losses = (taus + capacity).to(tl.pointer_type(tl.float64))
    verdicts = taus + 2 * capacity

    go = tl.load(flags + 1)
    if go == 0:
        tl.store(flags, 0)
        tl.store(k, 0.0)
    else:
        tau = tl.load(integers)
        count = tl.load(integers + 1)
        b = tl.load(integers + 2)
        fb = tl.load(numbers)
        measured = tl.load(loss_ptr)
        loss = tl.where(tl.abs(measured) < INF, measured, INF)
        accepted = (count > 0) & (loss < fb)
        best_tau = tl.where(accepted, tau, b)
        best_loss = tl.where(accepted | (count == 0), loss, fb)
        sure = (count > 0) & (loss >= fb)
        start = tau - tau + 1
        if PARABOLIC:
            sure = _is_sure(loss, count, fb, sums, best, examples, capacity)
            start = tl.load(examples.to(tl.pointer_type(tl.int64)) + 1)
        if count == 0:
            following = start
            stopped = tl.where(loss < INF, 0, BASELINE_NOT_FINITE)
            tl.store(numbers + 1, loss)
        else:
            if PARABOLIC:
                following, stopped = _parabolic(
                    tau, loss, accepted, sure, b, fb, best_tau, best_loss, start, integers, numbers, taus
                )
            else:
                following, stopped = _linear(tau, accepted, tl.load(integers + 6))
        go = (stopped == 0).to(tl.int32)
        tl.store(taus + count, tau)
        tl.store(losses + count, measured)
        tl.store(verdicts + count, sure.to(tl.int64))
        tl.store(integers, following)
        tl.store(integers + 1, count + 1)
        tl.store(integers + 2, best_tau)
        tl.store(numbers, best_loss)
        tl.store(flags, accepted.to(tl.int32))
        tl.store(flags + 1, go)
        tl.store(flags + 2, stopped)
        tl.store(k, tl.where(go != 0, following - best_tau, 0).to(tl.float32))
    if CONDITION:
        _set_condition(handle, go)


def _launch(
    kernel, state: DecideState, *arguments, handle: int | None, programs: int = 1, **constants
) -> None:
    # Of the ways to set a condition (`condition`) only that behind the decision comes without a handle.
    inside = handle is not None and condition.inside(state.device)
    options = {"extern_libs": CONDITION_LIBRARY} if inside else {}
    with torch.cuda.device(state.device) if state.device.type == "cuda" else nullcontext():
        kernel[(programs,)](
            state._memory,
            *arguments,
            condition.signed(handle or 0),
            CONDITION=inside,
            # One warp: its lanes read the state before any of them writes it. Another warp might not.
            num_warps=1,
            enable_fp_fusion=False,
            **constants,
            **options,
        )
        if handle is not None and not inside and programs:
            condition.set_beside(handle, state.go)


def _check(name: str, value: Tensor, dtype: torch.dtype, state: DecideState) -> None:
    if value.dtype != dtype or value.numel() != 1 or value.device != state.device:
        raise ValueError(
            f"{name} is {tuple(value.shape)} {value.dtype} on {value.device}; a decision needs one {dtype}"
            f" element on {state.device}"
        )


def begin(state: DecideState, largest: Tensor, handle: int | None = None) -> None:
    """Reset `state`; `go` is 1 only where 0 < `largest` < ∞, else the search has ended before its first loss.

    Args:
        largest: max |Δ| of the update, one float32 element on the state's device, as
            `ops.delta_absmax_on_device` gives it.
        handle: the cudaGraphConditionalHandle of a WHILE node that follows: it is set to `state.go`.
    """
    _check("largest", largest, torch.float32, state)
    _launch(_begin_kernel, state, state._begin, largest, handle=handle)


def decide(state: DecideState, loss: Tensor, sums: Tensor | None = None, handle: int | None = None) -> None:
    """Take `loss`, one float64 element on the state's device, as that of the τ that was asked for.

    Args:
        sums: the losses by example that it is the mean of, `state.rows` float64 on the same device; None
            where there are none.
        handle: the cudaGraphConditionalHandle of a WHILE node around the launch: it is set to `state.go`.
    """
    _check("loss", loss, torch.float64, state)
    if state.rows > 0 if sums is None else sums.shape != (state.rows,):
        given = "no sums" if sums is None else f"{tuple(sums.shape)} sums"
        raise ValueError(f"{given} by example for a state of {state.rows} rows; give as many as it has")
    if sums is None:
        sums = state._best  # is not read
    elif sums.dtype != torch.float64 or sums.device != state.device or not sums.is_contiguous():
        raise ValueError(
            f"sums are {sums.dtype} on {sums.device}, contiguous: {sums.is_contiguous()}; a decision needs "
            f"contiguous torch.float64 on {state.device}"
        )
    arguments = (loss, sums, state._best, state._examples)
    _launch(_decide_kernel, state, *arguments, handle=handle, PARABOLIC=state.search == "parabolic")


def prepare(state: DecideState, with_condition: bool = False) -> None:
    """Compile and load what `begin` and `decide` will launch, which must not happen during a capture.

    `with_condition` does so for a WHILE node too; a condition exists only there. Grids of no programs are
    compiled and loaded for like any other, and not launched: the state stays as it is.
    """
    largest = torch.zeros(1, dtype=torch.float32, device=state.device)
    loss = torch.zeros(1, dtype=torch.float64, device=state.device)
    arguments = (loss, state._best, state._best, state._examples)
    parabolic = state.search == "parabolic"
    for handle in (None, 0) if with_condition else (None,):
        _launch(_begin_kernel, state, state._begin, largest, handle=handle, programs=0)
        _launch(_decide_kernel, state, *arguments, handle=handle, programs=0, PARABOLIC=parabolic)
    if with_condition and not condition.inside(state.device):
        condition.load(state.device)
