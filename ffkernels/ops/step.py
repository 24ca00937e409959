"""The weight moves of Fast Forward over all adapter tensors at once (docs/kernels.md).

    checkpoint_(table)          best ← W
    delta_(table)               Δ ← W − best ; best ← W
    step_(table, accept, k)     base = accept ? W : best ; best ← base ; W ← base + k·Δ
    delta_absmax(table)         max |Δ|, read from the device
    delta_absmax_on_device(table)   the same, left on the device

Per element in float32: k·Δ rounded, base + that rounded, then once to the storage dtype; k == 0 gives base
bit for bit. All implementations agree bit for bit, except for the payload of a computed NaN.

Each also takes plain lists instead of a table (`step_(weights, deltas, best, accept, k)`), whose layout is
kept by address. `accept` and `k` may be tensors of one element. On the device of the weights they are never
read back: the call returns at once, and can be captured in a CUDA graph, which then needs the table to stay
alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ffkernels.ops import moves, native, reference
from ffkernels.ops.moves import Scalar
from ffkernels.ops.table import TensorTable


@torch.no_grad()
def _traced(operator, sides: tuple[str, ...], weights, args, kwargs) -> None:
    """While torch.compile traces, a move is its operator; `sides` are what it takes of a table beside W."""
    if not isinstance(weights, TensorTable):
        return operator(weights, *args, **kwargs)
    lists = [getattr(weights, side) for side in sides]
    return operator(weights.weights, *lists, *args, impl=weights.impl, **kwargs)


@overload
def checkpoint_(table: TensorTable) -> None: ...
@overload
def checkpoint_(weights: Sequence[Tensor], best: Sequence[Tensor], *, impl: str = "auto") -> None: ...
def checkpoint_(weights, *args, **kwargs):
    """best ← W"""
    if torch.compiler.is_compiling():
        return _traced(moves.checkpoint_, ("best",), weights, args, kwargs)
    form = moves.checkpoint if isinstance(weights, TensorTable) else moves.checkpoint_lists
    return form(weights, *args, **kwargs)


@overload
def delta_(table: TensorTable) -> None: ...
@overload
def delta_(
    weights: Sequence[Tensor], deltas: Sequence[Tensor], best: Sequence[Tensor], *, impl: str = "auto"
) -> None: ...
def delta_(weights, *args, **kwargs):
    """Δ ← W − best ; best ← W"""
    if torch.compiler.is_compiling():
        return _traced(moves.delta_, ("deltas", "best"), weights, args, kwargs)
    form = moves.delta if isinstance(weights, TensorTable) else moves.delta_lists
    return form(weights, *args, **kwargs)


@overload
def step_(table: TensorTable, accept: Scalar, k: Scalar) -> None: ...
@overload
def step_(
    weights: Sequence[Tensor],
    deltas: Sequence[Tensor],
    best: Sequence[Tensor],
    accept: Scalar,
    k: Scalar,
    *,
    impl: str = "auto",
) -> None: ...
def step_(weights, *args, **kwargs):
    """base = accept ? W : best ; best ← base ; W ← base + k·Δ"""
    if torch.compiler.is_compiling():
        return _traced(moves.traced_step, ("deltas", "best"), weights, args, kwargs)
    form = moves.step if isinstance(weights, TensorTable) else moves.step_lists
    return form(weights, *args, **kwargs)


def delta_absmax(table: TensorTable) -> float:
    """max |Δ| over all tensors; NaN if any element is NaN, 0.0 for an empty table"""
    # The flat arenas stand for their tensors: what lies between those is zero.
    if table.impl == "cpp":
        return native.delta_absmax(table.plan)
    return float(delta_absmax_on_device(table))


def delta_absmax_on_device(table: TensorTable) -> Tensor:
    """max |Δ| as a float32 scalar [] on the weights' device; NaN if any element is NaN, 0 for an empty table

    Nothing is read back: the call can be captured in a CUDA graph.
    """
    return reference.delta_absmax_on_device(table.delta_flats, table.plan.device)
