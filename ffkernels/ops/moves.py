"""One checked layout of tensors, one implementation, one call: what stands behind every public weight move.

Plans of plain lists are kept by address, so calling again with the same tensors does not check them again.
Any thread may call; a plan that two of them make at the same time is made twice.

`accept` and `k` are host numbers, which cost nothing to hand on, or values that only the device knows. Those
must never be read back, since that would stop the host until the device has caught up, and cannot happen at
all while a CUDA graph is captured: kernels take their address. Where a kernel wants addresses and a host
number is given, the number becomes a small constant on the device, made once per plan and value.

The last part registers the moves as operators that torch.compile, export and opcheck know. Calling through
the dispatcher costs more than a small set takes to move, so eager code never comes there. The schemas say
which lists are written.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ffkernels.ops import reference
from ffkernels.ops.dispatch import choose
from ffkernels.ops.plan import DTYPES, GPU_CHUNK, Plan, make_plan
from ffkernels.ops.table import TensorTable

_PLANS_KEPT = 16
_plans: OrderedDict[tuple, Plan] = OrderedDict()
# A CUDA graph holds addresses of the rows and constants of a plan, and nobody says when the graph is gone.
_captured: dict[tuple, Plan] = {}
_kept = Lock()  # around both

_MODULES = {"cpp": "native", "cuda": "native_cuda", "triton": "triton_ops"}


@cache
def kernels(impl: str) -> ModuleType:
    """The module of a compiled implementation; it is imported when a plan first needs it."""
    return import_module(f"ffkernels.ops.{_MODULES[impl]}")


def _fingerprint(tensors: Sequence[Tensor]) -> tuple:
    return tuple((t.data_ptr(), t.shape, t.dtype, t.device, t.stride(), t.is_neg()) for t in tensors)


def plan_for(
    weights: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
    best: Sequence[Tensor],
    impl: str,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Plan:
    """The checked layout of three lists. Addresses, shapes and dtypes decide: a plan found is valid."""
    for name, side in (("weights", weights), ("deltas", deltas), ("best", best)):
        if isinstance(side, Tensor):  # it would be taken for the list of its rows
            raise TypeError(f"{name} is a single tensor; pass a list of tensors, or a TensorTable alone")
    try:
        sides = (weights, deltas or (), best)
        key = (impl, dtypes, deltas is None, *(_fingerprint(side) for side in sides))
    except (AttributeError, RuntimeError, NotImplementedError):
        key = None  # something that is no plain tensor: make_plan says what
    with _kept:
        plan = _captured.get(key) or _plans.get(key)
        if plan is not None:
            if key in _plans:
                _plans.move_to_end(key)
            _note_use(plan, key)
            return plan
    chunk = GPU_CHUNK if impl == "triton" else None
    plan = make_plan(weights, deltas, best, chunk=chunk, dtypes=dtypes)
    plan.impl = choose(impl, plan.device)
    if key is not None:
        with _kept:
            _plans[key] = plan
            _note_use(plan, key)
            while len(_plans) > _PLANS_KEPT:
                _let_go(_plans.popitem(last=False)[1])
    return plan


def _note_use(plan: Plan, key: tuple) -> None:
    if plan.device.type == "cuda":
        plan.streams.add(torch.cuda.current_stream(plan.device))
        if torch.cuda.is_current_stream_capturing():
            _captured[key] = plan


def _let_go(plan: Plan) -> None:
    """Keep the memory that a plan holds until every stream that was handed it is done."""
    rows = (group.rows for group in plan.groups)
    shared = () if plan.gradients is None else plan.gradients.tensors()
    for tensor in (*rows, *plan.constants.values(), *shared):
        for stream in plan.streams:
            tensor.record_stream(stream)


# Kernels get addresses from the plan. The tensors beside it are those whose autograd version counters they
# move on: views of one memory share a counter, so a table hands over its arenas, not the views into them.


def checkpoint(plan: Plan, weights, best, best_written) -> None:
    if plan.impl == "torch":
        reference.checkpoint_(weights, best)
    else:
        kernels(plan.impl).checkpoint_(plan, best_written)


def delta(plan: Plan, weights, deltas, best, deltas_written, best_written) -> None:
    if plan.impl == "torch":
        reference.delta_(weights, deltas, best)
    else:
        kernels(plan.impl).delta_(plan, deltas_written, best_written)


def step(plan: Plan, weights, deltas, best, best_written, accept: Scalar, k: Scalar) -> None:
    if plan.impl == "cuda":
        accept, k = accept_argument(plan, accept), k_argument(plan, k)
    elif plan.impl == "triton" or (plan.impl == "torch" and (on_device(accept) or on_device(k))):
        accept = as_tensor(plan, accept_argument(plan, accept), torch.int32)
        k = as_tensor(plan, k_argument(plan, k), torch.float32)
    else:
        accept, k = host_accept(accept), host_k(k)
    if plan.impl != "torch":
        kernels(plan.impl).step_(plan, weights, best_written, accept, k)
    elif isinstance(accept, Tensor):
        reference.step_by_device_(weights, deltas, best, accept, k)
    else:
        reference.step_(weights, deltas, best, accept, k)


def checkpoint_lists(weights: Sequence[Tensor], best: Sequence[Tensor], *, impl: str = "auto") -> None:
    checkpoint(plan_for(weights, None, best, impl), weights, best, best)


def delta_lists(weights, deltas, best, *, impl: str = "auto") -> None:
    delta(plan_for(weights, deltas, best, impl), weights, deltas, best, deltas, best)


def step_lists(weights, deltas, best, accept: Scalar, k: Scalar, *, impl: str = "auto") -> None:
    step(plan_for(weights, deltas, best, impl), weights, deltas, best, best, accept, k)


def checkpoint_table(table: TensorTable) -> None:
    table.check_addresses()
    checkpoint(table.plan, table.weights, table.best, table.best_flats)


def delta_table(table: TensorTable) -> None:
    table.check_addresses()
    flats = (table.delta_flats, table.best_flats)
    delta(table.plan, table.weights, table.deltas, table.best, *flats)


def step_table(table: TensorTable, accept: Scalar, k: Scalar) -> None:
    table.check_addresses()
    step(table.plan, table.weights, table.deltas, table.best, table.best_flats, accept, k)


def delta_absmax(table: TensorTable) -> float:
    """max |Δ|; the flat arenas stand for their tensors, since what lies between those is zero."""
    if table.impl == "cpp":
        return kernels("cpp").delta_absmax(table.plan)
    return reference.delta_absmax(table.delta_flats)


def delta_absmax_on_device(table: TensorTable) -> Tensor:
    """The same, left where the weights are: a float32 scalar that nobody has waited for."""
    return reference.delta_absmax_on_device(table.delta_flats, table.plan.device)


Scalar = bool | int | float | Tensor

# More different k than a search takes in a run; a loop over random k must not fill the device.
_CONSTANTS_KEPT = 1024


def _one(name: str, allowed: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give {allowed} or a tensor of one element")
    return value


def host_accept(value: Scalar) -> bool:
    return bool(_one("accept", "a bool", value))


def host_k(value: Scalar) -> float:
    """k rounded to float32, which is what every implementation computes with."""
    return ctypes.c_float(float(_one("k", "a number", value))).value


def on_device(value: Scalar) -> bool:
    """Whether reading this value would stop the host."""
    return isinstance(value, Tensor) and value.device.type not in ("cpu", "meta")


def accept_argument(plan: Plan, value: Scalar) -> bool | Tensor:
    """A bool, or int32 [1] on the plan's device."""
    if not on_device(value):
        return host_accept(value)
    value = _one("accept", "a bool", value).detach()
    if value.dtype != torch.int32:
        value = (value != 0).to(torch.int32)
    return value.to(plan.device).reshape(1)


