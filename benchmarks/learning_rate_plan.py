"""What `learning_rate.py` runs, in the order of what is most needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from ffkernels.training.config import TrainConfig

TASKS = ("instruction", "medical", "chat")
CLAIMED = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # learning rates that one may begin with
BEYOND = (3e-2,)
SWEEP = (3e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 2e-2, 3e-2)  # what tuned Adam is the best of
RULES = (2e-4, 1e-3)  # of thumb; 1e-2 is one of the sweep
SEEDS = (0, 1, 2)
SCHEDULES = ("constant", "linear")
STEPS, WARMUP, BATCH, LENGTH, TESTS = 120, 12, 32, 64, 400
ALL_LINEAR = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

# Changes to the settings of the standard run.
VARIANTS: dict[str, dict[str, object]] = {
    "standard": {},
    "rank 64": {"rank": 64, "alpha": 128},
    "DoRA": {"method": "dora"},
    "all-linear": {"targets": ALL_LINEAR},
    "bf16 base": {"dtype": "bfloat16"},
    "SmolLM2-135M": {"model": "smollm2-135m", "dtype": "bfloat16", "batch_size": 8, "test_examples": 96},
}


@dataclass(frozen=True)
class Run:
    """One run; its fields are in its result."""

    task: str
    seed: int
    contender: str
    lr: float
    schedule: str = "constant"
    variant: str = "standard"
    steps: int = STEPS

    @property
    def key(self) -> str:
        return " ".join(map(str, asdict(self).values()))

    def config(self, model: str = "tiny") -> TrainConfig:
        settings: dict[str, object] = {
            "model": model,
            "task": self.task,
            "seed": self.seed,
            "batch_size": BATCH,
            "max_length": LENGTH,
            "test_examples": TESTS,
            "device": "cpu",
            "threads": 1,
            **VARIANTS[self.variant],
        }
        return TrainConfig(**settings)  # type: ignore[arg-type]


def of(
    contender: str,
    rates: Sequence[float],
    seeds: Sequence[int],
    tasks: Sequence[str] = TASKS,
    **fields: object,
) -> Iterator[Run]:
    for seed in seeds:
        for task in tasks:
            for lr in rates:
                yield Run(task, seed, contender, lr, **fields)  # type: ignore[arg-type]


def calibrate() -> Iterator[Run]:
    """Seeds that the evaluation does not use: what part of the found rate is best, under both schedules."""
    ours = ("best*1", "best*1.4", "best*0.7", "best*1 anew", "best*1.4 anew")
    for seed in (10, 11):
        for steps in (STEPS // 2, STEPS):
            for schedule in SCHEDULES:
                some = {"schedule": schedule, "steps": steps}
                yield from of("adam", (1e-2, 2e-2, 1.4e-2, 3e-2, 7e-3), (seed,), **some)
                for contender in ours:
                    yield from of(contender, (1e-4,), (seed,), **some)


def grid() -> Iterator[Run]:
    """The evaluation. What is cut when time is short is at its end: a start rather than a condition."""
    # Adam is tuned on the first seed; the others get the best two rates of there.
    swept = {"constant": (1e-2, 7e-3, 5e-3, 1.4e-2), "linear": (2e-2, 1.4e-2, 3e-2, 1e-2)}
    best = {"constant": (1e-2, 7e-3, 7e-3), "linear": (2e-2, 2e-2, 1.4e-2)}
    next_best = {"constant": (7e-3, 5e-3, 5e-3), "linear": (1.4e-2, 3e-2, 2e-2)}
    for schedule in SCHEDULES:
        yield from of("adam", swept[schedule][:2], SEEDS[:1], schedule=schedule)
        yield from of("find", (1e-5, 1e-2), SEEDS[:1], schedule=schedule)
    yield from of("adam", (5e-3,), SEEDS[:1], TASKS[1:])
    for seed in SEEDS[1:]:
        for schedule in SCHEDULES:
            for task, lr in zip(TASKS, best[schedule], strict=True):
                yield Run(task, seed, "adam", lr, schedule)
                for start in (1e-5, 1e-2):
                    yield Run(task, seed, "find", start, schedule)
    yield from of("adam", (3e-2,), SEEDS[:1], TASKS[1:], schedule="linear")
    yield from itertools.islice(long(), 1)
    for schedule in SCHEDULES:
        for seed in SEEDS[1:]:
            for task, lr in zip(TASKS, next_best[schedule], strict=True):
                yield Run(task, seed, "adam", lr, schedule)
        yield from of("find", (1e-3,), SEEDS, schedule=schedule)
    yield from rivals((0,))
    yield from of("adam", RULES, (0,))
    yield from long()
    for schedule in SCHEDULES:
        yield from of("adam", swept[schedule], (0,), schedule=schedule)
    for lr in (1e-4, 3e-5, 3e-4, 3e-3):
        for schedule in SCHEDULES:
            yield from of("find", (lr,), SEEDS, schedule=schedule)
    for variant in ("rank 64", "bf16 base", "all-linear", "DoRA"):
        yield from of("adam", (1e-2, 5e-3, 2e-2), (0,), variant=variant)
        yield from of("find", (1e-5, 1e-3), (0,), variant=variant)
    yield from of("adam", (1e-5, 1e-4, 3e-3, 3e-2, 3e-5, 3e-4), (0,))
    yield from of("find", BEYOND, SEEDS)
    yield from of("adam", RULES, SEEDS[1:])
    yield from rivals(SEEDS[1:])


def long() -> Iterator[Run]:
    """Ten times the steps: does it diverge?"""
    for turn in range(len(TASKS)):
        for number, task in enumerate(TASKS):
            yield Run(task, turn, "find", (1e-2, 1e-5, 1e-3)[(number + turn) % 3], steps=10 * STEPS)


def rivals(seeds: Sequence[int]) -> Iterator[Run]:
    """Other finders and optimizers without a learning rate, as far as they are installed."""
    from learning_rate_runs import peers

    for name in peers():
        yield from of(name, (1e-4,), seeds)


def fast_forward() -> Iterator[Run]:
    """With stages: their search is what changes most often, so they are measured by themselves."""
    for contender in ("find+stages", "keep"):
        for lr in (1e-4, 1e-3, 1e-2):
            yield from of(contender, (lr,), (0,))
    for contender in ("find+stages", "keep"):
        yield from of(contender, (1e-4, 1e-2), SEEDS[1:])


def fast() -> Iterator[Run]:
    """A dry run; its numbers mean nothing."""
    for contender, lr in (("adam", 1e-2), ("find", 1e-4), ("find+stages", 1e-3), ("keep", 1e-3)):
        yield Run("instruction", 0, contender, lr, steps=12)
    yield Run("instruction", 0, "best*1", 1e-4, "linear", "bf16 base", 16)


def smollm2() -> Iterator[Run]:
    """A real model at a size that one CPU core can train: half the steps, the sweep's coarsest rates."""
    where = {"tasks": TASKS[:2], "variant": "SmolLM2-135M", "steps": STEPS // 2}
    yield from of("adam", (3e-3, 1e-2), (0,), **where)
    for lr in (1e-5, 1e-3, 1e-4):
        yield from of("find", (lr,), (0,), **where)
    yield from of("best*0.35", (1e-4,), (0,), **where)
    yield Run("instruction", 0, "best*1", 1e-5, variant=where["variant"], steps=STEPS // 2)
    yield from of("adam", (1e-3, 3e-2), (0,), **where)


PLANS = {
    "grid": grid,
    "fast-forward": fast_forward,
    "smollm2": smollm2,
    "calibrate": calibrate,
    "fast": fast,
}
