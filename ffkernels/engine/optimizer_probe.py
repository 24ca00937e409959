"""Whether an optimizer's update is proportional to its learning rate, found by trying.

    Δ(2·lr) = 2·Δ(lr)        one step, the same gradients, the same state

Only then does it mean something for the learning rate whether an update was too short or too long. Adam,
AdamW, SGD with momentum and Lion pass. Optimizers that choose their step size themselves do not pass, or
change it later by what they see: those that keep an estimate of the distance in their groups (``d``: Prodigy,
D-Adaptation) are refused by it.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ffkernels.engine.run_state import OptimizerSnapshot
from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.ranks.optimizer_wrappers import needs_closure
from ffkernels.validation.restore import attributes, keep_random_state

_TOLERANCE = 0.02


def require_step_sizes(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what can be told without a step.

    Raises:
        ValueError: naming the optimizer and why a found learning rate would mean nothing to it.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS) or needs_closure(optimizer):
        raise ValueError(
            f"{name} evaluates the loss several times in a step and has a line search of its own; a learning "
            "rate can be found for optimizers of one gradient a step, such as torch.optim.AdamW"
        )
    if isinstance(optimizer, torch.optim.Rprop):
        raise ValueError(
            "Rprop's steps are as long as lr at the first only, and then of lengths of their own; a rate can "
            "be found for optimizers such as torch.optim.AdamW"
        )
    settings = {p for cls in type(optimizer).__mro__ for p in inspect.signature(cls.__init__).parameters}
    for index, group in enumerate(optimizer.param_groups):
        if "d" in group and "d" not in settings:  # Adafactor has a setting of this name
            raise ValueError(
                f"{name} estimates its step size itself (param_groups[{index}] has 'd'): lr is a factor on "
                "that, usually left at 1. Find a learning rate for an optimizer without, such as AdamW"
            )
        if not isinstance(group.get("lr"), float | int | Tensor):
            raise ValueError(
                f"{name} has lr={group.get('lr')!r} in param_groups[{index}], which is no number to move: "
                "give it one" + (" and relative_step=False" if group.get("relative_step") else "")
            )


@torch.no_grad()
def why_rate_means_nothing(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> str | None:
    """Try the coming step with lr and with 2·lr; why its update does not double, or None where it does.

    Gradients must be there. Weights, state, gradients and random generators are as before when it returns,
    and no hook of this optimizer hears of the steps. Where the weights' own rounding hides the update, it is
    believed.

    Memory: three copies of the weights, one of the gradients and one of the optimizer's state.
    """
    snapshot = OptimizerSnapshot(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Fused optimizers write unscaled gradients back.
    gradients = [(p.grad, p.grad.detach().clone()) for p in parameters if p.grad is not None]
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    no_hooks = [(optimizer, name, OrderedDict()) for name in hooks]

    def update(factor: float) -> list[Tensor]:
        try:
            with keep_random_state(weights[0].device), attributes(no_hooks):
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * factor  # not in place: groups may share a tensor
                type(optimizer).step(optimizer)
            after = [weight.detach().clone() for weight in weights]
        finally:
            with interrupt_later():
                snapshot.restore()
                for gradient, old in gradients:
                    gradient.copy_(old)
        return [new.sub_(weight) for new, weight in zip(after, weights, strict=True)]

    single, double = update(1.0), update(2.0)
    wrong = _norm(two.float() - 2 * one.float() for one, two in zip(single, double, strict=True))
    twice = 2 * _norm(single)
    rounding = _norm(torch.finfo(weight.dtype).eps * weight.float() for weight in weights)
    if not math.isfinite(wrong) or wrong <= _TOLERANCE * twice + 2 * rounding:
        return None
    ratio = 2 * _norm(double) / twice if twice else math.inf
    return (
        f"{type(optimizer).__name__}'s update does not scale with its learning rate: with twice the lr the "
        f"same step is {ratio:.3g} times as long, off twice the update by {wrong / (twice or wrong):.0%}: "
        "what steps do says nothing about lr. Adam, AdamW, SGD and Lion scale"
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
