"""Find a learning rate: two steps, one line search along the second, a dozen validation losses.

    finding = find_learning_rate(model, optimizer, batches, validation)
    finding.apply(optimizer, scheduler)

``rate_search`` says which multiples of the update are tried, ``significance`` when a rise of the loss is
believed, ``optimizer_probe`` which optimizers have a learning rate in this sense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels import ops
from ffkernels.engine.causal_lm import model_device
from ffkernels.engine.distributed import several_processes
from ffkernels.engine.fast_forward import attached
from ffkernels.engine.interrupts import interrupt_later
from ffkernels.engine.optimizer_probe import require_step_sizes
from ffkernels.engine.parallelism import why_refused
from ffkernels.engine.rate_finding import (
    Finding,
    base_rates,
    every_scheduler,
    rates,
    scale_learning_rates,
    set_rates,
)
from ffkernels.engine.rate_probe import MAX_RESTARTS, RateProbe
from ffkernels.engine.run_state import RunState
from ffkernels.engine.step_hooks import on_step
from ffkernels.engine.validation import ValidationLoss
from ffkernels.engine.weights import (
    local_tensors,
    require_same_model,
    trainable_weights,
    unwrap_optimizer,
)

__all__ = ["Finding", "find_learning_rate"]

MAX_STEPS = 20  # that change nothing, since a warm-up begins at 0 or loss scaling skips them


def find_learning_rate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Any]] | Callable[[], Any],
    validation: ValidationLoss | Any,
    *,
    after: int = 2,
    keep_move: bool = False,
    schedulers: Any = None,
    impl: str = "auto",
) -> Finding:
    """Find the base learning rate for ``optimizer`` on ``model``: ``finding.lr``.

    Takes ``after`` optimizer steps, then searches the multiple s of the last update at which the validation
    loss is lowest: 0.7·s times the step's learning rate is the one to take where it stays, 1.2·s times as the
    peak of a schedule that lets it fall. The learning rate that the optimizer comes with may be orders of
    magnitude off; one that is rather too small is best.

    The run is left as it was, bit for bit: weights and buffers, optimizer, schedulers, gradients, random
    generators, train/eval flags. What your own hooks, ``step`` function or data iterator do besides, a
    gradient scaler's scale included, is not undone.

    Args:
        model: the module that trains.
        optimizer: its optimizer, or a wrapper that keeps it as ``.optimizer``.
        batches: training batches, dicts as ``model(**batch).loss`` takes them, on any device: the first
            ``after`` are used, at the base learning rate, with the model in training mode. Or a function
            without arguments that takes one whole training step of yours, ``optimizer.step()`` included:
            mixed precision, accumulation and clipping are then as in your loop.
        validation: a ``ValidationLoss``, or what makes one: held-out batches (32 examples are enough) or a
            callable ``loss_fn(model)``. On batches of a causal language model, noise is told from signal.
        after: optimizer steps, of which the last one's update is searched. SGD with momentum needs more than
            2: its first updates are shorter than those to come.
        keep_move: go on from here: the steps stay taken, the weights stay where the search found the lowest
            loss, and every learning rate, of ``schedulers`` too, is multiplied by ``finding.scale``.
        schedulers: the optimizer's scheduler or several, which a ``step`` function moves on or whose base
            learning rates are to be multiplied, and which say whether the rate will fall. Without one it is
            taken to stay; ``finding.peak`` is what to give to one that is made later and falls.
        impl: which implementation moves the weights.

    Returns:
        A ``Finding``; ``finding.apply(optimizer, schedulers)`` sets what it found. At most 20 validation
        losses, one more for each of up to 4 restarts and where training writes buffers (batch statistics);
        s from 2⁻¹⁰ to 2¹⁶, where an s at a limit shows in ``stopped_because``.

    Raises:
        ValueError: when the optimizer's update does not scale with its learning rate, when there are too few
            batches, or when the last step did not change the weights.
        TypeError: when model, optimizer or batches are not what is needed.
        RuntimeError: in a job of several processes, while the optimizer carries a FastForward, or when the
            weights are spread out in a way that cannot be moved.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(after, bool) or not isinstance(after, int) or after < 1:
        raise ValueError(f"after={after!r}: must be an integer of at least 1")
    optimizer, schedulers = _checked(model, optimizer, schedulers)
    if not isinstance(validation, ValidationLoss):
        validation = ValidationLoss(model, validation)
    weights = trainable_weights(model, optimizer)
    require_same_model(validation, weights)
    own_step = callable(batches) and not hasattr(batches, "__iter__")
    scheduled = rates(optimizer)
    state = RunState(model, optimizer, schedulers)
    kept = False
    try:
        state.take_gradients()
        step = batches if own_step else _stepping(model, optimizer, schedulers, batches, after)
        table = ops.TensorTable(local_tensors(weights), impl=impl)
        probe = RateProbe(validation, optimizer, schedulers, after)
        finding = _run(probe, table, step)
        if keep_move:
            with interrupt_later():
                scale_learning_rates(optimizer, schedulers, finding.scale / probe.applied)
                if not own_step:  # the schedulers stand where they stood, so must what they last set
                    set_rates(optimizer, [lr * finding.scale for lr in scheduled])
                kept = True
    finally:
        with interrupt_later():
            if kept:
                state.keep()
            else:
                state.restore()
    return finding


