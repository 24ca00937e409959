"""Other people's ways out of an untuned learning rate: contenders of ``benchmarks/learning_rate``. Optional.

    range tests     torch-lr-finder, Lightning's lr_find: a training run whose learning rate grows from step
                    to step; the rate where the loss fell most steeply is taken, weights are put back
    no rate at all  Prodigy and Mechanic estimate it while they train
    adjusting       transformers' GreedyLR; AdamW schedule-free, which has no schedule but keeps a rate
    in our words    what ``adjusting_rates`` has: GeN, GALA, hypergradients, ScheduleFree+

The packages do their own work here, unchanged, with their own defaults, and what they suggest is what they
say themselves; only "…, minimum / 10" reads their curve as people do. A range test is charged the training
steps that it takes, and the run has as many fewer. Named "…, free" it is charged nothing: what its
suggestion is worth, whatever it costs.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from math import log10
from typing import Any

import torch
from torch import nn

from benchmarks.learning_rate.contenders import Contender, Work
from benchmarks.peers.adjusting_rates import HYPERGRADIENT_BETAS, gala, gen, hypergradient, schedule_free_plus

# What is imported, the name under which it is installed, and how the names of its contenders begin.
PACKAGES = {
    "torch_lr_finder": ("torch-lr-finder", "torch-lr-finder"),
    "lightning": ("lightning", "lightning"),
    "prodigyopt": ("prodigyopt", "prodigy"),
    "schedulefree": ("schedulefree", "schedule-free"),
    "mechanic_pytorch": ("mechanic-pytorch", "mechanic"),
}


def package(module: str) -> Any:
    """The module; ImportError with the command that installs it where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        name, _ = PACKAGES[module.partition(".")[0]]
        raise ImportError(f"this contender needs the package {name} ({error}): pip install {name}") from error


class Lossy(nn.Module):
    """The bench's model as a function from the number of a step to the loss of that step's batch."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.model, self._batch = work.bench.model, work.bench.batch

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        return self.model(**self._batch(int(step))).loss


@contextmanager
def silent() -> Iterator[None]:
    """Without progress bars, hints and notes."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(redirect_stderr(StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def with_torch_lr_finder(work: Work, steps: int = 100, *, minimum: bool = False) -> tuple[float, int]:
    """The rate that torch-lr-finder suggests, and the training steps it took.

    From 1e-7, as in its examples, to 10, its default, in ``steps`` steps at most; its default is 100.
    ``minimum``: not its suggestion, but a tenth of the rate at which its smoothed loss is lowest.
    """
    finder_of = package("torch_lr_finder")
    from matplotlib.figure import Figure

    class Steps(finder_of.TrainDataLoaderIter):
        def inputs_labels_from_batch(self, step: torch.Tensor) -> tuple[torch.Tensor, int]:
            return step, 0

    loader = torch.utils.data.DataLoader(range(steps), batch_size=1)
    with silent():
        finder = finder_of.LRFinder(Lossy(work), work.adamw(1e-7), lambda loss, label: loss)
        finder.range_test(Steps(loader), end_lr=10, num_iter=steps)
        _, lr = finder.plot(ax=Figure().subplots())
    rates, losses = finder.history["lr"], finder.history["loss"]
    if minimum:
        lr = 0.1 * rates[losses.index(min(losses))]
    return float(lr), len(rates)


