"""One checked layout of tensors, one implementation, one call: what stands behind every public weight move.

Plans of plain lists are kept by address. Any thread may call; a plan that two of them make at the same time
is made twice. `accept` and `k` that only the device knows are never read back: kernels take their address.
Where a kernel wants addresses and a host number is given, the number becomes a small constant on the
device, made once per plan and value.

The last part registers the moves as operators that torch.compile, export and opcheck know. Calling through
the dispatcher costs more than a small set takes to move, so eager code never comes there. The schemas say
which lists are written.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from ctypes import c_float as _float32
from functools import cache
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ffkernels.ops import reference
from ffkernels.ops.dispatch import choose
from ffkernels.ops.plan import DTYPES, GPU_CHUNK, Plan, make_plan, same_length
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


class Lists(NamedTuple):
    """Plain lists with the face of a table."""

    plan: Plan
    weights: Sequence[Tensor]
    deltas: Sequence[Tensor] | None
    best: Sequence[Tensor]
    names = None

    @property
    def delta_flats(self) -> Sequence[Tensor] | None:
        return self.deltas

    @property
    def best_flats(self) -> Sequence[Tensor]:
        return self.best

    def check_addresses(self) -> None:
        """Their plan was found by address."""


# Kernels get addresses from the plan and know of no tensors, so the autograd version counters of what they
# wrote are moved on here: views of one memory share a counter, so a table has those of its arenas moved on.


def checkpoint(on: TensorTable | Lists) -> None:
    on.check_addresses()
    if on.plan.impl == "torch":
        return reference.checkpoint_(on.weights, on.best)
    kernels(on.plan.impl).checkpoint_(on.plan)
    increment_version(on.best_flats)


def delta(on: TensorTable | Lists) -> None:
    on.check_addresses()
    if on.plan.impl == "torch":
        return reference.delta_(on.weights, on.deltas, on.best)
    kernels(on.plan.impl).delta_(on.plan)
    increment_version(on.delta_flats)
    increment_version(on.best_flats)


def step(on: TensorTable | Lists, accept: Scalar, k: Scalar) -> None:
    on.check_addresses()
    plan = on.plan
    accept, accept_there = _scalar(plan, "accept", accept)
    k, k_there = _scalar(plan, "k", k)
    by_device = accept_there or k_there
    if plan.impl == "triton" or (by_device and plan.impl == "torch"):
        accept, k = as_tensor(plan, accept, torch.int32), as_tensor(plan, k, torch.float32)
        accept_there = k_there = True
    if plan.impl == "torch":
        move = reference.step_by_device_ if by_device else reference.step_
        return move(on.weights, on.deltas, on.best, accept, k)
    kernels(plan.impl).step_(plan, accept, k)
    # What the device will decide is not known here: both may change.
    if accept_there or accept:
        increment_version(on.best_flats)
    if accept_there or k_there or k != 0 or not accept:
        increment_version(on.weights)


def checkpoint_lists(weights: Sequence[Tensor], best: Sequence[Tensor], *, impl: str = "auto") -> None:
    checkpoint(Lists(plan_for(weights, None, best, impl), weights, None, best))


def delta_lists(weights, deltas, best, *, impl: str = "auto") -> None:
    delta(Lists(plan_for(weights, deltas, best, impl), weights, deltas, best))


def step_lists(weights, deltas, best, accept: Scalar, k: Scalar, *, impl: str = "auto") -> None:
    step(Lists(plan_for(weights, deltas, best, impl), weights, deltas, best), accept, k)


Scalar = bool | int | float | Tensor

# More different k than a search takes in a run; a loop over random k must not fill the device.
_CONSTANTS_KEPT = 1024


def _scalar(plan: Plan, name: str, value: Scalar) -> tuple[bool | float | Tensor, bool]:
    """accept as a bool or int32 [1], k rounded to float32, which all compute with, or as float32 [1].

    What is not on the host stays unread, goes to the plan's device, and is said to be there; the C++ ops
    alone read it.
    """
    if not isinstance(value, Tensor):
        return (bool(value) if name == "accept" else _float32(float(value)).value), False
    allowed, dtype = ("a bool", torch.int32) if name == "accept" else ("a number", torch.float32)
    if value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give {allowed} or a tensor of one element")
    if value.device.type in ("cpu", "meta") or plan.impl == "cpp":
        return (bool(value) if name == "accept" else _float32(float(value)).value), False
    value = value.detach()
    if name == "accept" and value.dtype != dtype:
        value = value != 0
    return value.to(plan.device, dtype).reshape(1), True


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


def _operator(name: str, arguments: str, lists: Callable) -> torch.library.CustomOpDef:
    """The form for `lists` as an operator; its schema marks what it writes by (a!) or (b!)."""

    def move(*given) -> None:
        *given, impl = given if isinstance(given[-1], str) else (*given, "auto")
        lists(*given, impl=impl)

    schema, written = f'({arguments}, str impl="auto") -> ()', re.findall(r"!\)\[\] (\w+)", arguments)
    return torch.library.custom_op(f"ffkernels::{name}", move, mutates_args=written, schema=schema)


_DELTA = "Tensor[] weights, Tensor(a!)[] deltas, Tensor(b!)[] best"
_STEP = "Tensor(a!)[] weights, Tensor[] deltas, Tensor(b!)[] best, Tensor accept, Tensor k"
checkpoint_ = _operator("checkpoint_", "Tensor[] weights, Tensor(b!)[] best", checkpoint_lists)
delta_ = _operator("delta_", _DELTA, delta_lists)
step_ = _operator("step_", _STEP, step_lists)


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


@torch.no_grad()
def traced_step(weights, deltas, best, accept: Scalar, k: Scalar, impl: str = "auto") -> None:
    """The operator, with scalars as tensors beside the weights, where a compiled graph can keep them."""
    device = weights[0].device if len(weights) else "cpu"
    if not isinstance(accept, Tensor):
        accept = torch.full((1,), accept, dtype=torch.int32, device=device)
    if not isinstance(k, Tensor):
        k = torch.full((1,), k, dtype=torch.float32, device=device)
    step_(weights, deltas, best, accept, k, impl)
