"""One run of `learning_rate.py`: a contender trains a task within a budget of FLOPs, and what came out.

A contender is a function that is given a ``Work`` and returns what a training loop needs of it::

    def mine(work: Work) -> Contender:
        optimizer = work.adamw(work.lr)
        return Contender(optimizer, work.scheduler(optimizer))

``CONTENDERS`` has ours by name; those of other people are ``PEERS`` in ``peers/learning_rates.py``, a dict of
the same kind. What a contender does besides the run's own steps it charges with ``work.charge``: the run
then has fewer steps, and a decaying schedule ends where the budget does. It may do so in the function itself
(a range test before the training; it puts the weights back with ``work.reset()``) or after any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ffkernels import FastForward, FastForwardConfig, find_learning_rate
from ffkernels.engine.rate_finding import PEAK, STEADY, scale_learning_rates
from ffkernels.reporting.flops import ADAM_FLOPS
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import Batch, Session, open_session

NEVER = 10**9  # an interval: no stages


class Bench:
    """A model, its data and its first weights, on which one contender after the other begins anew."""

    def __init__(self, config: TrainConfig) -> None:
        self.session: Session = open_session(config)
        self._first = [p.detach().clone() for p in self.session.trainable]
        self._batches: dict[int, tuple[Batch, int]] = {}
        self.start = self.session.test_loss()

    def reset(self) -> None:
        """Weights, gradients, mode and random numbers as at the beginning."""
        with torch.no_grad():
            for weight, first in zip(self.session.trainable, self._first, strict=True):
                weight.copy_(first)
                weight.grad = None
        self.session.model.train()
        torch.manual_seed(self.session.config.seed)

    def batch(self, step: int) -> tuple[Batch, int]:
        """The batch of optimizer step ``step`` (from 0), and the FLOPs of a step on it, Adam's included."""
        if step not in self._batches:
            batch, session = self.session.load(step), self.session
            flops = sum(session.meter.training_step(session.model, mb).measured for mb in batch.micro_batches)
            self._batches[step] = batch, flops + ADAM_FLOPS * session.meter.trainable_numel
        return self._batches[step]


class Work:
    """What a contender is given to train with.

    Attributes:
        session: model, task (``task.train``), collator, ``trainable``, and ``validation``, the loss on the 32
            validation examples. Its own optimizer is not used.
        lr: the learning rate that the user happens to begin with.
        schedule: "constant" or "linear", after a warm-up.
        warmup: steps.
        steps: optimizer steps that the budget is worth.
        forwards, batches: validation losses and training batches that were charged.
        flops: what they cost.
    """

    def __init__(self, bench: Bench, lr: float, schedule: str, steps: int, warmup: int) -> None:
        self.bench, self.session = bench, bench.session
        self.lr, self.schedule, self.steps, self.warmup = lr, schedule, steps, warmup
        self.forwards = self.batches = self.flops = 0
        self.budget = sum(bench.batch(step)[1] for step in range(steps))
        self._total, self._total_at = steps, 0

    def charge(self, *, forwards: int = 0, batches: int = 0, flops: int | None = None) -> None:
        """Charge validation losses and batches (forward, backward and step) outside the run's own steps.

        ``flops``: where they are known better than by what a validation and a batch cost.
        """
        self.forwards += forwards
        self.batches += batches
        if flops is None:
            flops = forwards * self.session.validation.flops + batches * self.bench.batch(0)[1]
        self.flops += flops

    @property
    def total(self) -> int:
        """Optimizer steps that the budget still allows in all."""
        if self._total_at != self.flops:
            self._total, left = 0, self.budget - self.flops
            while self._total < self.steps and (left := left - self.bench.batch(self._total)[1]) >= 0:
                self._total += 1
            self._total_at = self.flops
        return self._total

    def shape(self, step: int) -> float:
        """What the schedule multiplies the learning rate by in optimizer step ``step``, from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        return max(0.0, 1.0 - (step - self.warmup) / max(1, self.total - self.warmup))

    def adamw(self, lr: float, **options: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.session.trainable, lr=lr, **{"weight_decay": 0.0, **options})

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.shape)

    def reset(self) -> None:
        """Weights, gradients and random numbers as at the beginning of the run; charges stay."""
        self.bench.reset()


@dataclass
class Contender:
    """What trains.

    Attributes:
        optimizer: with the trainable weights of the session.
        scheduler: its ``step()`` is called after each optimizer step; None where there is none.
        after_step: called with the step (from 0) and the training loss before its update, after the step.
        evaluating: around each test loss: schedule-free optimizers exchange their weights in it.
        found: the learning rate that was found, asked for at the end; None where none was.
        close: called at the end.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    after_step: Callable[[int, float], None] | None = None
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext
    found: Callable[[], float | None] = lambda: None
    close: Callable[[], None] = lambda: None


def adam(work: Work) -> Contender:
    optimizer = work.adamw(work.lr)
    return Contender(optimizer, work.scheduler(optimizer))