def _checked(model: nn.Module, optimizer: Any, schedulers: Any) -> tuple[torch.optim.Optimizer, list[Any]]:
    if several_processes():
        raise RuntimeError(
            "find_learning_rate works in one process: several would each search on their own batches. Find "
            "the learning rate before the job, in one process, and give it to all"
        )
    refused = why_refused(model, optimizer)
    if refused:
        raise RuntimeError(f"find_learning_rate cannot move these weights: {refused}")
    optimizer = unwrap_optimizer(optimizer)
    if attached(optimizer) is not None:
        raise RuntimeError(
            "this optimizer carries a FastForward, which would count the steps taken here; find the learning "
            'rate before attaching it, or use FastForwardConfig(learning_rate="find")'
        )
    require_step_sizes(optimizer)
    return optimizer, every_scheduler(schedulers, optimizer)


def _stepping(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedulers: list[Any], batches: Any, after: int
) -> Callable[[], Any]:
    """One training step over the batches as a function."""
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}: an iterable of at least {after} dicts is needed, one "
            "for each step, or a function that takes one training step"
        )
    given = list(islice(batches, after))
    if len(given) < after or not all(isinstance(batch, Mapping) for batch in given):
        kinds = ", ".join(type(batch).__name__ for batch in given) or "nothing"
        raise ValueError(f"batches must begin with a dict for each of the {after} steps, got {kinds}")
    # A warm-up may hold them at 0 before the first step.
    set_rates(optimizer, base_rates(optimizer, schedulers))
    if not model.training:  # else some of its modules may be in eval mode on purpose
        model.train()
    endless = cycle(given)  # it begins again where the first steps were taken back
    return lambda: _step(model, optimizer, next(endless))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any]) -> None:
    device = model_device(model)
    output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__}(**batch) returned no loss for a batch with {sorted(batch)}; give the "
            "batches labels, or pass a function that takes one training step instead"
        )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _run(probe: RateProbe, table: ops.TensorTable, step: Callable[[], Any]) -> Finding:
    """Take steps until the probe has found something, right after the step that it wanted."""
    findings: list[Finding] = []
    steps = skipped = 0

    def before(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not findings:
            probe.before_step(table)

    def behind(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        nonlocal steps
        steps += 1
        if not findings and (finding := probe.after_step(table, steps)) is not None:
            findings.append(finding)

    hooks = on_step(probe.optimizer, before, behind)
    try:
        while not findings:
            taken = steps
            step()
            skipped += steps == taken  # as gradient scalers do until their scale fits
            if skipped == MAX_STEPS:
                raise ValueError(
                    f"{MAX_STEPS} training steps did not call step() of the optimizer that was given "
                    "(gradient accumulation belongs inside of one training step)"
                )
            if steps >= MAX_STEPS + (MAX_RESTARTS + 1) * probe.after:
                raise ValueError(
                    f"{steps} steps did not change the weights: is the learning rate 0, or the gradient?"
                )
    finally:
        for hook in hooks:
            hook.remove()
    return findings[0]
