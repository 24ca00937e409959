"""The places that hold a learning rate, of an optimizer and its schedulers: read, multiplied, put back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from ffkernels.ops.notices import announce_once

__all__ = [
    "KeptRates",
    "base_rates",
    "every_scheduler",
    "rates",
    "require_the_scheduler",
    "scale_learning_rates",
    "set_rates",
    "tell_of_overwriting",
]


def base_rates(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any] = ()) -> list[float]:
    """The learning rate of each group that its schedule is built around: the highest that it comes to.

    Of most schedulers that is the group's ``initial_lr``; OneCycleLR and CyclicLR begin low and rise to a
    ``max_lr``. Without one it is ``lr``.
    """
    base = [
        float(group.get("max_lr") or group.get("initial_lr", group["lr"])) for group in optimizer.param_groups
    ]
    for scheduler in schedulers:
        if isinstance(scheduler, lr_scheduler.CyclicLR):
            base = [max(rate, float(top)) for rate, top in zip(base, scheduler.max_lrs, strict=True)]
    return base


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rate of each group as it is now."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_rates(optimizer: torch.optim.Optimizer, values: Iterable[float]) -> None:
    """Give each group its learning rate; those that are tensors keep their addresses."""
    for group, value in zip(optimizer.param_groups, values, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def every_scheduler(schedulers: Any, optimizer: torch.optim.Optimizer) -> list[Any]:
    """One scheduler or several, out of their wrappers, and those inside SequentialLR and ChainedScheduler.

    Raises:
        TypeError: for what is not a scheduler.
        ValueError: for one of another optimizer.
    """
    if schedulers is None:
        return []
    if not isinstance(schedulers, list | tuple):
        schedulers = [schedulers]
    return list({id(s): s for s in _unpacked(schedulers, optimizer)}.values())


def _unpacked(schedulers: Iterable[Any], optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    for scheduler in schedulers:
        while getattr(scheduler, "scheduler", None) is not None:  # accelerate's wrapper
            scheduler = scheduler.scheduler
        if not (hasattr(scheduler, "optimizer") and hasattr(scheduler, "state_dict")):
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__}: one of torch.optim.lr_scheduler or several "
                "are allowed"
            )
        inner = scheduler.optimizer
        while inner is not optimizer and getattr(inner, "optimizer", None) is not None:
            inner = inner.optimizer
        if inner is not optimizer:
            raise ValueError(f"this {type(scheduler).__name__} schedules another optimizer's learning rate")
        yield scheduler
        yield from _unpacked(getattr(scheduler, "_schedulers", ()), optimizer)


def scale_learning_rates(optimizer: torch.optim.Optimizer, schedulers: Any, factor: float) -> None:
    """Multiply all that says how large a step is; groups keep their ratios and schedules their shape.

    Absolute limits that a user wrote into a schedule stay: ``eta_min``, and ``min_lr`` and ``max_lr`` of
    those that react to losses.
    """
    scaled = set()  # groups share the one tensor that was given as lr to the optimizer
    for holder, key in _places(optimizer, every_scheduler(schedulers, optimizer)):
        value = holder[key]
        if isinstance(value, list):
            holder[key] = [one * factor for one in value]
        elif not isinstance(value, Tensor):
            holder[key] = value * factor
        elif id(value) not in scaled:
            value.mul_(factor)
            scaled.add(id(value))


class KeptRates:
    """What ``scale_learning_rates`` would change, as it is now; ``restore`` puts it back bit for bit.

    Attributes:
        rates: the learning rate of each group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedulers: Any) -> None:
        self.rates = rates(optimizer)
        places = _places(optimizer, every_scheduler(schedulers, optimizer))
        self._values = [(holder, key, copy.deepcopy(holder[key])) for holder, key in places]

    def restore(self) -> None:
        for holder, key, value in self._values:
            if isinstance(holder.get(key), Tensor):
                holder[key].copy_(torch.as_tensor(value))
            else:
                holder[key] = value


def _places(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any]) -> list[tuple[dict[str, Any], str]]:
    """Every (dict, key) under which a learning rate that goes with the others stands, or a list of them."""
    # The last two are OneCycleLR's.
    keys = ("lr", "initial_lr", "max_lr", "min_lr")
    places = [(group, key) for group in optimizer.param_groups for key in keys if group.get(key) is not None]
    for scheduler in schedulers:
        # Of others, such as transformers' GreedyLR, ``max_lrs`` are limits.
        shape = ("max_lrs",) if isinstance(scheduler, lr_scheduler.CyclicLR) else ()
        values = vars(scheduler)
        names = ("base_lrs", "_last_lr", *shape)
        places += [(values, name) for name in names if isinstance(values.get(name), list)]
    return places


def require_the_scheduler(optimizer: torch.optim.Optimizer, schedulers: Sequence[Any]) -> None:
    """Refuse an optimizer that has a scheduler where none was given."""
    if not schedulers and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise RuntimeError(
            "this optimizer has a learning rate scheduler, which would overwrite what is found: pass it, as "
            "FastForward(..., scheduler=scheduler) or find_learning_rate(..., schedulers=scheduler)"
        )


def tell_of_overwriting(expected: Sequence[float], now: Sequence[float], scale: float) -> None:
    """Say once where rates that were multiplied by ``scale`` have been set back to what they were."""
    factor = math.log(scale)
    # Only a way back counts: a warm-up goes on rising.
    back = _log_ratio(now, expected) if factor < 0 else _log_ratio(expected, now)
    if abs(factor) > math.log(2) and back > 0.5 * abs(factor):
        announce_once(
            "learning-rate-overwritten",
            f"Fast Forward set the learning rate {expected[0]:g}, and something has set {now[0]:g} since: "
            f"multiply what you set by FastForward.lr_scale ({scale:g}), or pass the scheduler as "
            "FastForward(..., scheduler=scheduler)",
        )


def _log_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    pairs = [(a, b) for a, b in zip(above, below, strict=True) if a > 0 and b > 0]
    return max((math.log(a / b) for a, b in pairs), default=0.0)