def fast_forward(work: Work, **config: Any) -> Contender:
    """Adam with a FastForward of these settings; whatever it validates is charged."""
    optimizer = work.adamw(work.lr)
    scheduler = work.scheduler(optimizer)
    settings = FastForwardConfig(**config)
    session = work.session
    ff = FastForward(session.model, optimizer, session.validation, settings, scheduler=scheduler)
    charged: list[Any] = []

    def after_step(step: int, loss: float) -> None:
        for one in [*ff.stages[-1:], *([ff.finding] if ff.finding is not None else [])]:
            if not any(one is before for before in charged):
                charged.append(one)
                work.charge(forwards=one.evaluations, flops=one.flops)

    def found() -> float | None:
        return None if ff.finding is None else ff.finding.lr

    return Contender(optimizer, scheduler, after_step, found=found, close=ff.detach)


def find(work: Work) -> Contender:
    """The learning rate found in the second step; no stages after that."""
    return fast_forward(work, learning_rate="find", interval=NEVER)


def find_and_stages(work: Work) -> Contender:
    return fast_forward(work, learning_rate="find")


def keep(work: Work) -> Contender:
    """Fast Forward as it is by default."""
    return fast_forward(work)


def find_scaled(work: Work, factor: float) -> Contender:
    """A part of the found learning rate; for calibration."""
    contender, done = find(work), False
    ours, found = contender.after_step, contender.found

    def after_step(step: int, loss: float) -> None:
        nonlocal done
        ours(step, loss)
        if not done and found() is not None:
            scale_learning_rates(contender.optimizer, [contender.scheduler], factor)
            done = True

    contender.after_step = after_step
    contender.found = lambda: None if found() is None else factor * found()
    return contender


def best_times(work: Work, part: float) -> Contender:
    """Another part of the best update than what is made of it by default; for calibration."""
    return find_scaled(work, part / (STEADY if work.schedule == "constant" else PEAK))


def best_anew(work: Work, part: float = 1.0) -> Contender:
    """The learning rate found before the training, which then begins anew; for calibration."""
    optimizer = work.adamw(work.lr)
    batches = [work.bench.batch(step)[0].micro_batches[0] for step in range(2)]
    finding = find_learning_rate(work.session.model, optimizer, batches, work.session.validation)
    work.charge(forwards=finding.evaluations, flops=finding.flops)
    work.charge(batches=len(batches) * (1 + finding.restarts))
    lr = part / finding.part * finding.lr
    optimizer = work.adamw(lr)
    return Contender(optimizer, work.scheduler(optimizer), found=lambda: lr)


CONTENDERS: dict[str, Callable[[Work], Contender]] = {
    "adam": adam,
    "find": find,
    "find+stages": find_and_stages,
    "keep": keep,
    "best*1.4": lambda work: best_times(work, 1.4),
    "best*1": lambda work: best_times(work, 1.0),
    "best*0.7": lambda work: best_times(work, 0.7),
    "best*0.35": lambda work: best_times(work, 0.35),
    "best*1 anew": best_anew,
    "best*1.4 anew": lambda work: best_anew(work, 1.4),
}


def peers() -> dict[str, Callable[[Work], Contender]]:
    """Other people's, as far as their packages are installed."""
    from ffkernels.training.peers import FOLDER

    if not (FOLDER / "learning_rates.py").is_file():
        return {}
    from peers.learning_rates import PEERS

    return PEERS


def train(
    bench: Bench,
    make: Callable[[Work], Contender],
    *,
    lr: float,
    schedule: str = "constant",
    steps: int = 60,
    warmup: int = 6,
    tests: Sequence[float] = (0.5, 0.75),
) -> dict[str, Any]:
    """Train until the budget of ``steps`` Adam steps is spent.

    Args:
        tests: where to measure the test loss besides the end, as shares of the budget; charged to nobody.

    Returns:
        Plain values: ``loss`` at the end (None where it is not finite), ``curve`` of ``[optimizer steps,
        FLOPs, test loss]``, ``found``, ``forwards``, ``batches``, ``own_flops``, ``flops``, ``worst`` of the
        training losses, and why it ended where it did not end well.
    """
    begin = perf_counter()
    bench.reset()
    session, work = bench.session, Work(bench, lr, schedule, steps, warmup)
    contender = make(work)
    marks = [share * work.budget for share in sorted(tests)]
    curve: list[list[Any]] = [[0, 0, bench.start]]
    spent, worst, failed, step = 0, -math.inf, None, 0

    def test() -> None:
        with contender.evaluating():
            loss = session.test_loss()
        curve.append([step, spent + work.flops, loss if math.isfinite(loss) else None])

    try:
        while step < work.total:
            batch, flops = bench.batch(step)
            loss = session.backward(batch).item()
            if not math.isfinite(loss):
                failed = f"training loss {loss} in step {step + 1}"
                break
            worst = max(worst, loss)
            contender.optimizer.step()
            contender.optimizer.zero_grad(set_to_none=True)
            if contender.scheduler is not None:
                contender.scheduler.step()
            spent, step = spent + flops, step + 1
            if contender.after_step is not None:
                contender.after_step(step - 1, loss)
            if marks and spent + work.flops >= marks[0] and step < work.total:
                test()
            marks = [mark for mark in marks if mark > spent + work.flops]
        test()
        found = contender.found()
    finally:
        contender.close()
    return {
        "loss": curve[-1][2],
        "curve": curve,
        "found": found,
        "optimizer_steps": step,
        "forwards": work.forwards,
        "batches": work.batches,
        "own_flops": work.flops,
        "flops": spent + work.flops,
        "budget": work.budget,
        "worst": worst if math.isfinite(worst) else None,
        "failed": failed,
        "seconds": round(perf_counter() - begin, 1),
    }
