"""Find a learning rate before training: some steps of ``learning_rate="auto"``, which are then taken back.

finding = find_learning_rate(model, optimizer, batches)
finding.apply(optimizer, scheduler)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels.engine.config import FastForwardConfig
from ffkernels.engine.fast_forward import FastForward
from ffkernels.engine.optimizer_probe import require_step_sizes
from ffkernels.engine.run_state import as_before
from ffkernels.engine.scheduled_rates import ScheduledRates
from ffkernels.engine.step_hooks import on_step
from ffkernels.ops.notices import announce_once
from ffkernels.ranks.ranks import several_processes
from ffkernels.stage.weights import unwrap_optimizer
from ffkernels.validation.causal_lm import model_device


@dataclass
class Finding:
    """Where the learning rate came to, and how: of the first param group whose base rate was above 0.

    Attributes:
        lr: its learning rate after the last step.
        lr_before: its base learning rate before.
        rising: it was still rising, so more steps would have led further.
        rates: its learning rate after each step.
        alignments: c of each step (``FastForward.alignment``), None where it was not known.
        seconds: wall time.
    """

    lr: float
    lr_before: float
    rising: bool = False
    rates: list[float] = field(default_factory=list)
    alignments: list[float | None] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def scale(self) -> float:
        """What every base learning rate is to be multiplied by."""
        return self.lr / self.lr_before

    def apply(self, optimizer: torch.optim.Optimizer, schedulers: Any = None) -> None:
        """Multiply every rate by ``scale``, of optimizer and schedulers, once; RuntimeError without those."""
        rates = ScheduledRates(unwrap_optimizer(optimizer), schedulers)
        rates.require_scheduler()
        rates.scale(self.scale)


def find_learning_rate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Any]] | Callable[[], Any],
    *,
    steps: int = 20,
    schedulers: Any = None,
    impl: str = "auto",
) -> Finding:
    """Take some optimizer steps under ``learning_rate="auto"``, and read where the rate stands.

    Everything is put back, bit for bit: weights and buffers, optimizer, schedulers, gradients, random
    generators, train/eval flags. What your own hooks, step function or data iterator do besides is not.

    Args:
        model: the module that trains.
        optimizer: its optimizer, or a wrapper that keeps it as ``.optimizer``. Its rates say the ratios of
            its groups, not the size.
        batches: training batches, dicts as ``model(**batch).loss`` takes them, on any device, a fresh one for
            each step. Or a function without arguments that takes one whole training step of yours,
            ``optimizer.step()`` included: mixed precision, accumulation and clipping are as in your loop.
        steps: at least 2. The rise takes some ten, the others settle it.
        schedulers: the optimizer's scheduler or several. A step function may move them on: what is found is
            the rate that the last step had.
        impl: which implementation moves the weights.

    Raises:
        ValueError: when the update does not scale with the learning rate, or no gradient met an update.
        TypeError: when model, optimizer or batches are not what is needed, or batches too few.
        RuntimeError: in a job of several processes, while the optimizer carries a FastForward, for a
            scheduler that was not given, or when the weights are spread out so that they cannot be moved.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps={steps!r}: must be an integer of at least 2")
    if several_processes():
        raise RuntimeError('find_learning_rate works in one process; learning_rate="auto" in several, too')
    optimizer = unwrap_optimizer(optimizer)
    require_step_sizes(optimizer)
    rates = ScheduledRates(optimizer, schedulers)
    config = FastForwardConfig(learning_rate="auto", interval=None, impl=impl)
    base, begin = rates.base, perf_counter()
    with as_before(model, optimizer, rates.schedulers):
        step = batches
        if not callable(batches) or hasattr(batches, "__iter__"):
            step = _stepping(model, optimizer, batches)
            rates.set(base)  # a warm-up may hold them at 0 before the first step
        with FastForward(model, optimizer, config=config, scheduler=rates.schedulers) as ff:
            finding = _take(ff, step, steps, base)
    finding.seconds = perf_counter() - begin
    return finding


def _stepping(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any) -> Callable[[], None]:
    """One training step over the batches as a function."""
    if not model.training:  # else some of its modules may be in eval mode on purpose
        model.train()
    device, given = model_device(model), iter(batches if isinstance(batches, Iterable) else ())

    def step() -> None:
        batch = next(given, "nothing more")
        if not isinstance(batch, Mapping):
            raise TypeError(
                "batches must be a function that takes one training step, or hold a dict for each step; "
                f"this {type(batches).__name__} gave {batch!r:.80}"
            )
        output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(f"{type(model).__name__} returned no loss for a batch with {sorted(batch)}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _take(ff: FastForward, step: Callable[[], Any], steps: int, base: list[float]) -> Finding:
    group = next(i for i, rate in enumerate(base) if rate > 0)
    found = Finding(base[group], base[group])

    def note(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        found.rates.append(float(optimizer.param_groups[group]["lr"]))
        found.alignments.append(ff.alignment)

    before, behind = on_step(ff.optimizer, lambda *_: None, note)  # after ff's own
    with before, behind:
        for _ in range(2 * steps):  # loss scaling may leave out as many as it takes
            if len(found.rates) < steps:
                step()
    if not any(found.alignments) or not found.rates[-1]:
        raise ValueError(
            f"{len(found.rates)} of {steps} steps called step() of this optimizer, and no gradient met an "
            "update there: is the learning rate 0, or the gradient?"
        )
    found.lr, found.rising = found.rates[-1], ff.rising
    if found.rising:
        more = f"find_learning_rate(..., steps={2 * steps})"
        announce_once("finding-rises", f"after {steps} steps the learning rate still rises: {more}")
    return found
