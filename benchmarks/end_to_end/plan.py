"""What is measured: cells, their order, the settings of each, and how long they may take.

A cell is a task, a method, a learning rate and a batch size on one model; a round is one seed of a cell.
Rounds are ordered so that a measurement that is stopped early has covered the most telling ones: first every
task with LoRA at the paper's kind of learning rate, then other rates, DoRA, further seeds, larger batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.tables import rate
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.compare import SWEEP, TUNED_LR, Comparison
from ffkernels.training.config import TrainConfig
from ffkernels.training.trainer import train

TUNED = "tuned"
# The bracketing search first: where time runs out inside a round, the paper's own search is the one to miss.
SEARCHES = ("parabolic", "linear")
# A round's work in Adam runs, and its test losses: a first guess, from the embedded model, on which linear
# costs 0.7 of Adam, parabolic 0.2 to 0.5, tuned Adam 0.1 and "auto" 0.2. A sweep tries each rate for as long
# as the best one needs.
ROUND_STEPS, ROUND_TESTS = 2.4, 43
SWEEP_STEPS, SWEEP_TESTS = 0.06, 3


@dataclass(frozen=True)
class Cell:
    """One row of the tables; ``lr`` None means the tuned learning rate."""

    task: str
    method: str
    lr: float | None
    batch_size: int

    @property
    def name(self) -> str:
        rate_ = TUNED if self.lr is None else rate(self.lr)
        return f"{self.task} {self.method} lr={rate_} batch={self.batch_size}"


@dataclass(frozen=True)
class Plan:
    """Everything that is to be measured with one model.

    Attributes:
        base: the settings that all rounds share; task, method, lr, batch size and seed are the cells'.
        rates: learning rates; None stands for the tuned one.
        tuned_lr: of the tuned rows; None looks it up, or finds it in the first cell of each task.
    """

    base: TrainConfig
    tasks: Sequence[str]
    methods: Sequence[str]
    rates: Sequence[float | None]
    batch_sizes: Sequence[int]
    seeds: Sequence[int]
    check_every: int = 3
    tuned_lr: float | None = None
    only: Sequence[str] = ()
    fast_forward: FastForwardConfig = field(default_factory=FastForwardConfig)

    def rounds(self) -> Iterator[tuple[Cell, int]]:
        """Cells and seeds in the order in which they are run."""
        order = (self.batch_sizes, self.seeds, self.methods, self.rates, self.tasks)
        for batch_size, seed, method, lr, task in product(*order):
            cell = Cell(task, method, lr, batch_size)
            if all(part in cell.name.split() for part in self.only):
                yield cell, seed

    def known_rate(self, cell: Cell, found: Mapping[str, Mapping[str, Any]]) -> float | None:
        """Adam's tuned learning rate for the cell's task, where it has been given, measured or found."""
        if self.tuned_lr is not None:
            return self.tuned_lr
        if cell.task in found:
            return found[cell.task]["lr"]
        return TUNED_LR.get((self.base.model, cell.task))

    def comparison(self, cell: Cell, seed: int, tuned: float | None, out: Path) -> Comparison:
        """The protocol of one round; without a tuned learning rate it looks for one."""
        lr = tuned if cell.lr is None else cell.lr
        if lr is None:
            raise ValueError(
                f"{cell.name}: no tuned learning rate is known for {cell.task!r}; measure one of its cells "
                "at another rate first, or give --tuned-lr"
            )
        base = dataclasses.replace(
            self.base, task=cell.task, method=cell.method, lr=lr, batch_size=cell.batch_size, out=str(out)
        )
        return Comparison(
            base,
            seeds=(seed,),
            searches=SEARCHES,
            fast_forward=self.fast_forward,
            tuned_lr=tuned,
            sweep=tuned is None,
            check_every=self.check_every,
        )


class Forecast:
    """How long a round will take: from the time of a few steps, corrected by every round that ends.

    The few steps are measured once per batch size, on the first cell that has it.
    """

    def __init__(self) -> None:
        self._work: dict[tuple[str, int], tuple[float, float, float]] = {}
        self._taken, self._expected = 0.0, 0.0

    def seconds(self, comparison: Comparison) -> float:
        """The forecast for a round, corrected by those that have ended."""
        correction = self._taken / self._expected if self._expected else 1.0
        return correction * self._guess(comparison)

    def learn(self, comparison: Comparison, seconds: float) -> None:
        self._taken += seconds
        self._expected += self._guess(comparison)

    def _guess(self, comparison: Comparison) -> float:
        base = comparison.base
        key = (base.method, base.batch_size)
        if key not in self._work:
            self._work[key] = _probe(comparison)
        step, test, start = self._work[key]
        tests = ROUND_TESTS if base.evaluate_every else ROUND_TESTS // 2
        total = ROUND_STEPS * base.steps * step + tests * test + 5 * start
        if comparison.sweep:
            each = SWEEP_STEPS * base.steps * step + SWEEP_TESTS * test + start
            total += len(SWEEP) * each
        return total


def _probe(comparison: Comparison) -> tuple[float, float, float]:
    """Seconds of an optimizer step, of a test loss, and of what a run needs before its first step."""
    begin = perf_counter()
    at: list[tuple[str, float]] = []
    config = dataclasses.replace(
        comparison.adam(comparison.seeds[0]), name="probe", epochs=None, steps=3, evaluate_every=0
    )
    result = train(config, save=False, on_event=lambda event: at.append((event["event"], perf_counter())))
    result.log.unlink(missing_ok=True)
    steps = [when for event, when in at if event == "step"]
    tests = [when for event, when in at if event == "test"]
    run = next(when for event, when in at if event == "run")
    # The first step and the first test loss hold first-use costs.
    return (steps[-1] - steps[0]) / (len(steps) - 1), tests[-1] - steps[-1], run - begin
