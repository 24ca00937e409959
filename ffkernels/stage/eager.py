"""How a stage runs: what it is made of, and the plain way to run it.

    prologue    Δ ← W − best ; best ← W          nothing to search when max |Δ| is 0 or not finite
    loop        loss, S ← L(W) ; sure ← a real rise, by S and best's S ; decide ;
                base = accept ? W : best ; best ← base ; W ← base + k·Δ

S are the losses by example, where the validation has them; without them every rise counts
(``significance``). A validation that raises, once one has worked, counts as NaN (``trial``). ``StageProgram``
says what a stage is made of; an executor runs it, from the prologue on.
``EagerExecutor`` is the plain loop on the host, correct on every device and the truth for every faster one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from ffkernels import ops
from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.ranks.trial import comes_of_weights, say_there_is_none
from ffkernels.search.search import LinearSearch, Search, make_search
from ffkernels.search.significance import Rises
from ffkernels.stage.clock import Lag, StageClock
from ffkernels.validation.examples import read_together
from ffkernels.validation.loss import ValidationLoss

NO_UPDATE = "the optimizer did not change the weights"
UPDATE_NOT_FINITE = "the optimizer's update is not finite"


class Pace(NamedTuple):
    """How an eager step goes.

    Attributes:
        host: seconds in which the host prepares it, those included in which CUDA makes it wait.
        total: seconds it takes in all.
        behind: whether the device was late when the host had prepared the validation, so that it is the host
            that waits; None where nothing tells.
    """

    host: float
    total: float
    behind: bool | None = None


@dataclass
class StageProgram:
    """One stage, from the optimizer's step on: best holds the weights before it, and the search is fresh.

    Args:
        table: the weights, with best as the checkpoint before the optimizer's step.
        validation: the loss of the weights as they are, a 0-dim tensor or a float. Graphs and losses by
            example need a ``ValidationLoss``.
        search: which τ to try, in what order.

    Attributes:
        stopped_because: why there was nothing to search, or what cut the search; None where the search
            itself says why it ended.
        validate_seconds, move_seconds: where the time went. A graph holds both, which cannot be told apart
            from outside: it is booked to validation as a whole.
        moves: weight moves in the loop, one after each validation.
        extra_validations: evaluations that are not part of the record: those that warmed up a capture or
            checked it.
        pace: of each step of an eager stage.
        clock: runs since the program was made.
    """

    table: ops.TensorTable
    validation: Callable[[], torch.Tensor | float]
    search: Search

    stopped_because: str | None = None
    validate_seconds: float = 0.0
    move_seconds: float = 0.0
    moves: int = 0
    extra_validations: int = 0
    pace: list[Pace] = field(default_factory=list)
    clock: StageClock = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.clock = StageClock(self.table.device)

    @property
    def reason(self) -> str:
        """Why the stage ended, in words; empty while it runs."""
        return self.stopped_because or self.search.stopped_because or ""

    @property
    def example_counts(self) -> list[int] | None:
        """Tokens by example, where losses by example can change what the search does; else None."""
        if isinstance(self.search, LinearSearch) or not isinstance(self.validation, ValidationLoss):
            return None
        return self.validation.example_counts

    def restart(self) -> None:
        """Forget what was found, for another executor to run the same stage; the clock goes on."""
        self.extra_validations += len(self.search.losses)
        self.search = make_search(self.search.name, self.search.max_tau, self.search.start)
        self.stopped_because = None
        self.moves = 0
        self.pace = []


def step_pace(program: StageProgram) -> Pace | None:
    """The median step of an eager stage; None when the stage had none.

    The first step is left out where there are others: its kernels may just have been compiled or loaded.
    """
    steps = program.pace[1:] or program.pace
    if not steps:
        return None
    told = [step.behind for step in steps if step.behind is not None]
    behind = 2 * sum(told) > len(told) if told else None
    return Pace(median(step.host for step in steps), median(step.total for step in steps), behind)


class EagerExecutor:
    """The host decides after every validation: one device-to-host read of the loss per Fast Forward step."""

    name = "eager"
    _worked = False  # whether any validation has given a loss: before, what it raises is the loss's own fault

    def run(self, program: StageProgram) -> None:
        """Run the stage; W ends bit-equal to the best validated weights, also when something raises."""
        table, search = program.table, program.search
        with interrupt_later():
            ops.delta_(table)
        with program.clock.reading():
            largest = self.largest_update(table)
        program.move_seconds += program.clock.seconds()
        if largest == 0.0 or not math.isfinite(largest):
            program.stopped_because = UPDATE_NOT_FINITE if largest else NO_UPDATE
            return
        base = 0  # the τ that best holds
        counts = program.example_counts
        rises = Rises(counts)
        lag = Lag(table.device)
        labelled = getattr(program.validation, "labelled", None)
        try:
            if labelled is not None:
                labelled.before_head = lag.mark
            while (tau := search.propose()) is not None:
                start = perf_counter()
                try:
                    measured = self.measure(program, counts)
                    behind = lag.is_behind()
                    prepared = perf_counter()
                    loss, sums = read_together(*measured)
                    self._worked = computed = True
                except Exception as error:
                    if not self.forgives(error):
                        raise
                    loss, sums, computed = math.nan, None, False
                    behind, prepared = None, perf_counter()
                validated = perf_counter()
                # Nothing may interrupt from the decision to the end of the move: half a move has no undo.
                with interrupt_later():
                    search.observe(tau, loss, rises.sure(loss, sums), computed)
                    if search.accepted:
                        base = tau
                    following = search.propose()
                    k = 0 if following is None else following - base
                    ops.step_(table, search.accepted, float(k))
                end = perf_counter()
                program.moves += 1
                program.validate_seconds += validated - start
                program.move_seconds += end - validated
                program.pace.append(Pace(prepared - start + end - validated, end - start, behind))
        except BaseException:
            with interrupt_later():
                ops.step_(table, False, 0.0)  # W ← best
            raise
        finally:
            if labelled is not None:
                labelled.before_head = None

    def measure(self, program: StageProgram, counts: list[int] | None) -> tuple[Any, torch.Tensor | None]:
        """The loss, and S where there are ``counts``."""
        return (program.validation(), None) if counts is None else program.validation.measure()

    def forgives(self, error: Exception) -> bool:
        """Whether a validation that raised this counts as NaN; says so once."""
        forgiven = self._worked and comes_of_weights(error)
        if forgiven:
            say_there_is_none(error)
        return forgiven

    def largest_update(self, table: ops.TensorTable) -> float:
        """max |Δ|, which says whether there is anything to search."""
        return ops.delta_absmax(table)

    def close(self) -> None:
        """Nothing is held."""