def with_lightning(work: Work, steps: int = 100) -> tuple[float, int]:
    """The rate that Lightning's ``Tuner.lr_find`` suggests, and the training steps it took.

    From 1e-8 to 1 in ``steps`` steps at most: its defaults.
    """
    pl = package("lightning.pytorch")
    tuner = package("lightning.pytorch.tuner")

    class Tuned(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.lossy, self.lr = Lossy(work), 1e-8

        def training_step(self, step: torch.Tensor, index: int) -> torch.Tensor:
            return self.lossy(step)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.adamw(self.lr)

    tuned = Tuned()
    with silent(), tempfile.TemporaryDirectory() as folder:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options = {**dict.fromkeys(quiet, False), "default_root_dir": folder}
        trainer = pl.Trainer(accelerator="cpu", devices=1, **options)
        loader = torch.utils.data.DataLoader(range(steps), batch_size=1)
        finder = tuner.Tuner(trainer).lr_find(tuned, loader, num_training=steps)
        lr = finder.suggestion()
    if lr is None:
        raise ValueError("Lightning's lr_find had too few steps for a suggestion")
    return float(lr), len(finder.results["lr"])


def range_test(
    work: Work, suggest: Callable[..., tuple[float, int]], *, free: bool = False, **options: Any
) -> Contender:
    """AdamW, with the run's schedule, at what a range test suggests.

    It may take the 100 steps that are both packages' default, and at most a fifth of the run: it would else
    leave nothing of a short one.
    """
    work.reset()
    lr, steps = suggest(work, **{"steps": min(100, work.steps // 5), **options})
    if not free:
        work.charge(flops=sum(work.bench.flops(step) for step in range(steps)))
    work.reset()
    optimizer = work.adamw(lr)
    return Contender(optimizer, work.scheduler(optimizer), rate=lambda: lr)


def prodigy(work: Work) -> Contender:
    """Prodigy at its learning rate of 1, whatever the run's is; the run's schedule multiplies it.

    ``safeguard_warmup`` as its authors advise for schedules that begin with a warm-up.
    """
    settings = {"lr": 1.0, "safeguard_warmup": work.warmup > 0}
    optimizer = package("prodigyopt").Prodigy(work.bench.trainable, **settings)

    def rate() -> float:
        return float(optimizer.param_groups[0]["d"])

    return Contender(optimizer, work.scheduler(optimizer), rate=rate)


def mechanic(work: Work) -> Contender:
    """Mechanic around AdamW with its defaults, at the learning rate of 1 of its README.

    It scales AdamW's updates; the run's schedule multiplies them first.
    """
    made = package("mechanic_pytorch").mechanize(torch.optim.AdamW)
    optimizer = made(work.bench.trainable, lr=1.0, weight_decay=0.0)

    def rate() -> float | None:
        state = optimizer.state.get("_mechanic")
        return float(state["s"].sum()) if state else None

    return Contender(optimizer, work.scheduler(optimizer), rate=rate)


def schedule_free(work: Work) -> Contender:
    """AdamWScheduleFree with its own warm-up and no schedule; tested at its averaged weights.

    Where the run has no rate, at the package's default of 0.0025.
    """
    lr = {} if work.lr is None else {"lr": work.lr}
    optimizer = package("schedulefree").AdamWScheduleFree(
        work.bench.trainable, warmup_steps=work.warmup, **lr
    )
    optimizer.train()

    @contextmanager
    def averaged() -> Iterator[None]:
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()

    return Contender(optimizer, evaluating=averaged)


def greedy(work: Work, *, validating: bool = False) -> Contender:
    """AdamW under transformers' GreedyLR with its defaults, which is told a loss after every step.

    ``validating``: the loss on the validation examples, as ``Trainer`` does when it evaluates, and charged;
    else the training loss, which is there for nothing. Where the run has no rate it begins at the 5e-5 of
    ``TrainingArguments``.
    """
    try:
        from transformers.optimization import GreedyLR
    except ImportError as error:
        raise ImportError(
            "this contender needs a transformers that has GreedyLR: pip install -U transformers"
        ) from error
    optimizer = work.adamw(5e-5 if work.lr is None else work.lr)
    scheduler = GreedyLR(optimizer)

    def after_step(step: int, loss: float) -> None:
        if validating:
            loss = float(work.bench.validation())
            work.charge(forwards=1)
        scheduler.step(loss)

    def rate() -> float:
        return float(optimizer.param_groups[0]["lr"])

    return Contender(optimizer, after_step=after_step, rate=rate)


EVERY: dict[str, Callable[[Work], Contender]] = {
    "torch-lr-finder": partial(range_test, suggest=with_torch_lr_finder),
    "torch-lr-finder, free": partial(range_test, suggest=with_torch_lr_finder, free=True),
    "torch-lr-finder, minimum / 10, free": partial(
        range_test, suggest=with_torch_lr_finder, free=True, minimum=True
    ),
    "lightning": partial(range_test, suggest=with_lightning),
    "lightning, free": partial(range_test, suggest=with_lightning, free=True),
    "prodigy": prodigy,
    "mechanic": mechanic,
    "schedule-free": schedule_free,
    "greedy": greedy,
    "greedy, validating": partial(greedy, validating=True),
    "gen": gen,
    "gala": gala,
    "schedule-free+": schedule_free_plus,
    **{
        f"hypergradient 1e{round(log10(beta))}": partial(hypergradient, beta=beta)
        for beta in HYPERGRADIENT_BETAS
    },
}
MISSING = {starts: name for module, (name, starts) in PACKAGES.items() if find_spec(module) is None}
# Those that can run here.
PEERS = {name: make for name, make in EVERY.items() if name.partition(",")[0] not in MISSING}
if MISSING:
    print(f"left out: {', '.join(MISSING)}; pip install {' '.join(MISSING.values())}", file=sys.stderr)
