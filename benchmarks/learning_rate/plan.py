"""Which runs, in the order of what is most needed; and what a sweep does next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks import TASKS
from benchmarks.learning_rate.methods import PEFT_METHODS
from benchmarks.learning_rate.workloads import METHODS, SCHEDULES, Workload

LOW = (1e-4, 2e-4, 1e-3, 1e-2)  # what people take who do not look
SEEDS = (0, 1, 2)  # the evaluation's; from 10 on: calibration
# The methods of the plan "alignment".
ALIGNMENT = ("lora", "lora-1", "lora-256", "dora", "oft", "loha", "vera", "ia3", "layernorm", "all")
CONSTANTS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)  # of which the best single one is taken
LIMITS = (1e-7, 1e3)  # beyond which no rate is looked for
HYPERGRADIENTS = tuple(f"hypergradient 1e-{n}" for n in range(3, 8))

Done = Mapping[str, Mapping[str, Any]]  # the lines of finished runs by key


@dataclass(frozen=True)
class Run:
    """One run. ``lr`` is None where the contender takes none; ``curve``: with test losses on its way."""

    workload: Workload
    seed: int
    contender: str
    lr: float | None = None
    curve: bool = True

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
    curve: bool = True

    def next(self, done: Done) -> Run | None:
        """The first run that is not done."""
        losses = swept(done, self.workload, self.seed, self.contender)
        lr = next((lr for lr in self.rates if lr not in losses), None)
        if all(rate in losses for rate in self.rates):
            lr = self.more(losses, self, done) if self.more else None
            if lr is None:
                return None
        return Run(self.workload, self.seed, self.contender, lr, self.curve)


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


def beside_auto(losses: dict[float, float], item: Item, done: Done) -> float | None:
    """A sweep on the grid of the first published rate, from its point nearest to where "auto" ended.

    Given up beyond ``LIMITS``.
    """
    first = PEFT_METHODS[item.workload.method].published[0]
    ended = done.get(Run(item.workload, item.seed, "auto").key, {}).get("rate") or first
    ended = min(max(ended, 10 * LIMITS[0]), LIMITS[1] / 10)
    middle = first * 2.0 ** round(math.log2(ended / first))
    lr = next((lr for lr in (middle, middle / 2) if lr not in losses), None) or until_inside(losses)
    return None if lr is None or not LIMITS[0] <= lr <= LIMITS[1] else lr


def sweep(workload: Workload, seed: int, middle: float) -> Item:
    return Item(workload, seed, "adam", (middle, middle / 2, 2 * middle), until_inside)


def again(workload: Workload, seed: int) -> Iterator[Item]:
    yield Item(workload, seed, "auto")
    yield Item(workload, seed, "adam", (), as_before(neighbours=False))


def core(batches: Sequence[int], steps: int = 120) -> list[Workload]:
    return [Workload(t, b, steps, s) for b, t, s in product(batches, TASKS, SCHEDULES[:2])]


def alignment() -> Iterator[Item]:
    """The evaluation of ``learning_rate="auto"``."""
    middle = {("constant", 4): 5e-3, ("linear", 4): 1e-2, ("constant", 32): 1e-2, ("linear", 32): 2e-2}
    methods = [Workload("instruction", 16, method=method) for method in ALIGNMENT]
    steep = [
        Workload(task, 16, method="lora-all", permuted=True, schedule=schedule)
        for task, schedule in product(TASKS[:2], SCHEDULES[:2])
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


# Calibration: constants of contenders are chosen on it. Seeds from 10 on.
CALIBRATION = (
    Workload("instruction", 4, 100),
    Workload("medical", 4, 100, "cosine", "lora-256"),
    Workload("instruction", 4, 100, "linear", "lora-1"),
    Workload("medical", 4, 100, "constant", "oft"),
    Workload("instruction", 4, 100, "constant", "ia3"),
    Workload("medical", 4, 100, "linear", "all"),
    Workload("medical", 32, 100, "linear"),
    Workload("instruction", 4, 1000),
)
# Evaluation: the task "chat" and eight of these methods are not in the calibration.
EVALUATION = (
    Workload("chat", 4, 100),
    Workload("medical", 4, 100, "constant", "rslora"),
    Workload("chat", 4, 100, "constant", "all"),
    Workload("instruction", 4, 100, "constant", "vera"),
    Workload("medical", 4, 100, "linear", "loha"),
    Workload("medical", 4, 100, "cosine", "layernorm"),
    Workload("instruction", 4, 100, "constant", "prompt"),
    Workload("chat", 4, 100, "linear", "lora-256"),
    Workload("instruction", 4, 100, "cosine", "lokr"),
    Workload("medical", 4, 100, "linear", "tokens"),
    Workload("chat", 4, 100, "cosine", "ia3"),
    Workload("chat", 4, 100, "constant", "dora"),
    Workload("chat", 32, 100, "linear"),
    Workload("medical", 32, 100, "constant", "vera"),
    Workload("instruction", 32, 100, "cosine", "lokr"),
    Workload("chat", 32, 100, "linear", "all"),
    Workload("chat", 4, 1000, "constant", "lora-r64"),
    Workload("medical", 4, 1000, "constant", "layernorm"),
    Workload("chat", 4, 1000, "linear", "loha"),
    Workload("chat", 4, 1000, "cosine", "all"),
    Workload("chat", 128, 100, "constant", "oft"),
    Workload("instruction", 128, 100, "linear", "rslora"),
)
# Chosen on the calibration, by the median: the single rate, and the step of the hypergradient.
CONSTANT = 2e-3
HYPERGRADIENT = "hypergradient 1e-4"
RIVALS = (
    *("Thinking Machines", "sweep of 3", "gen", "gala", HYPERGRADIENT, "schedule-free+"),
    *("mechanic", "prodigy", "greedy", "lightning"),
)


def oracle(workload: Workload, seed: int, middle: float, first: int = SEEDS[0]) -> Item:
    """Adam's sweep: on the first seed around ``middle``, on others from that one's best rate on."""
    return sweep(workload, seed, middle) if seed == first else Item(workload, seed, "adam", (), from_first)


def from_first(losses: dict[float, float], item: Item, done: Done) -> float | None:
    lr = as_before(neighbours=True)(losses, item, done)
    return until_inside(losses) if lr is None and swept(done, item.workload, SEEDS[0]) else lr


def everyone(workload: Workload, seed: int) -> Iterator[Item]:
    """All contenders but the oracle."""
    yield Item(workload, seed, "auto")
    yield Item(workload, seed, "adam", (1e-4, 2e-4, CONSTANT))
    yield Item(workload, seed, "Fast Forward", (1e-4,))
    for rival in RIVALS:
        yield Item(workload, seed, rival)


def calibration() -> Iterator[Item]:
    """What constants are chosen on: the best single rate, and the hypergradient's step."""
    for workload in CALIBRATION:
        yield Item(workload, 10, "auto")
        yield oracle(workload, 10, METHODS[workload.method].rate, first=10)
        for hypergradient in HYPERGRADIENTS:
            yield Item(workload, 10, hypergradient)
        yield Item(workload, 10, "adam", CONSTANTS)


