"""The weight moves in plain torch: the truth for every kernel, and the fallback where none runs.

Arithmetic is float32 for every storage dtype: p = k·Δ is rounded, base + p is rounded, then once more to
the storage dtype. `torch.add(..., alpha=k)` may contract the two into an fma, so the product is made on its
own; only for k = ±1, where it is exact, are they one call. Copies go through a single `_foreach_copy_` over
all tensors, which no Python signal can interrupt: after an exception `best` is either complete or
untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor
from torch.nn.functional import pad

from ffkernels.ops.plan import DTYPE_CODES, SUM_BLOCK, pieces

# Elements of which align_ holds the products at a time, in float64.
_AT_ONCE = 1 << 20


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
def align_(
    weights: Sequence[Tensor], grads: Sequence[Tensor | None], best: Sequence[Tensor], out: Tensor
) -> None:
    """out ← ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W

    d is rounded to float32, to float64 for float64 weights; products and sums are float64. The order of
    the additions is that of csrc/align_cpu.cpp. In a block of 1,024 elements: the 8 vectors of each of 16
    runs, the runs, then the 8 lanes by halves. After that the blocks of one dtype by halves, and the dtypes.
    Elements follow each other as they do in memory, for all that belongs to one weight in the same order.
    """
    total = torch.zeros_like(out)
    for dtype in DTYPE_CODES:
        sums, waiting, held = [], [], 0
        for weight, grad, base in zip(weights, grads, best, strict=True):
            if weight.dtype != dtype:
                continue
            sides = (repeat(None) if side is None else pieces(side) for side in (weight, grad, base))
            for piece in zip(*sides, strict=False):
                for start in range(0, piece[0].numel(), _AT_ONCE):
                    cut = (side if side is None else side[start : start + _AT_ONCE] for side in piece)
                    waiting.append(_products(*cut))
                    held += waiting[-1].shape[1]
                    if held >= _AT_ONCE:
                        sums.append(_block_sums(torch.cat(waiting, 1)))
                        waiting, held = [], 0
        if waiting:
            sums.append(_block_sums(torch.cat(waiting, 1)))
        if sums:
            total = total + _by_halves(torch.cat(sums, 1))
    _copy(best, weights)
    out.copy_(total)


def _products(weight: Tensor, grad: Tensor | None, best: Tensor) -> Tensor:
    """g·d, g·g and d·d, [3, elements], with zeros up to whole blocks; all that has g is zero without one."""
    precision = torch.promote_types(weight.dtype, torch.float32)
    d = (weight.to(precision) - best.to(precision)).double()
    if grad is None:
        found = torch.stack([torch.zeros_like(d), torch.zeros_like(d), d * d])
    else:
        g = grad.double()
        found = torch.stack([g * d, g * g, d * d])
    return pad(found, (0, -len(d) % SUM_BLOCK))


def _block_sums(products: Tensor) -> Tensor:
    """[3, elements] → [3, blocks]"""
    runs = products.view(3, -1, SUM_BLOCK // 64, 8, 8)
    return _by_halves(_one_by_one(_one_by_one(runs.unbind(3)).unbind(2)))


def _one_by_one(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _by_halves(terms: Tensor) -> Tensor:
    """Sums along the last dimension, as if zeros made its length a power of two."""
    while (length := terms.shape[-1]) > 1:
        half = 1 << (length - 1).bit_length() - 1
        terms = torch.cat(
            [terms[..., : length - half] + terms[..., half:], terms[..., length - half : half]], -1
        )
    return terms[..., 0]


@torch.no_grad()
def delta_absmax_on_device(deltas: Sequence[Tensor], device: torch.device) -> Tensor:
    """max |Δ| as a float32 scalar [] that stays on `device`; NaN if any element is, 0 where there is none"""
    # The extremes rather than abs(): no second copy of a large Δ.
    largest = [torch.stack(torch.aminmax(delta)).abs().amax().float() for delta in deltas if delta.numel()]
    if not largest:
        return torch.zeros((), device=device)
    return torch.stack(largest).amax()
