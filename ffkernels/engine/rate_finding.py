"""A found learning rate: its record, and all the places that hold a learning rate and go with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR

from ffkernels.engine.weights import unwrap_optimizer
from ffkernels.ops.notices import announce_once

__all__ = ["Finding", "base_rates", "every_scheduler", "rates", "scale_learning_rates", "set_rates"]


@dataclass
class Finding:
    """The learning rate that one update should have had.

    Attributes:
        lr: the found base learning rate of the first param group (of those that had an lr above 0).
        tau: how much further than its own step the update was best taken: s* − 1, above −1.
        scale: what every base learning rate is to be multiplied by, ``lr / lr_before``. It is 1 + τ, except
            where the step's own lr was not the base: in a warm-up, or after a restart.
        lr_before: the base learning rate before, see ``base_rates``.
        curve: every validation ``(lr, loss)`` along the update, in the order of the search; lr = 0 is before
            it.
        evaluations: validation losses in all: those of the curve, and those that looked whether the steps
            before it did harm.
        restarts: how often the first steps made the loss really higher and were taken back and tried again,
            each time at a smaller learning rate.
        optimizer_step: the optimizer step whose update was searched, counted from 1.
        judged_by: "examples", or "mean" where there were no losses by example and every rise counted.
        stopped_because: why the search ended.
        seconds, flops: what the search cost: wall time, and FLOPs of validations and moves.
    """

    lr: float
    tau: float
    scale: float = 1.0
    lr_before: float = math.nan
    curve: list[tuple[float, float]] = field(default_factory=list)
    evaluations: int = 0
    restarts: int = 0
    optimizer_step: int = 0
    judged_by: str = "examples"
    stopped_because: str = ""
    seconds: float = 0.0
    flops: int = 0

    @property
    def loss_before(self) -> float:
        """The validation loss before the update."""
        return self.curve[0][1] if self.curve else math.nan

    @property
    def loss_after(self) -> float:
        """The lowest validation loss that was seen."""
        return min((loss for _, loss in self.curve), default=math.nan)

    def apply(self, optimizer: torch.optim.Optimizer, schedulers: Any = ()) -> None:
        """Multiply every learning rate by ``scale``, in the optimizer and in its schedulers: once."""
        optimizer = unwrap_optimizer(optimizer)
        if not schedulers and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            announce_once(
                "finding-without-scheduler",
                "this optimizer has a learning rate scheduler, which may overwrite what was found: "
                "finding.apply(optimizer, scheduler) sets it there, too",
            )
        scale_learning_rates(optimizer, schedulers, self.scale)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {**asdict(self), "curve": [[lr, loss] for lr, loss in self.curve]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Finding:
        """The inverse of ``to_dict``."""
        return cls(**{**values, "curve": [(float(lr), float(loss)) for lr, loss in values["curve"]]})


def base_rates(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any] = ()) -> list[float]:
    """The learning rate of each group that its schedule is built around: the highest that it comes to.

    Of most schedulers that is the group's ``initial_lr``; OneCycleLR and CyclicLR begin low and rise to a
    ``max_lr``. Without one it is ``lr``.
    """
    base = [
        float(group.get("max_lr") or group.get("initial_lr", group["lr"])) for group in optimizer.param_groups
    ]
    for scheduler in schedulers:
        if isinstance(scheduler, CyclicLR):
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
    schedulers = every_scheduler(schedulers, optimizer)
    scaled = set()  # groups share the one tensor that was given as lr to the optimizer
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):  # the last two are OneCycleLR's
            value = group.get(key)
            if isinstance(value, Tensor):
                if id(value) not in scaled:
                    value.mul_(factor)
                scaled.add(id(value))
            elif value is not None:
                group[key] = value * factor
    for scheduler in schedulers:
        # Of others, such as transformers' GreedyLR, ``max_lrs`` are limits.
        shape = ("max_lrs",) if isinstance(scheduler, CyclicLR) else ()
        for name in ("base_lrs", "_last_lr", *shape):
            values = vars(scheduler).get(name)
            if isinstance(values, list):
                setattr(scheduler, name, [value * factor for value in values])
