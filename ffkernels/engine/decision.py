"""Whether a stage follows the coming optimizer step: the schedule, and what it asks for.

    before each step      c of gradient and last update ; best ← W                      (``alignment``)
    at an interval's end  the mean of c and the price of a validation: does it pay?     (``schedule``)

With a ``patience`` that looks at no alignment, best ← W is made at the end of intervals only, unless the
learning rate is moved by alignment (``auto_rate``).
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ffkernels import ops
from ffkernels.engine.alignment import Alignment
from ffkernels.engine.auto_rate import AutoRate
from ffkernels.engine.config import FastForwardConfig
from ffkernels.engine.price import SAME_GRADIENTS, StagePrice
from ffkernels.engine.schedule import FadedRate, StageSchedule
from ffkernels.engine.watch import StageWatch
from ffkernels.ops.notices import announce_once
from ffkernels.ranks.ranks import ALIGNMENT, Ranks
from ffkernels.search.search import Search
from ffkernels.stage.record import Stage
from ffkernels.stage.weights import MovedWeights, unwrap_optimizer
from ffkernels.validation.loss import ValidationLoss

# Ranks that move a learning rate compare it, and c, at the first step, at each step of the rise, and after it
# every so many steps.
COMPARED = 64


class StageDecision:
    """What FastForward asks before and after each optimizer step.

    Args:
        optimizer: as it was given, with its wrappers.
        sharded: whether each of ``ranks`` holds a part of every weight.

    Attributes:
        schedule: which steps end an interval, and what the stages so far came to.
        alignment: None where nothing asks for it.
        watch: whether stages are taken back, which ends them.
        auto: what moves the learning rate by it; None where nothing does. No stage follows while it says so.
        hooks: removing them ends the counting of tokens.
    """

    def __init__(
        self,
        config: FastForwardConfig,
        model: nn.Module,
        optimizer: Any,
        validation: ValidationLoss | None,
        ranks: Ranks | None,
        sharded: bool,
    ) -> None:
        self._ranks, self._shares = ranks, ranks if sharded else None
        self.schedule = StageSchedule(config)
        self.watch = StageWatch(optimizer, self.schedule, self._shares)
        asked, auto = self.schedule.asks_alignment, config.learning_rate == "auto"
        self.alignment: Alignment | None = None
        if asked or auto:
            kept = config.interval if asked else 1
            self.alignment = Alignment(self._shares, heard=auto, kept=kept)
        self.auto: AutoRate | None = None
        self._rate = FadedRate(unwrap_optimizer(optimizer))
        self._unconfirmed = True  # that all ranks start from the same state
        self._due = False  # whether a stage may follow the coming step
        self._compares = False  # whether the ranks compare their learning rates in it
        self._price = StagePrice(model, validation, asked)
        self.hooks = self._price.hooks
        self._expected: tuple[float | None, float | None] = (None, None)

    def before_step(self, moved: MovedWeights, closure: str) -> bool:
        """Make the checkpoint; whether a stage shall follow the step. Collective where it ``exchanges``.

        Args:
            closure: the optimizer's name where its step computes the gradients, else empty.

        Raises:
            RanksDisagree: where ranks that should have the same gradients do not.
        """
        if self.alignment is None:
            ops.checkpoint_(moved.table)
            return self._due
        table, auto = moved.table, self.auto
        if auto is not None:
            auto.before_alignment(table, closure, self.alignment.paired(table))
        if closure:
            announce_once(
                "alignment-closure",
                f"{closure}.step() is called with a closure, so that gradients come after Fast Forward has "
                "looked whether the last update still helps: stages run until one does not pay; call "
                "backward() before step(), or choose patience=N",
            )
            self.alignment.forget()
        weights = list(moved.parameters.values())
        self.alignment.before_step(table, weights, at_once=auto is not None and auto.rising)
        if auto is not None:
            may_follow = auto.before_update(table, self.alignment)
            if self._compares:
                self._compare()
            if not may_follow:
                return False
        if not self.schedule.asks_alignment:
            self.alignment.begin_interval()
            return self._due
        if not self._due:
            return False
        mean, possible = self.alignment.mean(self.schedule.averaged), self.alignment.possible()
        price = self._price.read(self._ranks, mean)
        self._expected = price, mean
        self.alignment.begin_interval()
        return self.schedule.pays(mean, possible, self.alignment.strongest, price)

    @property
    def exchanges(self) -> bool:
        """Whether the ranks meet in this step. In others one that raises must not wait for the rest."""
        exchanged = self.alignment is not None and self._shares is not None
        return exchanged or self._due or self._compares

    def _compare(self) -> None:
        c = math.nan if self.alignment.last is None else self.alignment.last
        names = {
            "a": "the alignment of their gradients with the last update",
            "b": 'the learning rate that "auto" came to',
            "c": "how often it was trimmed",
        }
        rows = self._ranks.exchange(ALIGNMENT, c, self.auto.rate, self.auto.trims)
        self._ranks.agree_on_rows(rows, names, SAME_GRADIENTS)

    def begin_step(self, step: int, table: ops.TensorTable) -> bool:
        """A batch has run, and optimizer step ``step`` comes, from 1; whether a stage may follow it."""
        self.watch.before_step(table)
        if self._ranks is not None and self._unconfirmed:
            self.in_step(step - 1)
            if self.auto is not None:
                self._compare()
            self._unconfirmed = False
        due, auto = self.schedule.due(step), self.auto
        self._due = not self._rate.look(due) and due
        self._compares = False
        if auto is not None:
            auto.look_whether_it_was_overwritten()
            self._compares = self._ranks is not None and (auto.rising or step % COMPARED == 0)
        self._price.steps += 1
        return self._due

    def after_step(self, table: ops.TensorTable | None) -> None:
        self.watch.after_step(table)
        if self.auto is not None:
            self.auto.after_step()
        if self.alignment is not None and table is not None:
            self.alignment.after_step(table)

    def begin_stage(self, stage: Stage) -> None:
        """Write down what it was expected by; it will write the weights."""
        stage.price, stage.alignment = self._expected
        self.forget_update()

    def after_stage(self, stage: Stage, search: Search) -> None:
        if search.losses:
            self._price.settle()
            self.schedule.after_stage(search, stage.alignment)

    def in_step(self, step: int, stale: bool = False) -> bool:
        """Whether any rank's weights are stale; that all have come equally far. Collective."""
        if self._ranks is None:
            return stale
        return self._ranks.in_step(step, self.schedule.fingerprint, stale)

    def forget_update(self, others: bool = False) -> None:
        if self.alignment is not None:
            self.alignment.forget(others)

    def state_dict(self, table: ops.TensorTable | None) -> dict[str, Any]:
        parts = (self.schedule, self._price, self._rate, *([self.auto] if self.auto else []))
        state = {key: value for part in parts for key, value in part.state_dict().items()}
        return state if self.alignment is None else {**state, "alignment": self.alignment.state_dict(table)}

    def load_state_dict(self, state: dict[str, Any], table: ops.TensorTable) -> None:
        self._unconfirmed = True
        self.watch.after_stage(0)
        for part in (self.schedule, self._price, self._rate):
            part.load_state_dict(state)
        if self.alignment is not None and state.get("alignment"):
            self.alignment.load_state_dict(state["alignment"], table)
        if self.auto is not None:
            self.auto.load_state_dict(state)
