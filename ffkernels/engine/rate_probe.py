"""Around the optimizer's steps: let it take a few, then search how long the last one should have been.

    W(s) = W_before + s·Δ          Δ the update of the last step, taken at the learning rate lr
    s*                             where the validation loss is lowest (``rate_search``)
    found                          1.2·s*·lr where a schedule lets the learning rate fall, 0.7·s*·lr where
                                   it stays; for the base rate: schedules keep their shape around it

The direction of an early update hardly depends on the learning rate, so neither does the distance to the
lowest loss along it: that distance, in units of the step, is what the learning rate should have been.

It does depend on it where the steps before did harm. So the loss before the first step and the one before the
last are compared: where it is really higher (``significance``), all is taken back and begins again at 1/32 of
the learning rate.
"""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any, NamedTuple

import torch

from ffkernels import ops
from ffkernels.engine.executors import UPDATE_NOT_FINITE
from ffkernels.engine.interrupts import interrupt_later
from ffkernels.engine.optimizer_probe import tell_about_momentum, why_rate_means_nothing
from ffkernels.engine.rate_finding import (
    PEAK,
    STEADY,
    Finding,
    base_rates,
    decays,
    rates,
    scale_learning_rates,
    set_rates,
)
from ffkernels.engine.rate_search import RateSearch
from ffkernels.engine.run_state import OptimizerSnapshot
from ffkernels.engine.significance import LEAST_EXAMPLES, really_higher
from ffkernels.engine.validation import ValidationLoss
from ffkernels.engine.validation_examples import read_together
from ffkernels.ops.notices import announce_once

__all__ = ["RateProbe"]

RESTART_AT = 1 / 32
MAX_RESTARTS = 4


class Measured(NamedTuple):
    """A validation loss, and the sums by example that it is the mean of, where there are some."""

    loss: float
    sums: list[float] | None


