"""The places that hold a learning rate, of an optimizer and its schedulers: read, multiplied, put back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from ffkernels.ops.notices import announce_once


class ScheduledRates:
    """The learning rates of an optimizer's groups, and what its schedulers make them of.

    Args:
        schedulers: one or several, wrapped or not.

    Attributes:
        schedulers: those, out of their wrappers, and those inside SequentialLR and ChainedScheduler.

    Raises:
        TypeError: for what is not a scheduler.
        ValueError: for one of another optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedulers: Any = None) -> None:
        self._optimizer = optimizer
        if not isinstance(schedulers, list | tuple):
            schedulers = [] if schedulers is None else [schedulers]
        self.schedulers = list({id(s): s for s in _unpacked(schedulers, optimizer)}.values())

    @property
    def base(self) -> list[float]:
        """The learning rate of each group that its schedule is built around: the highest that it comes to.

        Of most schedulers that is the group's ``initial_lr``; OneCycleLR and CyclicLR begin low and rise to a
        ``max_lr``. Without one it is ``lr``.
        """
        groups = self._optimizer.param_groups
        base = [float(group.get("max_lr") or group.get("initial_lr", group["lr"])) for group in groups]
        for scheduler in self.schedulers:
            if isinstance(scheduler, lr_scheduler.CyclicLR):
                base = [max(rate, float(top)) for rate, top in zip(base, scheduler.max_lrs, strict=True)]
        return base

    @property
    def now(self) -> list[float]:
        """The learning rate of each group."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def set(self, values: Iterable[float]) -> None:
        """Give the first groups these learning rates; those that are tensors keep their addresses."""
        for group, value in zip(self._optimizer.param_groups, values, strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def scale(self, factor: float) -> None:
        """Multiply all that says how large a step is; groups keep their ratios and schedules their shape.

        Absolute limits that a user wrote into a schedule stay: ``eta_min``, and ``min_lr`` and ``max_lr`` of
        those that react to losses.
        """
        scaled = set()  # groups share the one tensor that was given as lr to the optimizer
        for holder, key in self._places():
            value = holder[key]
            if isinstance(value, list):
                holder[key] = [one * factor for one in value]
            elif not isinstance(value, Tensor):
                holder[key] = value * factor
            elif id(value) not in scaled:
                value.mul_(factor)
                scaled.add(id(value))

    def keep(self) -> Callable[[], None]:
        """What puts back, bit for bit, all that ``scale`` changes from now on."""
        values = [(holder, key, copy.deepcopy(holder[key])) for holder, key in self._places()]

        def restore() -> None:
            for holder, key, value in values:
                if isinstance(holder.get(key), Tensor):
                    holder[key].copy_(torch.as_tensor(value))
                else:
                    holder[key] = value

        return restore

    def require_scheduler(self) -> None:
        """Refuse an optimizer that has a scheduler where none was given."""
        if not self.schedulers and hasattr(self._optimizer.step, "_wrapped_by_lr_sched"):
            raise RuntimeError(
                "this optimizer has a learning rate scheduler, which would overwrite what is found: pass it, "
                "as FastForward(..., scheduler=scheduler) or find_learning_rate(..., schedulers=scheduler)"
            )

    def _places(self) -> list[tuple[dict[str, Any], str]]:
        """Every (dict, key) under which a rate that goes with the others stands, or a list of them."""
        keys = ("lr", "initial_lr", "max_lr", "min_lr")  # the last two are OneCycleLR's
        groups = self._optimizer.param_groups
        places = [(group, key) for group in groups for key in keys if group.get(key) is not None]
        for scheduler in self.schedulers:
            # Of others, such as transformers' GreedyLR, ``max_lrs`` are limits.
            shape = ("max_lrs",) if isinstance(scheduler, lr_scheduler.CyclicLR) else ()
            values = vars(scheduler)
            names = ("base_lrs", "_last_lr", *shape)
            places += [(values, name) for name in names if isinstance(values.get(name), list)]
        return places


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


def tell_of_overwriting(expected: Sequence[float], now: Sequence[float], scale: float) -> None:
    """Say once where rates that were multiplied by ``scale`` have been set back to what they were."""
    factor = math.log(scale)
    # Only a way back counts: a warm-up goes on rising.
    pairs = [(a, b) for a, b in zip(expected, now, strict=True) if a > 0 and b > 0]
    back = max((math.copysign(1.0, factor) * math.log(a / b) for a, b in pairs), default=0.0)
    if abs(factor) > math.log(2) and back > 0.5 * abs(factor):
        announce_once(
            "learning-rate-overwritten",
            f"Fast Forward set the learning rate {expected[0]:g}, and something has set {now[0]:g} since: "
            f"multiply what you set by FastForward.lr_scale ({scale:g}), or pass the scheduler as "
            "FastForward(..., scheduler=scheduler)",
        )
