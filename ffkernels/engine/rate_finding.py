"""A found learning rate: its record, and all the places that hold a learning rate and go with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from ffkernels.engine.weights import unwrap_optimizer
from ffkernels.ops.notices import announce_once

__all__ = [
    "PEAK",
    "STEADY",
    "Finding",
    "KeptRates",
    "base_rates",
    "decays",
    "every_scheduler",
    "rates",
    "scale_learning_rates",
    "set_rates",
]

# Parts of the best length of one update, which sees the curvature along one direction and is near the edge of
# what training bears: for a rate that stays, and for the peak of one that falls, which leaves the edge by
# itself. docs/learning-rate.md has what they were chosen by.
STEADY, PEAK = 0.7, 1.2
FALLING = (
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
    lr_scheduler.OneCycleLR,
    lr_scheduler.PolynomialLR,
)


@dataclass
class Finding:
    """The learning rate that one update should have had.

    Attributes:
        lr: the found base learning rate of the first param group (of those that had an lr above 0), for the
            schedulers that were given; without one, for a rate that stays as it is.
        tau: how much further than its own step the update was best taken: s* − 1, above −1.
        scale: what every base learning rate is to be multiplied by, ``lr / lr_before``. It is ``part`` times
            1 + τ, except where the step's own lr was not the base: in a warm-up, or after a restart.
        part: how much of the best length of the update ``lr`` is: 1.2 where a scheduler lets the rate fall,
            else 0.7; 1 where nothing was found.
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
    part: float = 1.0
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
    def peak(self) -> float:
        """The learning rate for a schedule that lets it fall towards 0: ``lr`` where such a one was given."""
        return self.lr * PEAK / self.part if self.part == STEADY else self.lr

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
        if isinstance(scheduler, lr_scheduler.CyclicLR):
            base = [max(rate, float(top)) for rate, top in zip(base, scheduler.max_lrs, strict=True)]
    return base


def decays(schedulers: Iterable[Any]) -> bool:
    """Whether one of the schedulers lets the learning rate fall, and not only in a few stairs or at plateaus.

    A function of the step (``LambdaLR``, all of transformers' schedules) is asked for steps far ahead.
    """
    for scheduler in schedulers:
        if isinstance(scheduler, lr_scheduler.LambdaLR):
            if any(_falls(function) for function in scheduler.lr_lambdas):
                return True
        elif isinstance(scheduler, lr_scheduler.LinearLR):
            if scheduler.end_factor < scheduler.start_factor:
                return True
        elif isinstance(scheduler, lr_scheduler.ExponentialLR):
            if scheduler.gamma < 1:
                return True
        elif isinstance(scheduler, FALLING):
            return True
    return False


def _falls(function: Callable[[int], float]) -> bool:
    """Whether it comes down to half of what it was. Of a decay to 0, a power of two sees the second half."""
    highest = 0.0
    for power in range(24):
        try:
            value = float(function(2**power))
        except Exception:  # a list of values that is at its end
            return False
        if 0 < highest and value <= highest / 2:
            return True
        highest = max(highest, value)
    return False


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
