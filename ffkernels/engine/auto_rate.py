"""``learning_rate="auto"``: no learning rate to choose. The alignment c of each fresh gradient with the last
update (``alignment``) moves it, in every step and without a loss:

    attach   base rate of the largest group ← START; the rates that were given say the groups' ratios only
    rise     strong    rate ← u · rate                 u = UP at first
             weak      u ← √u
             over      u ← √u, rate ← rate / u; W ← W before the last step; the coming step changes nothing
             (none was strong yet: rate ← rate / UP)
             The rise is over when u < LEAST: after three that were not strong. Three strong ones in a row
             say that noise was mistaken for the edge: u ← min(u², UP) before the third one's jump.
    trim     rate ← rate · exp(−p / (1 + n / PACE))    n: trims so far
             p = GAIN · (c / σ + BELOW)                cut off at ±MOST; c until KNOWN differences give σ
             where the schedule falls                  c̄ in place of c, and p ≤ 0 unless c̄ > σ
             not finite                                the coming step changes nothing; from the second such
                                                       one in a row on rate ← rate / UP

c is over where it is above 0 or not finite (where the step before changed nothing, the coming one does not
either, and that is all), strong where it is below 0 and at most KEEP of its level, and weak otherwise. The
level follows all that is not over: level ← (level + c) / 2. Vanishing steps feel no curvature, and their c
stays at one level, up to noise, until the rate comes to the edge; there it falls to 0 within one jump. So a
jump is halved, in logarithms, wherever it led too far: the rise ends within the last of these bisections.

σ² is the mean of (c − its predecessor)² / 2, which a drift of c hardly enters, c̄ that of c: of all trims, and
beyond ten of them exponential means, SMOOTH · mean + (1 − SMOOTH) · new. In units of σ a trim means the same
in large models and small batches, where all of c is small. A rate at which c is 0 in the mean gains most with
the next step, and is too high for a run at it: steps bounce between the walls. So c is held at −BELOW · σ. A
schedule that falls takes the bouncing out by itself: a peak that looks a little too high is left to it, one
that c̄ calls too low is not, nor one that is beyond the edge, where c̄ is above σ.

Schedules keep their shape: they multiply the base rate. An update that was rounded away altogether (narrow
weights, rates far too small) has no c, and counts as strong; where c is not known otherwise nothing happens.

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

# Far below most tuned rates, so that no first step does harm; one that does is undone.
START = 1e-5
# Seven steps for four decades.
UP, LEAST = 4.0, 1.2
# Of the level: half of it is gone where a step goes half of the way to the bottom.
KEEP = 0.5
# Strong ones in a row: √UP once leads back to what was too far.
AGAIN = 3
# From how many differences on σ is known.
KNOWN = 4
GAIN, BELOW, MOST = 0.05, 0.5, 0.35
# Trims after which they weaken as 1/n: adapting goes on in log-time, and no schedule that falls need end it.
PACE = 40
# About ten steps: an oscillation of period two is gone from the mean, a drift is not.
SMOOTH = 0.9
# Of a rate that a tensor of float32 holds: no schedule has fallen.
ROUNDED = 2.5e-7
# Skipped steps in a row, after which it is not the loss scale that is too high but the rate.
SKIPS = 4
# Of the largest group's base rate: what leads beyond is no training, such as a loss that does not see
# the weights.
LOWEST, HIGHEST = 1e-9, 1e3
# What a state has, and where it is kept here.
_OWN = ("given", "jump", "level", "row", "mean", "noise", "c", "shape", "moved", "skips")
_KEPT = {"rate": "rate", "rising": "rising", "trims": "trims", **{name: f"_{name}" for name in _OWN}}


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
        self._jump, self._row = UP, 0  # u, and strong ones in a row
        self._level = 0.0  # of c in the rise
        self._mean, self._noise, self._c = 0.0, 0.0, 0.0  # c̄, σ² (0 is not known yet) and c of the last trim
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
        self.release()  # after a step that raised
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

    def before_alignment(self, table: ops.TensorTable, closure: str, paired: bool) -> None:
        """Before c is taken and best ← W: look whether lr means anything, and keep W before the last step.

        That is kept in Δ, which is free between stages. ``paired``: best holds it.

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
        self._kept &= paired
        if self.rising and self._moved and paired:  # a skipped step has not left what the one before it did
            torch._foreach_copy_(table.deltas, table.best)  # the arenas as wholes may begin elsewhere
            self._kept = True

    def before_update(self, table: ops.TensorTable, alignment: Alignment) -> bool:
        """Take the steps' c and move the rate by it; whether a stage may follow this step."""
        rose, taken = self.rising, True
        shape = max(self._rates.now) / self.rate
        falls, self._shape = shape < self._shape * (1 - ROUNDED), shape
        with interrupt_later():
            for sums in alignment.take():
                taken &= self._hear(sums, table, falls)
            if not taken:
                self._hold()
        if rose and not self.rising:
            alignment.begin_interval()  # what vanishing steps had says nothing about a stage
        return taken and not rose

    def _hear(self, sums: Sequence[float], table: ops.TensorTable, falls: bool) -> bool:
        """Move by one c. False where the coming step shall change nothing."""
        if not all(map(math.isfinite, sums)):
            # A GradScaler gives fused optimizers also gradients that it found to be infinite; they skip.
            self._skips += 1
            if getattr(self._optimizer, "found_inf", None) is None:
                return self._without(table)
            undoes = self._skips == SKIPS and (self._kept or not self.rising)
            return not undoes or self._back(table)
        self._skips = 0
        c = cosine(*sums)
        if c is None:
            if self.rising and self._moved and sums[1] > 0:
                self._climb()
        elif not self.rising:
            self._trim(c, falls)
        elif c > 0:
            return self._back(table)
        else:
            strong = c < 0 and c <= KEEP * self._level
            self._level = (self._level + c) / 2 if self._level else c
            self._climb() if strong else self._halve()
        return True

    def _without(self, table: ops.TensorTable) -> bool:
        """A gradient that is not finite: leave the step out, and undo what may have led to it."""
        if self._skips == SKIPS:
            announce_once(
                "auto-rate-not-finite",
                f"learning_rate='auto' has left out {SKIPS} steps in a row, whose gradients are not finite: "
                "is the loss, and is the optimizer's state? The mean loss of a batch without labels is not",
            )
        # One alone may be the batch's; where nothing has moved since an undo, it says nothing of the rate.
        if self._moved if self.rising else self._skips > 1:
            self._back(table)
        return False

    def _climb(self) -> None:
        self._row += 1
        if self._row >= AGAIN and self._jump < UP:
            self._jump, self._row = min(self._jump**2, UP), 0
        self._multiply(self._jump)

    def _halve(self) -> None:
        self._jump, self._row = math.sqrt(self._jump), 0
        self.rising = self._jump >= LEAST
        self._kept &= self.rising

    def _trim(self, c: float, falls: bool) -> None:
        n = self.trims
        self._mean += max(1 - SMOOTH, 1 / (n + 1)) * (c - self._mean)
        if n:
            self._noise += max(1 - SMOOTH, 1 / n) * ((c - self._c) ** 2 / 2 - self._noise)
        self._c = c
        sigma, pull = math.sqrt(self._noise), self._mean if falls else c
        if n >= KNOWN and sigma > 0:
            pull = GAIN * (pull / sigma + BELOW)
        if falls and not (n >= KNOWN and self._mean > sigma):
            pull = min(pull, 0.0)
        self._multiply(math.exp(-min(max(pull, -MOST), MOST) / (1.0 + n / PACE)))
        self.trims += 1

    @torch.no_grad()
    def _back(self, table: ops.TensorTable) -> bool:
        factor = UP
        if self.rising:
            if self._kept:
                torch._foreach_copy_(table.weights, table.deltas)
                torch._foreach_copy_(table.best, table.deltas)
            if self._level:
                self._halve()
                factor = self._jump
        self._multiply(1.0 / factor)
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

    def release(self) -> None:
        """Give back what was held for a step, also for one that raised, where nobody has written it since."""
        held, self._held = self._held, None
        if held is None:
            return
        now = self._rates.now
        self._rates.set([rate or lr for rate, lr in zip(now, held[0], strict=False)])  # groups may be new
        for group, rate, decay in zip(self._optimizer.param_groups, now, held[1], strict=False):
            if not rate and decay is not None:
                group["weight_decay"] = decay

    def after_step(self) -> None:
        held = self._held is not None
        self.release()
        if self.rising:
            self._expected = self._rates.now
            found_inf = getattr(self._optimizer, "found_inf", None)
            skipped = held or (found_inf is not None and bool(found_inf))
            self._moved = any(self._expected) and not skipped

    def _gradients(self) -> list[torch.Tensor]:
        groups = self._optimizer.param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the learning rates themselves are in the optimizer's and the schedulers' states."""
        kept = {name: getattr(self, attribute) for name, attribute in _KEPT.items()}
        return {"auto_rate": {**kept, "rates": self._rates.now}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, whether the optimizer's state was loaded before this was made, since then, or will be."""
        self.release()
        self._kept = False
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
