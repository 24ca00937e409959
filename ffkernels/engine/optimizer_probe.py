"""Whether an optimizer's update is proportional to its learning rate, found by trying.

    Δ(2·lr) = 2·Δ(lr)        one step, the same gradients, the same state

What a line search along an update says about the learning rate is true only then. Adam, AdamW, SGD with
momentum and Lion pass. Optimizers that choose their step size themselves do not pass, or change it later by
what they see: those that keep an estimate of the distance in their groups (``d``: Prodigy, D-Adaptation) are
refused by it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ffkernels.engine.evaluation_mode import keep_random_state
from ffkernels.engine.interrupts import interrupt_later

__all__ = ["OptimizerState", "require_step_sizes", "step_without_hooks", "why_rate_means_nothing"]

_TOLERANCE = 0.02


def require_step_sizes(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what can be told without a step.

    Raises:
        ValueError: naming the optimizer and why a found learning rate would mean nothing to it.
    """
    name = type(optimizer).__name__
    step = inspect.signature(type(optimizer).step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (step and step.default is inspect.Parameter.empty):
        raise ValueError(
            f"{name} evaluates the loss several times in a step and has a line search of its own; a learning "
            "rate can be found for optimizers of one gradient a step, such as torch.optim.AdamW"
        )
    for index, group in enumerate(optimizer.param_groups):
        if "d" in group:
            raise ValueError(
                f"{name} estimates its step size itself (param_groups[{index}] has 'd'): lr is a factor on "
                "that, usually left at 1. Find a learning rate for an optimizer without, such as AdamW"
            )
        if not isinstance(group.get("lr"), float | int | Tensor):
            raise ValueError(
                f"{name} has lr={group.get('lr')!r} in param_groups[{index}]: it makes its own (Adafactor "
                "with relative_step=True); give it a number and switch that off"
            )


class OptimizerState:
    """A copy of an optimizer's state and of its groups' settings; ``restore`` puts them back where they were.

    Tensors that existed are written in place, so that who holds them (captured graphs, fused kernels) still
    does; what did not exist is removed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {
            key: {name: (value, _copy(value)) for name, value in entry.items()}
            if isinstance(entry, dict)
            else (entry, _copy(entry))
            for key, entry in optimizer.state.items()
        }
        self._groups = [
            {name: (value, _copy(value)) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    @torch.no_grad()
    def restore(self) -> None:
        state = self._optimizer.state
        for key in list(state):
            saved = self._state.get(key)
            if saved is None:
                del state[key]
            elif isinstance(saved, dict):
                _put_back(state[key], saved)
            else:
                state[key] = _restored(*saved)
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=True):
            _put_back(group, saved, keep=("params",))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _restored(original: Any, saved: Any) -> Any:
    return original.detach().copy_(saved) if isinstance(original, Tensor) else copy.deepcopy(saved)


def _put_back(values: dict, saved: dict, keep: tuple[str, ...] = ()) -> None:
    for name in list(values):
        if name not in saved and name not in keep:
            del values[name]
    for name, (original, value) in saved.items():
        if isinstance(original, Tensor):
            original.detach().copy_(value)
            values[name] = original
        else:
            values[name] = copy.deepcopy(value)


@contextmanager
def _no_hooks(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    kept = {name: getattr(optimizer, name) for name in names}
    vars(optimizer).update({name: OrderedDict() for name in names})
    try:
        yield
    finally:
        vars(optimizer).update(kept)


def step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """One step that nobody who listens to this optimizer hears of."""
    with _no_hooks(optimizer):
        type(optimizer).step(optimizer)


@torch.no_grad()
def why_rate_means_nothing(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> str | None:
    """Try the coming step with lr and with 2·lr; why its update does not double, or None where it does.

    Gradients must be there. Weights, state and random generators are as before when it returns. Where the
    weights' own rounding hides the update, it is believed.
    """
    before = [weight.detach().clone() for weight in weights]
    with keep_random_state(weights[0].device):
        single = _update(optimizer, weights, before, 1.0)
    with keep_random_state(weights[0].device):
        double = _update(optimizer, weights, before, 2.0)
    wrong = _norm([two.float() - 2 * one.float() for one, two in zip(single, double, strict=True)])
    twice = 2 * _norm([one.float() for one in single])
    rounding = _norm([torch.finfo(w.dtype).eps * w.float() for w in before])
    if not math.isfinite(wrong) or wrong <= _TOLERANCE * twice + 2 * rounding:
        return None
    ratio = 2 * _norm([two.float() for two in double]) / twice if twice else math.inf
    return (
        f"{type(optimizer).__name__}'s update does not scale with its learning rate: with twice the lr the "
        f"same step is {ratio:.3g} times as long, off twice the update by {wrong / (twice or wrong):.0%}: "
        "a line search along it says nothing about lr. Adam, AdamW, SGD and Lion scale"
    )


def _update(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], before: Sequence[Tensor], factor: float
) -> list[Tensor]:
    state = OptimizerState(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    everything = [(p, p.detach().clone()) for p in parameters]
    # Fused optimizers write unscaled gradients back.
    everything += [(p.grad, p.grad.detach().clone()) for p in parameters if p.grad is not None]
    try:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor  # not in place: groups may share a tensor
        step_without_hooks(optimizer)
        return [weight.detach() - old for weight, old in zip(weights, before, strict=True)]
    finally:
        with interrupt_later():
            for tensor, old in everything:
                tensor.detach().copy_(old)
            state.restore()


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
