"""Which runs, in the order of what is most needed; and what a sweep does next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks import TASKS
from benchmarks.learning_rate.workloads import METHODS, SCHEDULES, Workload

LOW = (1e-4, 2e-4, 1e-3, 1e-2)  # what people take who do not look
SEEDS = (0, 1, 2)  # the evaluation's; from 10 on: calibration

Done = Mapping[str, Mapping[str, Any]]  # the lines of finished runs by key


@dataclass(frozen=True)
class Run:
    """One run. ``lr`` is None where the contender takes none."""

    workload: Workload
    seed: int
    contender: str
    lr: float | None = None

    @property
    def key(self) -> str:
        return f"{self.workload.name}, seed {self.seed}: {self.contender} {self.lr}"


@dataclass(frozen=True)
class Item:
    """Runs of one contender on one workload and seed: those of ``rates``, and then what ``more`` says.

    ``more(losses, item, done)`` is given the losses by rate (infinite where not finite) and returns the next
    rate, or None at the end.
    """

    workload: Workload
    seed: int
    contender: str
    rates: tuple[float | None, ...] = (None,)
    more: Callable[[dict[float, float], Item, Done], float | None] | None = None

    def next(self, done: Done) -> Run | None:
        """The first run that is not done."""
        losses = swept(done, self.workload, self.seed, self.contender)
        lr = next((lr for lr in self.rates if lr not in losses), None)
        if all(rate in losses for rate in self.rates):
            lr = self.more(losses, self, done) if self.more else None
            if lr is None:
                return None
        return Run(self.workload, self.seed, self.contender, lr)


def swept(done: Done, workload: Workload, seed: int, contender: str = "adam") -> dict[Any, float]:
    """Final losses by rate; infinite where not finite."""
    head = f"{workload.name}, seed {seed}: {contender} "
    lines = [line for key, line in done.items() if key.startswith(head)]
    return {line["lr"]: math.inf if line["loss"] is None else line["loss"] for line in lines}


def best(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda lr: (losses[lr], lr))


def until_inside(losses: dict[float, float], item: Item | None = None, done: Done = {}) -> float | None:  # noqa: B006
    """The factor 2 that the best rate lacks beside it; None where both its neighbours are known."""
    at = best(losses)
    return next((lr for lr in (2 * at, at / 2) if lr not in losses), None)


def as_before(neighbours: bool) -> Callable[[dict[float, float], Item, Done], float | None]:
    """The best rate of seed 0, then the two beside it."""

    def more(losses: dict[float, float], item: Item, done: Done) -> float | None:
        first = swept(done, item.workload, SEEDS[0])
        if not first:
            return None
        at = best(first)
        rates = (at, at / 2, 2 * at) if neighbours else (at,)
        return next((lr for lr in rates if lr not in losses), None)

    return more


def sweep(workload: Workload, seed: int, middle: float) -> Item:
    return Item(workload, seed, "adam", (middle, middle / 2, 2 * middle), until_inside)


def again(workload: Workload, seed: int) -> Iterator[Item]:
    yield Item(workload, seed, "auto")
    yield Item(workload, seed, "adam", (), as_before(neighbours=False))


def core(batches: Sequence[int], steps: int = 120) -> list[Workload]:
    return [Workload(t, b, steps, s) for b, t, s in product(batches, TASKS, SCHEDULES)]


def alignment() -> Iterator[Item]:
    """The evaluation of ``learning_rate="auto"``."""
    middle = {("constant", 4): 5e-3, ("linear", 4): 1e-2, ("constant", 32): 1e-2, ("linear", 32): 2e-2}
    methods = [Workload("instruction", 16, method=method) for method in METHODS if method != "lora-all"]
    steep = [
        Workload(task, 16, method="lora-all", permuted=True, schedule=schedule)
        for task, schedule in product(TASKS[:2], SCHEDULES)
    ]
    long = core((4,), 1200)
    for workload in core((4, 32)):
        yield Item(workload, 0, "auto")
        yield sweep(workload, 0, middle[workload.schedule, workload.batch])
        if workload.batch == 4:
            yield Item(workload, 0, "adam", LOW)
    for workload in methods + steep:
        yield Item(workload, 0, "auto")
        yield sweep(workload, 0, METHODS[workload.method].rate)
    for seed, workload in product(SEEDS[1:], core((4,))):
        yield from again(workload, seed)
    for workload in long:
        yield Item(workload, 0, "auto")
        yield sweep(workload, 0, {"constant": 2.5e-3, "linear": 1e-2}[workload.schedule])
    for seed, workload in product(SEEDS[1:], methods + steep):
        yield from again(workload, seed)
    for seed, workload in product(SEEDS[1:], core((4,))):
        yield Item(workload, seed, "adam", (), as_before(neighbours=True))
    for seed, workload in product(SEEDS[1:], core((32,))):
        yield from again(workload, seed)
    for workload in core((32,)) + methods + steep:
        yield Item(workload, 0, "adam", LOW)
    for seed, workload in product(SEEDS[1:], long):
        yield from again(workload, seed)
    wide = Workload("instruction", 32, 1200)
    yield Item(wide, 0, "auto")
    yield sweep(wide, 0, 5e-3)


def smollm2() -> Iterator[Item]:
    """A real model at a size that one CPU core can train."""
    workloads = [Workload(task, 8, 60, model="smollm2-135m") for task in TASKS[:2]]
    for workload in workloads:
        yield Item(workload, 0, "auto")
        yield Item(workload, 0, "adam", (3e-3,))
    for workload in workloads:
        yield sweep(workload, 0, 3e-3)


def fast() -> Iterator[Item]:
    """A dry run; its numbers mean nothing."""
    workload = Workload("instruction", 4, 8)
    yield Item(workload, 0, "auto")
    yield Item(workload, 0, "adam", (1e-2,))
    yield from again(workload, 1)


PLANS: dict[str, Callable[[], Iterator[Item]]] = {"alignment": alignment, "smollm2": smollm2, "fast": fast}