def evaluation() -> Iterator[Item]:
    """ "auto" and its rivals where tuned rates lie decades apart: what is short first, then the seeds."""
    short, wide, long, widest = ([w for w in EVALUATION if size(w) == k] for k in range(4))
    order = ((0, short), (1, short), (2, short), (0, wide), (0, long), (1, wide), (2, wide))
    for seed, workloads in (*order, *((s, long) for s in SEEDS[1:]), *((s, widest) for s in SEEDS)):
        for workload in workloads:
            tuned = oracle(workload, seed, METHODS[workload.method].rate)
            yield tuned
            yield from everyone(workload, seed)
            yield tuned  # a contender's rate may have been the best


def workloads() -> Iterator[Item]:
    """What constants are chosen on, and then what all are judged by."""
    yield from calibration()
    yield from evaluation()


def size(workload: Workload) -> int:
    return 2 if workload.steps > 100 else {4: 0, 32: 1, 128: 3}[workload.batch]


SMOLLM2 = {"lora": 3e-3, "lora-256": 3e-4, "vera": 4e-2}  # where its sweeps begin


def smollm2() -> Iterator[Item]:
    """A real model, bfloat16, with adapters in float32, at a size that one CPU core can train."""
    for (seed, batch), method, task in product(((0, 8), (1, 8), (0, 32), (1, 32)), SMOLLM2, TASKS[:2]):
        workload = Workload(task, batch, 120, method=method, model="smollm2-135m")
        yield Item(workload, seed, "auto")
        yield oracle(workload, seed, SMOLLM2[method])


def gpu() -> Iterator[Item]:
    """The same on a GPU: every method and batch on one task, then on the other, then further seeds.

    What is not at hand is not waited for: weights are random where SmolLM2's are not in the cache, and the
    second task is left out where its package is not installed.
    """
    from benchmarks.learning_rate.models import smollm2_or_random, task_is_at_hand

    model, tasks = smollm2_or_random(), [task for task in TASKS[:2] if task_is_at_hand(task)]
    workloads = [
        Workload(task, batch, 120, method=method, model=model)
        for task, batch, method in product(tasks, (32, 128, 8), SMOLLM2)
    ]
    for workload in workloads:
        yield Item(workload, 0, "auto")
        yield sweep(workload, 0, SMOLLM2[workload.method])
    for seed, workload in product(SEEDS[1:], workloads):
        yield from again(workload, seed)


def gpu_fast() -> Iterator[Item]:
    """A dry run of it; its numbers mean nothing."""
    for method in ("lora", "vera"):
        workload = Workload("instruction", 4, 8, method=method, model="tiny-llama-random")
        yield Item(workload, 0, "auto")
        yield Item(workload, 0, "adam", (1e-2, 2e-2))


def peft() -> Iterator[Item]:
    """PEFT's methods: no rate given, the rates of PEFT's own comparison, and a sweep."""
    for name, method in PEFT_METHODS.items():
        workload = Workload("instruction", 4, 100, method=name)
        yield Item(workload, 0, "auto", curve=False)
        yield Item(workload, 0, "adam", method.published, beside_auto, curve=False)


def fast() -> Iterator[Item]:
    """A dry run; its numbers mean nothing."""
    workload = Workload("instruction", 4, 8)
    yield Item(workload, 0, "auto")
    yield Item(workload, 0, "adam", (1e-2,))
    yield from again(workload, 1)


PLANS: dict[str, Callable[[], Iterator[Item]]] = {
    "alignment": alignment,
    "calibration": calibration,
    "evaluation": evaluation,
    "workloads": workloads,
    "smollm2": smollm2,
    "gpu": gpu,
    "peft": peft,
    "fast": fast,
    "gpu-fast": gpu_fast,
}