class RateProbe:
    """Told of every step of an optimizer, before and after it; the finding comes after the step ``after``.

    Steps at a learning rate of 0, as warm-ups begin with, do not count, nor do those that change nothing, as
    when loss scaling skips them.

    Args:
        validation: the loss; with losses by example noise is told from signal.
        optimizer, schedulers: whose learning rates are made smaller at a restart.
        after: optimizer steps, of which the last one's update is searched.

    Attributes:
        steps: steps that counted, since the last restart.
        applied: what the learning rates have been multiplied by so far.
    """

    def __init__(
        self, validation: ValidationLoss, optimizer: torch.optim.Optimizer, schedulers: list[Any], after: int
    ) -> None:
        self.validation, self.optimizer, self.schedulers = validation, optimizer, schedulers
        self.after = after
        self.steps = self.restarts = 0
        self.applied = 1.0
        self._bases = base_rates(optimizer, schedulers)
        self._velocity = bool(optimizer.state)  # has had steps to build up
        self._rates: list[float] = []  # of the step under way; empty where it does not count
        self._first: OptimizerSnapshot | None = None  # before the first step
        self._start: Measured | None = None  # before the first step
        self._here: Measured | None = None  # before the last step, while the buffers were these:
        self._buffers: list[tuple[int, int]] = []
        self._looks = 0  # validations that are not part of the search
        self._moves = 0
        self._prepared = False
        self._tokens: list[float] | None = None
        self._seconds = 0.0

    def before_step(self, table: ops.TensorTable) -> None:
        """Right before a step, when its gradients are there.

        Raises:
            ValueError: when the update does not scale with the learning rate, or the loss is not finite.
        """
        begin = perf_counter()
        now = rates(self.optimizer)
        self._rates = now if any(now) else []
        if not self._rates:
            return
        if self.steps == 0 and self.after > 1:
            self._first = OptimizerSnapshot(self.optimizer)
            if self._start is None:
                self._start = self._measure()
                self._looks += 1
                if not math.isfinite(self._start.loss):
                    raise ValueError(
                        f"the validation loss is {self._start.loss} before the first step, so no learning "
                        "rate can be found by it: look at the validation examples and the model's dtype"
                    )
        if self.steps + 1 == self.after:
            refused = why_rate_means_nothing(self.optimizer, table.weights)
            if refused:
                raise ValueError(refused)
        ops.checkpoint_(table)
        self._seconds += perf_counter() - begin

    def after_step(self, table: ops.TensorTable, step: int) -> Finding | None:
        """Right after a step; the finding, when it was the one to be searched, else None.

        The weights stay at the multiple that was found. Learning rates are not touched by a finding.

        Raises:
            ValueError: when the update is not finite, or when the steps do harm at any rate.
        """
        if not self._rates:
            return None
        begin = perf_counter()
        ops.delta_(table)
        largest = ops.delta_absmax(table)
        if largest == 0.0:
            return None
        self.steps += 1
        finding = None
        if self.steps == self.after:
            if not math.isfinite(largest):
                raise ValueError(f"{UPDATE_NOT_FINITE}, so there is nothing to search along")
            finding = self._find(table, step)
        elif self.steps == self.after - 1:
            self._look_for_harm()
        self._seconds += perf_counter() - begin
        if finding is not None:
            finding.seconds = self._seconds
        return finding

    def state_dict(self) -> dict[str, Any]:
        """Plain values. What a restart would go back to is not among them: a resumed probe has none."""
        return {
            "steps": self.steps,
            "restarts": self.restarts,
            "applied": self.applied,
            "bases": self._bases,
            "looks": self._looks,
            "tokens": self._tokens,
            "start": self._start and list(self._start),
            "here": self._here and list(self._here),
            "velocity": self._velocity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.restarts, self.applied = state["steps"], state["restarts"], state["applied"]
        self._bases, self._looks = state["bases"], state["looks"]
        self._velocity = state["velocity"]
        self._prepare()
        if state["tokens"] == self._tokens:  # else they are losses of other examples
            self._start, self._here = (
                Measured(*state[name]) if state[name] is not None else None for name in ("start", "here")
            )
            self._buffers = self._versions()

    def _prepare(self) -> None:
        """Find out once whether there are losses by example, and enough of them; say so where not."""
        if self._prepared:
            return
        self._prepared = True
        tokens = self.validation.example_counts
        if tokens is None:
            why = f"it runs on its {self.validation.path} path ({self.validation.reason})"
        else:
            count = sum(n > 0 for n in tokens)
            if count >= LEAST_EXAMPLES:
                self._tokens = list(map(float, tokens))
                return
            why = f"{count} validation examples are too few, about 32 are good"
        announce_once(
            "find-learning-rate-mean",
            "the learning rate is found by the mean validation loss alone, which cannot tell a rise "
            f"from rounding noise: {why}. Batches of a causal language model give losses by example",
        )

    def _measure(self) -> Measured:
        self._prepare()
        loss, sums = read_together(*self.validation.measure())
        return Measured(loss, None if self._tokens is None else sums)

    def _move(self, table: ops.TensorTable, scale: float) -> None:
        with interrupt_later():
            ops.step_(table, False, scale - 1.0)
        self._moves += 1

    def _measure_at(self, table: ops.TensorTable, scale: float) -> Measured:
        self._move(table, scale)
        return self._measure()

    def _versions(self) -> list[tuple[int, int]]:
        """Changes when a buffer of the model is written or replaced."""
        buffers = self.validation.model.buffers()
        return [(id(b), 0 if b.is_inference() else b._version) for b in buffers]

    def _look_for_harm(self) -> None:
        self._here = self._measure()
        self._buffers = self._versions()
        harmed = not math.isfinite(self._here.loss)
        # By the mean alone, noise would be taken for harm.
        if self._start is not None and self._start.sums is not None and self._here.loss > self._start.loss:
            harmed = really_higher(self._start.sums, self._here.sums, self._tokens, seen=1)
        first, self._first = self._first, None
        if not harmed or first is None:
            return
        if self.restarts == MAX_RESTARTS:
            raise ValueError(
                f"the first steps raise the validation loss at lr={self._bases[0] * self.applied:g} still, "
                f"after {MAX_RESTARTS} restarts from lr={self._bases[0]:g} down: are training and validation "
                "batches of one kind?"
            )
        with interrupt_later():
            scheduled = rates(self.optimizer)
            first.restore()
            # A schedule has gone on meanwhile: its learning rate of now stays, made smaller.
            set_rates(self.optimizer, scheduled)
            scale_learning_rates(self.optimizer, self.schedulers, RESTART_AT)
            self.applied *= RESTART_AT
            self.steps, self.restarts, self._here = 0, self.restarts + 1, None
            self._looks += 1

    def _find(self, table: ops.TensorTable, step: int) -> Finding:
        # A group that its schedule holds at 0 says nothing.
        base, lr = next(((b, r) for b, r in zip(self._bases, self._rates, strict=True) if b and r), (0, 0))
        if not base:
            raise ValueError(
                "the learning rate was 0 when the search for one was prepared; give the optimizer its base "
                "learning rate, or make its scheduler, before that"
            )
        if not self._velocity:
            tell_about_momentum(self.optimizer, self.after)
        forward = self.validation.flops  # before the search: it may run a forward, which may be interrupted
        search = self._search(table)
        places, reason = search.places, search.stopped_because or ""
        part = PEAK if decays(self.schedulers) else STEADY
        scale = part * search.scale * lr / base
        if search.best.scale == 0:
            part, scale = 1.0, self.applied
            announce_once(
                "no-learning-rate-found",
                f"no learning rate was found: {reason} (of lr={lr:g}), and it is left there",
            )
        evaluations = len(places) + self._looks
        return Finding(
            lr=scale * base,
            tau=search.scale - 1.0,
            scale=scale,
            part=part,
            lr_before=base,
            curve=[(place.scale * lr, place.loss) for place in places],
            evaluations=evaluations,
            restarts=self.restarts,
            optimizer_step=step,
            judged_by="mean" if self._tokens is None else "examples",
            stopped_because=reason,
            flops=evaluations * forward + 2 * table.numel * self._moves,
        )

    def _search(self, table: ops.TensorTable) -> RateSearch:
        """Search the update in ``table``, Δ there and best = W after it, and move to what was found.

        The weights are bit-equal to those that were validated as the best; as the optimizer left them where
        no multiple is better than none, or when something raises.
        """
        here = self._here
        try:
            # The last step's forward may have written buffers, such as batch statistics, since.
            if here is None or self._buffers != self._versions():
                self._looks += here is not None
                here = self._measure_at(table, 0.0)
            search = RateSearch(self._tokens)
            search.observe(0.0, *here)
            while (scale := search.propose()) is not None:
                search.observe(scale, *self._measure_at(table, scale))
            self._move(table, search.scale)
        except BaseException:
            self._move(table, 1.0)
            raise
        return search
