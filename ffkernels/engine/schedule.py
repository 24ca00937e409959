"""After which optimizer steps a stage runs: where an interval ends and a stage is expected to pay.

    runs  ⇔  ½ · τ_expected ≥ e · p        e losses at the price of p optimizer steps each (``engine.price``)
    τ_expected = max( r / (1 − r),  τ · m / m_then )      r = m / strongest

with the alignment m of the interval's second half, the strongest alignment so far, and τ and m_then of the
last stage. Before a stage has measured anything, the most negative that c may be by now behind its noise
(``Alignment.possible``) counts in place of m where it is stronger. docs/algorithm.md derives it.

Under a rate that a schedule has brought below ``FADED`` of the highest so far none runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ffkernels.engine.config import PAPERS_PATIENCE, FastForwardConfig
from ffkernels.ops.notices import announce_once
from ffkernels.ranks.digests import digest
from ffkernels.search.search import BASELINE_NOT_FINITE, Search

FEWEST = 4  # losses: at τ = 0, 1 and 2, and one more where the bracket allows it


class StageSchedule:
    """Which steps are followed by a stage.

    Attributes:
        failures: stages in a row without a step.
        ended: no stage will run any more.
        undone: since what stages move does not stay (``engine.watch``).
        waits: intervals that still pass before ``pays`` looks again.
        last: of the last stage that searched: its τ, its losses and the alignment before it; None before.
    """

    def __init__(self, config: FastForwardConfig) -> None:
        self._interval, self._warmup = config.interval, config.warmup
        self._patience = config.patience
        if self._patience == "auto" and config.search == "linear":
            self._patience = PAPERS_PATIENCE  # with the paper's search goes the paper's rule
        self.failures = 0
        self.ended = self.undone = False
        self.waits = 0
        self.last: tuple[int, int, float | None] | None = None

    @property
    def asks_alignment(self) -> bool:
        """Whether ``pays`` is asked, and so alignments and prices are needed."""
        return self._patience == "auto" and self._interval is not None

    @property
    def averaged(self) -> int:
        """Of how many alignments m is the mean: those of an interval's second half.

        After a stage the optimizer's momentum points elsewhere, and the first ones are weaker.
        """
        return (self._interval + 1) // 2

    @property
    def fingerprint(self) -> int:
        """Equal where the decisions so far and what the next one goes by are."""
        return int(digest(list(self.state_dict().values())), 16) >> 1

    def due(self, step: int) -> bool:
        """Whether an interval ends with optimizer step ``step``, counted from 1."""
        if self._interval is None:
            return False
        past = step - self._warmup
        return not self.ended and past > 0 and past % self._interval == 0

    def pays(self, alignment: float | None, possible: float, strongest: float, price: float) -> bool:
        """Whether a stage now is expected to gain what it costs. To be asked once at each interval's end.

        Args:
            alignment: the mean c of the interval's second half; None where it is not known.
            possible, strongest: the most negative that c may be by now, and that it was so far.
            price: of one validation, in optimizer steps.
        """
        if self.waits:
            self.waits -= 1
            return False
        losses = FEWEST if self.last is None or not self.last[0] else self.last[1]
        return self.expected_tau(alignment, possible, strongest) / 2 >= losses * price

    def expected_tau(self, alignment: float | None, possible: float, strongest: float) -> float:
        if alignment is None:
            return math.inf if self.last is None else float(self.last[0])
        if self.last is None:
            alignment = min(alignment, possible)
        if alignment >= 0.0:
            return 0.0
        by_slope = alignment / (strongest - alignment) if alignment > strongest else math.inf
        if self.last is None:
            return by_slope
        tau, _, then = self.last
        by_last = float(tau) if then is None or then >= 0.0 else tau * alignment / then
        return max(by_slope, by_last)

    def after_stage(self, search: Search, alignment: float | None = None) -> None:
        """Take note of a stage that measured something; ``alignment`` is what ``pays`` was told of it."""
        if search.stopped_because == BASELINE_NOT_FINITE:
            return  # it says nothing about whether a step would have helped
        self.failures = 0 if search.best_tau else self.failures + 1
        self.waits = 2 ** min(self.failures - 1, 30) - 1 if self.failures else 0
        if isinstance(self._patience, int) and self.failures >= self._patience:
            self.ended = True
        self.last = (search.best_tau, len(search.losses), alignment)

    def end(self) -> None:
        """For what a stage moves is undone."""
        self.ended = self.undone = True

    def state_dict(self) -> dict[str, Any]:
        return {
            "failures": self.failures,
            "switched_off": "undone" if self.undone else self.ended,
            "last_stage": self.last,
            "waits": self.waits,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.failures, self.waits = int(state["failures"]), int(state["waits"])
        # What ended the saved run goes on where the present rule is another.
        self.undone = state["switched_off"] == "undone"
        self.ended = self.undone or (bool(state["switched_off"]) and isinstance(self._patience, int))
        last = state["last_stage"]
        self.last = None if last is None else (int(last[0]), int(last[1]), last[2])


FADED = 0.02


class FadedRate:
    """To be asked before every optimizer step.

    Attributes:
        highest: the largest learning rate so far; 0 before the first step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.highest = 0.0

    def look(self, due: bool) -> bool:
        """Whether the coming step's rate has faded. Rates that are tensors are read where ``due`` only."""
        rates = [group.get("lr") for group in self._optimizer.param_groups]
        if any(rate is None for rate in rates):
            return False  # the optimizer chooses its own
        if not due and any(isinstance(rate, torch.Tensor) for rate in rates):
            return False
        rate = max(map(float, rates))
        self.highest = max(self.highest, rate)
        faded = rate < FADED * self.highest
        if faded and due:
            announce_once(
                "rate-faded",
                "no Fast Forward stage where the learning rate has fallen from "
                f"{self.highest:.3g} to {rate:.3g}: it would repeat the small step until the fall is undone",
            )
        return faded

    def state_dict(self) -> dict[str, Any]:
        return {"highest_rate": self.highest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.highest = float(state["highest_rate"])
