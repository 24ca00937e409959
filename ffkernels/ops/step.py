"""The weight moves of Fast Forward over all adapter tensors at once.

    checkpoint_(table)          best ← W
    delta_(table)               Δ ← W − best ; best ← W
    step_(table, accept, k)     base = accept ? W : best ; best ← base ; W ← base + k·Δ
    delta_absmax(table)         max |Δ|

`step_` with accept = 1, k = 1 is the paper's step together with the checkpoint of the weights it leaves;
accept = 0, k = 0 is the rollback. Per element in float32: k·Δ rounded, base + that rounded, then once to
the storage dtype; k == 0 gives base bit for bit. All implementations agree bit for bit, except for the
payload of a computed NaN.

Each also takes plain lists instead of a table (`step_(weights, deltas, best, accept, k)`); the layout of
such lists is kept by address, so calling again with the same tensors does not check them again.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from typing import overload

from torch import Tensor

from ffkernels.ops import native, reference
from ffkernels.ops.dispatch import choose
from ffkernels.ops.table import Plan, TensorTable, make_plan

Scalar = bool | int | float | Tensor

_PLANS_KEPT = 16
_plans: OrderedDict[tuple, Plan] = OrderedDict()


def _accept(value: Scalar) -> bool:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"accept has shape {tuple(value.shape)}; give a bool or a tensor of one element")
    return bool(value)


def _k(value: Scalar) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"k has shape {tuple(value.shape)}; give a number or a tensor of one element")
    return ctypes.c_float(float(value)).value


def _fingerprint(tensors: Sequence[Tensor]) -> tuple:
    return tuple((t.data_ptr(), t.shape, t.dtype, t.device, t.is_contiguous()) for t in tensors)


def _plan_for(
    weights: Sequence[Tensor], deltas: Sequence[Tensor] | None, best: Sequence[Tensor], impl: str
) -> Plan:
    """The checked layout of three lists. Addresses, shapes and dtypes decide: a plan found is valid."""
    try:
        sides = (weights, deltas or (), best)
        key = (impl, deltas is None, *(_fingerprint(side) for side in sides))
    except (AttributeError, RuntimeError, NotImplementedError):
        key = None  # something that is no plain tensor: make_plan says what
    if key is not None and key in _plans:
        _plans.move_to_end(key)
        return _plans[key]
    plan = make_plan(weights, deltas, best)
    plan.impl = choose(impl, plan.device)
    if key is not None:
        _plans[key] = plan
        while len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)
    return plan


def _checkpoint_lists(weights: Sequence[Tensor], best: Sequence[Tensor], *, impl: str = "auto") -> None:
    plan = _plan_for(weights, None, best, impl)
    if plan.impl == "cpp":
        native.checkpoint_(plan, best)
    else:
        reference.checkpoint_(weights, best)


def _delta_lists(weights, deltas, best, *, impl: str = "auto") -> None:
    plan = _plan_for(weights, deltas, best, impl)
    if plan.impl == "cpp":
        native.delta_(plan, deltas, best)
    else:
        reference.delta_(weights, deltas, best)


def _step_lists(weights, deltas, best, accept: Scalar, k: Scalar, *, impl: str = "auto") -> None:
    plan = _plan_for(weights, deltas, best, impl)
    accept, k = _accept(accept), _k(k)
    if plan.impl == "cpp":
        native.step_(plan, weights, best, accept, k)
    else:
        reference.step_(weights, deltas, best, accept, k)


def _checkpoint_table(table: TensorTable) -> None:
    table.check_addresses()
    if table.impl == "cpp":
        native.checkpoint_(table.plan, table.best_flats)
    else:
        reference.checkpoint_(table.weights, table.best)


def _delta_table(table: TensorTable) -> None:
    table.check_addresses()
    if table.impl == "cpp":
        native.delta_(table.plan, table.delta_flats, table.best_flats)
    else:
        reference.delta_(table.weights, table.deltas, table.best)


def _step_table(table: TensorTable, accept: Scalar, k: Scalar) -> None:
    table.check_addresses()
    accept, k = _accept(accept), _k(k)
    if table.impl == "cpp":
        native.step_(table.plan, table.weights, table.best_flats, accept, k)
    else:
        reference.step_(table.weights, table.deltas, table.best, accept, k)


@overload
def checkpoint_(table: TensorTable) -> None: ...
@overload
def checkpoint_(weights: Sequence[Tensor], best: Sequence[Tensor], *, impl: str = "auto") -> None: ...
def checkpoint_(weights, *args, **kwargs):
    """best ← W"""
    form = _checkpoint_table if isinstance(weights, TensorTable) else _checkpoint_lists
    form(weights, *args, **kwargs)


@overload
def delta_(table: TensorTable) -> None: ...
@overload
def delta_(
    weights: Sequence[Tensor], deltas: Sequence[Tensor], best: Sequence[Tensor], *, impl: str = "auto"
) -> None: ...
def delta_(weights, *args, **kwargs):
    """Δ ← W − best ; best ← W"""
    form = _delta_table if isinstance(weights, TensorTable) else _delta_lists
    form(weights, *args, **kwargs)


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
    form = _step_table if isinstance(weights, TensorTable) else _step_lists
    form(weights, *args, **kwargs)


def delta_absmax(table: TensorTable) -> float:
    """max |Δ| over all tensors; NaN if any element is NaN, 0.0 for an empty table"""
    if table.impl == "cpp":
        return native.delta_absmax(table.plan)
    return reference.delta_absmax(table.deltas)
