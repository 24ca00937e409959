"""`accept` and `k` of a step: host numbers, or values that only the device knows.

A host number costs nothing to hand on. A value on the device must never be read back, since that would stop
the host until the device has caught up, and cannot happen at all while a CUDA graph is captured: kernels take
its address. Where a kernel wants addresses and a host number is given, the number becomes a small constant on
the device, made once per plan and value.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ffkernels.ops.table import Plan

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
