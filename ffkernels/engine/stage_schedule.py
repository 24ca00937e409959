"""After which optimizer steps a stage runs: at the end of every interval, as long as stages pay.

One account, in optimizer steps. A stage that measures e losses at the price of p steps each (``stage_price``)
and lowers the loss by G puts there what it brought less what it cost:

    LASTING · min(τ, G / g) − e·p    g = (loss after the stage before − loss before this one) / steps between

g is what one optimizer step has brought lately, on the same examples and free of charge, so G / g is how many
steps would have brought as much. More than τ it cannot be: a repeated update is worth a step at best. Where g
is not known yet, or not positive, it is τ. Of that lead a part is lost again, since the steps that follow
would have made some of the same way: LASTING is what stays.

Every optimizer step puts SHARE there until the account is even. It is never more than even: what one stage
has gained is not for later ones to spend. A stage runs where an interval ends and the account is even. Hence,
whatever the losses are,

    cost so far  ≤  worth so far  +  SHARE · steps so far  +  the last stage's cost

since after a stage that lost x, x / SHARE steps pass before the next. A stage whose first loss is NaN or
infinite costs its one loss. What a capture measures to be checked (``StageProgram.extra_validations``) is not
on the account, so that all executors run the same stages, nor is a stage that an exception ends.

Where every stage pays, one runs at each interval. Where none does, the gaps are e·p / SHARE: the longer, the
larger the validation set is beside a batch. Each stage is also the next attempt, and one that pays brings the
interval back.

``patience`` other than "auto" is a rule without an account: a number ends Fast Forward for good after so many
stages in a row that found no step (the paper's section 5.1), None runs a stage at every interval.
"""

from __future__ import annotations

import math
from typing import Any

from ffkernels.engine.config import PAPERS_PATIENCE, FastForwardConfig
from ffkernels.engine.digests import digest
from ffkernels.engine.search import BASELINE_NOT_FINITE, Search

__all__ = ["LASTING", "SHARE", "StageSchedule"]

LASTING = 0.5
SHARE = 0.01


class StageSchedule:
    """Which steps are followed by a stage.

    Attributes:
        balance: the account, in optimizer steps, at most 0.
        failures: stages in a row without a step.
        ended: no stage will run any more.
    """

    def __init__(self, config: FastForwardConfig) -> None:
        self._interval, self._warmup = config.interval, config.warmup
        self._patience = config.patience
        if self._patience == "auto" and config.search == "linear":
            self._patience = PAPERS_PATIENCE  # with the paper's search goes the paper's rule
        self.balance = 0.0
        self.failures = 0
        self.ended = False
        self._before: tuple[int, float] | None = None  # step and loss that the stage before left

    @property
    def keeps_account(self) -> bool:
        return self._patience == "auto"

    @property
    def fingerprint(self) -> int:
        """Equal where the account and what it goes on from are."""
        return int(digest(list(self.state_dict().values())), 16) >> 1

    def due(self, step: int) -> bool:
        """Whether a stage follows optimizer step ``step``, counted from 1."""
        past = step - self._warmup
        return not self.ended and past > 0 and past % self._interval == 0 and self.balance >= 0.0

    def after_step(self) -> None:
        self.balance = min(0.0, self.balance + SHARE)

    def after_stage(self, step: int, search: Search, price: float, comparable: bool = True) -> None:
        """Account for a stage that measured something.

        Args:
            step: the optimizer step it followed.
            search: as it ended.
            price: of one validation, in optimizer steps.
            comparable: whether its losses are of the same examples as those of the stage before.
        """
        searched = search.stopped_because != BASELINE_NOT_FINITE
        if self.keeps_account:
            worth = LASTING * self._lead(step, search, comparable) if searched else 0.0
            self.balance = min(0.0, self.balance + worth - len(search.losses) * price)
        if not searched:  # it says nothing about whether a step would have helped
            return
        self.failures = 0 if search.best_tau else self.failures + 1
        if isinstance(self._patience, int) and self.failures >= self._patience:
            self.ended = True
        self._before = (step, search.best_loss)

    def _lead(self, step: int, search: Search, comparable: bool) -> float:
        """How many optimizer steps the stage has gone ahead."""
        before, now = self._before, search.losses[0][1]
        if before is None or not comparable or step <= before[0]:
            return float(search.best_tau)
        progress = (before[1] - now) / (step - before[0])
        if not 0.0 < progress < math.inf:
            return float(search.best_tau)
        return min(float(search.best_tau), (now - search.best_loss) / progress)

    def state_dict(self) -> dict[str, Any]:
        return {
            "balance": self.balance,
            "failures": self.failures,
            "switched_off": self.ended,
            "before": self._before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.failures = int(state["failures"])
        # What the saved run's rule held back or had ended goes on where the present one is another.
        self.balance = float(state.get("balance", 0.0)) if self.keeps_account else 0.0
        self.ended = bool(state["switched_off"]) and isinstance(self._patience, int)
        before = state.get("before")
        self._before = None if before is None else (int(before[0]), float(before[1]))
