"""What chooses the learning rate.

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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.learning_rate.bench import Bench
from benchmarks.learning_rate.workloads import WARMUP
from ffkernels import FastForward, FastForwardConfig

# The rates of "sweep of 3": the decades that the tuned rates of the calibration workloads span.
DECADES = (1e-3, 1e-2, 1e-1)


class Work:
    """What a contender is given to train with.

    Attributes:
        bench: model, data, ``trainable``, and ``validation``, the loss on the 32 validation examples.
        lr: the learning rate that a sweep, or the user, happens to take; None where there is none.
        schedule: "constant", "linear" or "cosine".
        warmup: steps of it, which multiply the schedule; a contender that needs none sets it to 0.
        steps: optimizer steps that the budget is worth.
        charged: FLOPs of the budget that went to anything but steps.
    """

    def __init__(
        self,
        bench: Bench,
        steps: int,
        schedule: str = "constant",
        lr: float | None = None,
        warmup: int = WARMUP,
    ) -> None:
        self.bench, self.steps, self.schedule, self.lr, self.warmup = bench, steps, schedule, lr, warmup
        self.charged = 0
        self._total, self._total_at, self._sums = steps, 0, [0]

    @cached_property
    def budget(self) -> int:
        """FLOPs."""
        return sum(self.bench.flops(step) for step in range(self.steps))

    def charge(self, *, forwards: int = 0, batches: int = 0, flops: int | None = None) -> None:
        """Charge validation losses and batches (forward, backward and step) outside the run's own steps.

        ``flops``: where they are known better than by what a validation and a batch cost.
        """
        if flops is None:
            flops = batches * self.bench.flops(0)
            flops += forwards * self.bench.validation.flops if forwards else 0
        self.charged += flops

    def spent(self, steps: int) -> float:
        """The share of the budget that ``steps`` steps and all charges are."""
        while len(self._sums) <= steps:
            self._sums.append(self._sums[-1] + self.bench.flops(len(self._sums) - 1))
        return (self.charged + self._sums[steps]) / self.budget

    @property
    def total(self) -> int:
        """Optimizer steps that the budget still allows in all."""
        if self._total_at != self.charged:
            self._total, left = 0, self.budget - self.charged
            while self._total < self.steps and (left := left - self.bench.flops(self._total)) >= 0:
                self._total += 1
            self._total_at = self.charged
        return self._total

    def shape(self, step: int) -> float:
        """What the schedule multiplies the learning rate by in optimizer step ``step``, from 0."""
        shape = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        done = min(1.0, step / max(1, self.total))
        decays = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
        return shape * decays[self.schedule]

    def adamw(self, lr: float, **options: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.bench.trainable, lr=lr, **{"weight_decay": 0.0, **options})

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.shape)

    def reset(self) -> None:
        """Weights, gradients and random numbers as at the beginning of the run; charges stay."""
        self.bench.reset()


@dataclass
class Contender:
    """What trains.

    Attributes:
        optimizer: with the trainable weights of the bench.
        scheduler: its ``step()`` is called after each optimizer step; None where there is none.
        before_step: called with the same as ``after_step``, between the gradients and the step.
        after_step: called with the step (from 0) and the training loss before its update, after the step.
        evaluating: around each test loss: schedule-free optimizers exchange their weights in it.
        rate: the base learning rate, asked for at the end; None where there is none.
        report: plain values for the run's result, asked for at the end.
        close: called at the end.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    after_step: Callable[[int, float], None] | None = None
    before_step: Callable[[int, float], None] | None = None
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext
    rate: Callable[[], float | None] = lambda: None
    report: Callable[[], dict[str, Any]] = dict
    close: Callable[[], None] = lambda: None

    def step(self, step: int, loss: float) -> None:
        """Take optimizer step ``step``, from 0, with the gradients that are there and cleared then."""
        if self.before_step is not None:
            self.before_step(step, loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        if self.after_step is not None:
            self.after_step(step, loss)


def adam(work: Work) -> Contender:
    optimizer = work.adamw(work.lr)
    return Contender(optimizer, work.scheduler(optimizer), rate=lambda: work.lr)


def auto(work: Work) -> Contender:
    """No rate given, no warm-up, no stages. The optimizer's own rate says nothing: there is one group."""
    work.warmup = 0
    optimizer = work.adamw(1.0 if work.lr is None else work.lr)
    scheduler = work.scheduler(optimizer)
    config, bench = FastForwardConfig(interval=None, learning_rate="auto"), work.bench
    ff = FastForward(bench.model, optimizer, bench.validation, config, scheduler=scheduler)
    rates, cosines, rise, undos, rising = [ff.learning_rate], [], 0, 0, True

    def after_step(step: int, loss: float) -> None:
        nonlocal rise, undos, rising
        rates.append(ff.learning_rate)
        cosines.append(ff.alignment)
        undos += rising and rates[-1] < rates[-2]
        rising = ff.rising
        rise += rising

    def report() -> dict[str, Any]:
        return {
            "rise": rise,
            "peak": max(rates),
            "undos": undos,
            "rates": [float(f"{rate:.4g}") for rate in rates[1:]],
            "cosines": [None if c is None else round(c, 4) for c in cosines],
        }

    return Contender(
        optimizer, scheduler, after_step, rate=lambda: ff.learning_rate, report=report, close=ff.detach
    )


def fast_forward(work: Work) -> Contender:
    """The paper's procedure with our search, at the rate that is given; stages are charged."""
    optimizer, bench = work.adamw(work.lr), work.bench
    scheduler = work.scheduler(optimizer)
    ff = FastForward(bench.model, optimizer, bench.validation, FastForwardConfig(), scheduler=scheduler)
    stages = 0

    def after_step(step: int, loss: float) -> None:
        nonlocal stages
        if len(ff.stages) > stages:
            work.charge(flops=sum(stage.flops for stage in ff.stages[stages:]))
            stages = len(ff.stages)

    def report() -> dict[str, Any]:
        return {"stages": len(ff.stages)}

    return Contender(optimizer, scheduler, after_step, rate=lambda: work.lr, report=report, close=ff.detach)


def by_hidden_size(work: Work) -> Contender:
    """Thinking Machines' rule of ``tinker_cookbook``, for models of Llama's family.

    5e-5 · (2000 / hidden size)^0.781; ten times that where adapters train, and for LoRA times 32 / α, their α
    being 32.
    """
    model = work.bench.model
    lr = 5e-5 * (2000 / model.config.hidden_size) ** 0.781
    if (adapters := getattr(model, "peft_config", None)) is not None:
        lr *= 10 * 32 / getattr(adapters["default"], "lora_alpha", 32)
    optimizer = work.adamw(lr)
    return Contender(optimizer, work.scheduler(optimizer), rate=lambda: lr)


def swept(work: Work) -> Contender:
    """Adam at the best of three rates: each trains for a sixth of the budget, then the best begins anew.

    The best is the one whose loss on the validation examples is lowest, which is charged as well.
    """
    bench, sixth, losses = work.bench, work.total // 6, {}
    for lr in DECADES:
        work.reset()
        trial = Work(bench, sixth, work.schedule, lr, work.warmup)
        contender = adam(trial)
        for step in range(sixth):
            loss = bench.model(**bench.batch(step)).loss
            loss.backward()
            contender.step(step, loss.item())
        loss = float(bench.validation())
        losses[lr] = loss if math.isfinite(loss) else math.inf
        work.charge(forwards=1)
        work.charge(flops=trial.budget)
    work.reset()
    work.lr = min(losses, key=losses.get)
    return adam(work)


CONTENDERS: dict[str, Callable[[Work], Contender]] = {
    "adam": adam,
    "auto": auto,
    "Fast Forward": fast_forward,
    "Thinking Machines": by_hidden_size,
    "sweep of 3": swept,
}
