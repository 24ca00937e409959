"""The weight moves in plain torch: the truth for every kernel, and the fallback where none runs.

    checkpoint_   best ← W
    delta_        Δ ← W − best ; best ← W
    step_         base = accept ? W : best ; best ← base ; W ← base + k·Δ

Arithmetic is float32 for every storage dtype: p = k·Δ is rounded, base + p is rounded, then once more to
the storage dtype. `torch.add(..., alpha=k)` may contract the two into an fma, so the product is made on its
own; only for k = ±1, where it is exact, are they one call. Copies go through a single `_foreach_copy_` over
all tensors, which no Python signal can interrupt: after an exception `best` is either complete or
untouched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if to:
        torch._foreach_copy_(list(to), list(source))


@torch.no_grad()
def checkpoint_(weights: Sequence[Tensor], best: Sequence[Tensor]) -> None:
    """best ← W"""
    _copy(best, weights)


@torch.no_grad()
def delta_(weights: Sequence[Tensor], deltas: Sequence[Tensor], best: Sequence[Tensor]) -> None:
    """Δ ← W − best ; best ← W"""
    for weight, delta, base in zip(weights, deltas, best, strict=True):
        if weight.dtype == torch.float32:
            torch.sub(weight, base, out=delta)
        else:
            delta.copy_(weight.float().sub_(base.float()))
    _copy(best, weights)


@torch.no_grad()
def step_(
    weights: Sequence[Tensor], deltas: Sequence[Tensor], best: Sequence[Tensor], accept: bool, k: float
) -> None:
    """base = accept ? W : best ; best ← base ; W ← base + k·Δ, with k already a float32 value"""
    if accept:
        _copy(best, weights)
    else:
        _copy(weights, best)
    if k == 0:
        return
    if k in (1.0, -1.0):
        if weights:
            torch._foreach_add_(list(weights), list(deltas), alpha=k)
        return
    for weight, delta in zip(weights, deltas, strict=True):
        if weight.dtype == torch.float32:
            weight.add_(delta * k)
        else:
            weight.copy_(weight.float().add_(delta.float().mul_(k)))


@torch.no_grad()
def step_by_device_(
    weights: Sequence[Tensor], deltas: Sequence[Tensor], best: Sequence[Tensor], accept: Tensor, k: Tensor
) -> None:
    """The same where only the device knows accept (int32 [1]) and k (float32 [1]): nothing is read back."""
    accept, k = accept.reshape(()).bool(), k.reshape(())
    still = k == 0
    for base, weight in zip(best, weights, strict=True):
        base.copy_(torch.where(accept, weight, base))
    for weight, delta, base in zip(weights, deltas, best, strict=True):
        moved = base.float().add_(delta.float().mul_(k)) if base.dtype != torch.float32 else base + delta * k
        weight.copy_(torch.where(still, base, moved.to(base.dtype)))


@torch.no_grad()
def delta_absmax_on_device(deltas: Sequence[Tensor], device: torch.device) -> Tensor:
    """The same as a float32 scalar [] that stays on `device`: nothing waits for it."""
    # The extremes rather than abs(): no second copy of a large Δ.
    largest = [torch.stack(torch.aminmax(delta)).abs().amax().float() for delta in deltas if delta.numel()]
    if not largest:
        return torch.zeros((), device=device)
    return torch.stack(largest).amax()


def delta_absmax(deltas: Sequence[Tensor]) -> float:
    """max |Δ| over all tensors, NaN if any element is NaN, 0.0 when there is none"""
    if not deltas:
        return 0.0
    value = float(delta_absmax_on_device(deltas, deltas[0].device))
    return math.nan if math.isnan(value) else value