def k_argument(plan: Plan, value: Scalar) -> float | Tensor:
    """A float32 value, or float32 [1] on the plan's device."""
    if not on_device(value):
        return host_k(value)
    return _one("k", "a number", value).detach().to(plan.device, torch.float32).reshape(1)


def as_tensor(plan: Plan, value: bool | float | Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as one element on the plan's device; a host number without any wait for the device."""
    if isinstance(value, Tensor):
        return value
    # 0.0 == -0.0 and both copy base; nan != nan would add an entry each time, hence repr.
    key = (dtype, repr(value))
    found = plan.constants.get(key)
    if found is None:
        found = torch.full((1,), value, dtype=dtype, device=plan.device)
        # What is made during a capture holds its value only after a replay, so it is not for anyone else.
        capturing = plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not capturing and len(plan.constants) < _CONSTANTS_KEPT:
            plan.constants[key] = found
    return found


_CHECKPOINT = '(Tensor[] weights, Tensor(b!)[] best, str impl="auto") -> ()'
_DELTA = '(Tensor[] weights, Tensor(a!)[] deltas, Tensor(b!)[] best, str impl="auto") -> ()'
_STEP = (
    "(Tensor(a!)[] weights, Tensor[] deltas, Tensor(b!)[] best, Tensor accept, Tensor k,"
    ' str impl="auto") -> ()'
)


@torch.library.custom_op("ffkernels::checkpoint_", mutates_args=("best",), schema=_CHECKPOINT)
def checkpoint_(weights: Sequence[Tensor], best: Sequence[Tensor], impl: str = "auto") -> None:
    checkpoint_lists(weights, best, impl=impl)


@torch.library.custom_op("ffkernels::delta_", mutates_args=("deltas", "best"), schema=_DELTA)
def delta_(
    weights: Sequence[Tensor], deltas: Sequence[Tensor], best: Sequence[Tensor], impl: str = "auto"
) -> None:
    delta_lists(weights, deltas, best, impl=impl)


@torch.library.custom_op("ffkernels::step_", mutates_args=("weights", "best"), schema=_STEP)
def step_(
    weights: Sequence[Tensor],
    deltas: Sequence[Tensor],
    best: Sequence[Tensor],
    accept: Tensor,
    k: Tensor,
    impl: str = "auto",
) -> None:
    step_lists(weights, deltas, best, accept, k, impl=impl)


@checkpoint_.register_fake
def _(weights, best, impl="auto") -> None:
    same_length(weights, best=best)


@delta_.register_fake
def _(weights, deltas, best, impl="auto") -> None:
    same_length(weights, deltas=deltas, best=best)


@step_.register_fake
def _(weights, deltas, best, accept, k, impl="auto") -> None:
    same_length(weights, deltas=deltas, best=best)
    for name, scalar in (("accept", accept), ("k", k)):
        if scalar.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(scalar.shape)}; give a tensor of one element")


def same_length(weights: Sequence[Tensor], **twins: Sequence[Tensor]) -> None:
    for label, tensors in twins.items():
        if len(tensors) != len(weights):
            raise ValueError(
                f"{label} has {len(tensors)} tensors for {len(weights)} weights; give one for each"
            )


def traced_scalar(
    value: bool | int | float | Tensor, dtype: torch.dtype, weights: Sequence[Tensor]
) -> Tensor:
    """A scalar of a traced call as a tensor beside the weights, where a compiled graph can keep it."""
    if isinstance(value, Tensor):
        return value
    return torch.full((1,), value, dtype=dtype, device=weights[0].device if len(weights) else "cpu")
