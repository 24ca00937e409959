"""``learning_rate="auto"``: no learning rate to choose. The alignment c of each fresh gradient with the last
update (``alignment``) moves it, in every step and without a loss:

    attach   base rate of the largest group ← START; the rates that were given say the groups' ratios only
    rise     c < 0 and c ≤ KEEP · strongest     rate ← UP · rate
             c > 0, or not finite               W ← W before the last step; rate ← rate / UP; the coming step
                                                changes nothing; the rise is over
             otherwise                          the rise is over
    trim     rate ← rate · exp(−c / (1 + n / PACE))     n: trims so far
             where the schedule falls                   min(0, c̄) in place of c, once c̄ has been 0 or above

``strongest`` is the most negative c so far: that of vanishing steps, which feel no curvature. Schedules
keep their shape: they multiply the base rate. An update that was rounded away altogether (narrow weights,
rates far too small) has no c, and counts as c = strongest; where c is not known otherwise nothing
happens. c̄ = SMOOTH · c̄ + (1 − SMOOTH) · c is the mean of late. A schedule that falls takes the noise
out of the steps by itself: a peak that the noise of today calls too high is left to it, one that c̄ calls
too low is not.

In the step that changes nothing all gradients are zeroed in place, so that the one that the overshot weights
gave does not enter the optimizer's state, and learning rate and weight decay are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ffkernels import ops
from ffkernels.engine.alignment import Alignment, cosine
from ffkernels.engine.optimizer_probe import require_step_sizes, why_rate_means_nothing
from ffkernels.engine.scheduled_rates import ScheduledRates, tell_of_overwriting
from ffkernels.ops.notices import announce_once
from ffkernels.ranks.interrupts import interrupt_later

__all__ = ["AutoRate"]

# Three decades below any tuned rate that was seen, so that no first step does harm.
START = 1e-6
# Ten steps for six decades; a step too far is undone.
UP = 4.0
# Of the strongest alignment: below it curvature is felt, and another ×UP would pass the edge.
KEEP = 0.6
# Trims after which they weaken as 1/n: adapting goes on in log-time, and no schedule that falls need end it.
PACE = 20
# About ten steps: an oscillation of period two is gone from the mean, a drift is not.
SMOOTH = 0.9
# Skipped steps in a row, after which it is not the loss scale that is too high but the rate.
SKIPS = 4
# Of the largest group's base rate: what leads beyond is no training, such as a loss that does not see
# the weights.
LOWEST, HIGHEST = 1e-9, 1e3
# What a state has, and where it is kept here.
_KEPT = {
    **{name: name for name in ("rate", "rising", "trims")},
    **{name: f"_{name}" for name in ("given", "mean", "settled", "shape", "moved")},
}


class AutoRate:
    """What FastForward asks and tells about the learning rate at each step.

    Args:
        optimizer: its rates are set to start when this is made.
        scheduler: its schedulers, whose base rates go with them.

    Attributes:
        rate: the base learning rate of the largest group.
        rising: whether the rise goes on; no stage runs while it does.
        trims: how many there have been.

    Raises:
        ValueError, TypeError: for an optimizer whose update does not scale with lr, one whose rates are all
            0, or a wrong scheduler.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
        require_step_sizes(optimizer)
        self._optimizer, self._rates = optimizer, ScheduledRates(optimizer, scheduler)
        self._probed, self._groups = False, len(optimizer.param_groups)
        self._held: tuple[list[float], list[Any]] | None = None  # lr and weight decay, in a step without
        self._begin()

    def _begin(self) -> None:
        self._given = max(self._rates.base)
        if not 0 < self._given < math.inf:
            raise ValueError(
                f"the largest base learning rate is {self._given:g}: 'auto' takes the ratios of the param "
                "groups from the optimizer's rates; give it any number above 0"
            )
        self._as_given, self._give_back = self._rates.now, self._rates.keep()
        self.rate, self.rising, self.trims = START, True, 0
        self._mean, self._settled = 0.0, False  # c̄, and whether it has been 0 or above
        self._shape = math.inf  # what the schedule multiplied the base rate by in the last step
        self._moved = False  # whether the last step had a learning rate and was not skipped
        self._kept = False  # whether Δ holds W before a step
        self._skips = 0  # steps in a row that were skipped
        self._rates.scale(START / self._given)
        self._expected: list[float] | None = self._rates.now  # until the next step

    @property
    def scale(self) -> float:
        """What learning rates have been multiplied by in all."""
        return self.rate / self._given

    def look_whether_it_was_overwritten(self) -> None:
        """While it rises, which is when all of it happens."""
        self._release()  # after a step that raised
        expected, self._expected = self._expected, None
        if len(self._optimizer.param_groups) > self._groups:
            return self._take_new_groups()
        # A schedule may do as much as the smaller scales in one step.
        if expected is not None and not 1 / 16 < self.scale < 16:
            tell_of_overwriting(expected, self._rates.now, self.scale)

    def _take_new_groups(self) -> None:
        """A group of ``add_param_group``: its rate is a ratio to those that the others came with."""
        groups = self._optimizer.param_groups
        shared = {id(group["lr"]) for group in groups[: self._groups]}
        for group in groups[self._groups :]:
            if not isinstance(group["lr"], torch.Tensor) or id(group["lr"]) not in shared:
                group["lr"] = group["lr"] * self.scale
        self._groups = len(groups)

    def before_alignment(self, table: ops.TensorTable, closure: str) -> None:
        """Before c is taken and best ← W: look whether lr means anything, and keep W before the last step.

        That is kept in Δ, which is free between stages.

        Raises:
            ValueError: for a closure, and where the update does not scale with the learning rate.
            RuntimeError: for a scheduler that was not given.
        """
        if closure:
            raise ValueError(
                f"learning_rate='auto' needs the gradients before {closure}.step(), which is called with a "
                "closure that computes them inside: call backward() first and step() without, or choose "
                "learning_rate='keep'"
            )
        self._rates.require_scheduler()
        if not self._probed and self._gradients() and any(self._rates.now):
            if refused := why_rate_means_nothing(self._optimizer, table.weights):
                raise ValueError(f"learning_rate='auto': {refused}")
            self._probed = True
        if self.rising and self._moved:  # a step that was skipped has not left what the one before it did
            torch._foreach_copy_(table.deltas, table.best)  # the arenas as wholes may begin elsewhere
            self._kept = True

    def before_update(self, table: ops.TensorTable, alignment: Alignment) -> bool:
        """Take the steps' c and move the rate by it; whether a stage may follow this step."""
        rose, taken = self.rising, True
        shape = max(self._rates.now) / self.rate
        falls, self._shape = shape < self._shape * (1 - 1e-9), shape
        with interrupt_later():
            for sums in alignment.take():
                taken &= self._hear(sums, alignment.strongest, table, falls)
            if not taken:
                self._hold()
        if rose and not self.rising:
            alignment.begin_interval()  # what vanishing steps had says nothing about a stage
        return taken and not rose

    def _hear(self, sums: Sequence[float], strongest: float, table: ops.TensorTable, falls: bool) -> bool:
        """Move by one c. False where the coming step shall change nothing."""
        if not all(map(math.isfinite, sums)):
            # A GradScaler gives fused optimizers also gradients that it found to be infinite; they skip.
            if getattr(self._optimizer, "found_inf", None) is None:
                return self._back(table)
            self._skips += 1
            return not (self._kept and self._skips == SKIPS) or self._back(table)
        self._skips = 0
        c = cosine(*sums)
        if c is None:
            if self.rising and self._moved and sums[1] > 0:
                self._multiply(UP)
        elif not self.rising:
            self._mean = SMOOTH * self._mean + (1 - SMOOTH) * c if self.trims else c
            self._settled |= self._mean >= 0.0
            pull = min(0.0, self._mean) if falls and self._settled else c
            self._multiply(math.exp(-pull / (1.0 + self.trims / PACE)))
            self.trims += 1
        elif c < 0 and c <= KEEP * strongest:
            self._multiply(UP)
        elif c > 0:
            return self._back(table)
        else:
            self.rising = False
        return True

    @torch.no_grad()
    def _back(self, table: ops.TensorTable) -> bool:
        if self.rising and self._kept:
            torch._foreach_copy_(table.weights, table.deltas)
            torch._foreach_copy_(table.best, table.deltas)
        self.rising = False
        self._multiply(1.0 / UP)
        return False

    def _multiply(self, factor: float) -> None:
        rate = min(max(self.rate * factor, LOWEST), HIGHEST)
        if rate in (LOWEST, HIGHEST):
            announce_once(
                "auto-rate-bound",
                f"learning_rate='auto' has come to {rate:g}, its bound, and stays within [{LOWEST:g}, "
                f"{HIGHEST:g}]: do gradients reach the weights, are they of this loss, and is it finite? "
                "Otherwise choose a rate with learning_rate='keep'",
            )
        self._rates.scale(rate / self.rate)
        self.rate = rate

    @torch.no_grad()
    def _hold(self) -> None:
        for gradient in self._gradients():
            gradient.zero_()
        groups = self._optimizer.param_groups
        self._held = self._rates.now, [group.get("weight_decay") for group in groups]
        self._rates.set([0.0] * len(groups))
        for group in groups:
            if group.get("weight_decay") is not None:
                group["weight_decay"] = 0.0

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        rates, decays = held
        self._rates.set(rates)
        for group, decay in zip(self._optimizer.param_groups, decays, strict=True):
            if decay is not None:
                group["weight_decay"] = decay

    def after_step(self) -> None:
        """Give the rates back that were held for the step."""
        self._release()
        if self.rising:
            self._expected = self._rates.now
            found_inf = getattr(self._optimizer, "found_inf", None)
            self._moved = any(self._expected) and not (found_inf is not None and bool(found_inf))

    def _gradients(self) -> list[torch.Tensor]:
        groups = self._optimizer.param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the learning rates themselves are in the optimizer's and the schedulers' states."""
        kept = {name: getattr(self, attribute) for name, attribute in _KEPT.items()}
        return {"auto_rate": {**kept, "rates": self._rates.now}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, whether the optimizer's state was loaded before this was made, since then, or will be."""
        saved, self._groups = state.get("auto_rate"), len(self._optimizer.param_groups)
        if saved is None:  # of a run with a rate of its own
            if not math.isclose(max(self._rates.base), START):
                self._begin()
            return
        if self._rates.now != saved["rates"] == self._as_given:
            self._give_back()  # they were there already, and have been set to start
        for name, attribute in _KEPT.items():
            setattr(self, attribute, type(getattr(self, attribute))(saved[name]))
        self._expected = None
