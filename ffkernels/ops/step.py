"""The weight moves of Fast Forward over all adapter tensors at once.

    checkpoint_(table)          best ← W
    delta_(table)               Δ ← W − best ; best ← W
    step_(table, accept, k)     base = accept ? W : best ; best ← base ; W ← base + k·Δ
    delta_absmax(table)         max |Δ|, read from the device
    delta_absmax_on_device(table)   the same, left on the device

`step_` with accept = 1, k = 1 is the paper's step together with the checkpoint of the weights it leaves;
accept = 0, k = 0 is the rollback. Per element in float32: k·Δ rounded, base + that rounded, then once to
the storage dtype; k == 0 gives base bit for bit. All implementations agree bit for bit, except for the
payload of a computed NaN.

Each also takes plain lists instead of a table (`step_(weights, deltas, best, accept, k)`); the layout of
such lists is kept by address, so calling again with the same tensors does not check them again.

`accept` and `k` may be tensors of one element. On the device of the weights they are never read back: the
call returns at once, and can be captured in a CUDA graph, which then needs the table to stay alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ffkernels.ops import moves
from ffkernels.ops.moves import Scalar
from ffkernels.ops.table import TensorTable


@torch.no_grad()
def _traced_step(weights, deltas, best, accept: Scalar, k: Scalar, *, impl: str = "auto") -> None:
    accept = moves.traced_scalar(accept, torch.int32, weights)
    k = moves.traced_scalar(k, torch.float32, weights)
    moves.step_(weights, deltas, best, accept, k, impl)


@torch.no_grad()
def _traced_delta(weights, deltas, best, *, impl: str = "auto") -> None:
    moves.delta_(weights, deltas, best, impl)


@torch.no_grad()
def _traced_checkpoint(weights, best, *, impl: str = "auto") -> None:
    moves.checkpoint_(weights, best, impl)


@overload
def checkpoint_(table: TensorTable) -> None: ...
@overload
def checkpoint_(weights: Sequence[Tensor], best: Sequence[Tensor], *, impl: str = "auto") -> None: ...
def checkpoint_(weights, *args, **kwargs):
    """best ← W"""
    if torch.compiler.is_compiling():
        if isinstance(weights, TensorTable):
            return _traced_checkpoint(weights.weights, weights.best, *args, impl=weights.impl, **kwargs)
        return _traced_checkpoint(weights, *args, **kwargs)
    form = moves.checkpoint_table if isinstance(weights, TensorTable) else moves.checkpoint_lists
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
        if isinstance(weights, TensorTable):
            table = weights
            return _traced_delta(table.weights, table.deltas, table.best, *args, impl=table.impl, **kwargs)
        return _traced_delta(weights, *args, **kwargs)
    form = moves.delta_table if isinstance(weights, TensorTable) else moves.delta_lists
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
        if isinstance(weights, TensorTable):
            table = weights
            return _traced_step(table.weights, table.deltas, table.best, *args, impl=table.impl, **kwargs)
        return _traced_step(weights, *args, **kwargs)
    form = moves.step_table if isinstance(weights, TensorTable) else moves.step_lists
    return form(weights, *args, **kwargs)


def delta_absmax(table: TensorTable) -> float:
    """max |Δ| over all tensors; NaN if any element is NaN, 0.0 for an empty table"""
    return moves.delta_absmax(table)


def delta_absmax_on_device(table: TensorTable) -> Tensor:
    """max |Δ| as a float32 scalar [] on the weights' device; NaN if any element is NaN, 0 for an empty table

    Nothing is read back: the call can be captured in a CUDA graph.
    """
    return moves.delta_absmax_on_device(table)
