"""What one stage is made of, whoever runs it: the weights, the loss, the search, and where its time went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch

from ffkernels import ops
from ffkernels.search.search import LinearSearch, Search, make_search
from ffkernels.stage.clock import StageClock
from ffkernels.stage.record import INTERRUPTED, Stage
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

    def write_into(self, stage: Stage, before: float) -> None:
        """Note what was found and the time it took, with the ``before`` seconds of the checkpoint."""
        stage.tau, stage.losses = self.search.best_tau, list(self.search.losses)
        stage.stopped_because = self.reason
        stage.validate_seconds = self.validate_seconds
        stage.move_seconds = self.move_seconds + before
        stage.seconds = self.clock.seconds() + before

    def flops(self) -> int:
        """Of its validations and moves; 0 for an interrupted stage. The first reading runs a validation."""
        validations = len(self.search.losses) + self.extra_validations
        if not validations or self.reason.startswith(INTERRUPTED):
            return 0
        return validations * self.validation.flops + 2 * self.table.numel * self.moves

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
