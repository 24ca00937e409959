"""FLOPs of a run in two conventions, side by side.

                        paper                                    measured
    training batch      3 × forward                              forward + backward as executed
    optimizer step      –                                        12 per trainable weight (Adam)
    validation          forward                                  forward
    weight move         1 per element                            2 per element (a multiply and an add)

*Paper* is the convention of the Fast Forward paper: a backward pass is charged as two forwards. With LoRA
it costs little more than one, because the frozen weights need no weight gradients; so the paper's
convention makes training dearer than it is and flatters Fast Forward, whose validations are forwards only.
*Measured* counts the products of a real forward and backward. Whoever quotes a saving should
quote it in *measured*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ffkernels.reporting.apart import apart
from ffkernels.stage.record import Stage
from ffkernels.validation.flops import count_flops, counter

__all__ = ["FlopMeter", "Flops", "count_flops", "flops_of", "shapes"]

# Adam per weight: two moments, two bias corrections, a square root, a division and the update.
ADAM_FLOPS = 12
PAPER_MOVE_FLOPS = 1
MEASURED_MOVE_FLOPS = 2

LossFn = Callable[[nn.Module, Any], torch.Tensor]


class Flops(NamedTuple):
    """One amount of work in both conventions."""

    paper: int
    measured: int


class FlopMeter:
    """Adds up a run's FLOPs in both conventions.

    A training batch is measured by one extra forward and backward, once per batch shape; keep it off the
    clock. It leaves the model, its gradients, its buffers, the train/eval modes and torch's random numbers
    as they were.

    Args:
        trainable_numel: how many weights the optimizer updates and Fast Forward moves.

    Attributes:
        paper, measured: the totals so far.
    """

    def __init__(self, trainable_numel: int) -> None:
        if isinstance(trainable_numel, bool) or not isinstance(trainable_numel, int) or trainable_numel < 0:
            raise ValueError(
                f"trainable_numel is {trainable_numel!r}; it must be an int ≥ 0, the trainable weights"
            )
        self.trainable_numel = trainable_numel
        self.paper = 0
        self.measured = 0
        self._batches: dict[Any, Flops] = {}

    @property
    def totals(self) -> dict[str, int]:
        """``{"paper": …, "measured": …}``, as the run log has it."""
        return {"paper": self.paper, "measured": self.measured}

    def training_step(self, model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> Flops:
        """Add one training batch (one micro-batch where gradients accumulate) and return what it costs.

        Args:
            model: the model as it trains.
            batch: its inputs; the cost is measured once per combination of tensor shapes and dtypes.
            loss_fn: ``loss_fn(model, batch) -> scalar``; ``model(**batch).loss`` when not given.
        """
        key = shapes(batch)
        if key not in self._batches:
            loss = loss_fn or _own_loss
            with torch.enable_grad():
                self._batches[key] = flops_of(model, lambda: loss(model, batch))
        return self.add(self._batches[key])

    def optimizer_step(self) -> Flops:
        """Add one Adam step: nothing in the paper's convention."""
        return self.add(Flops(0, ADAM_FLOPS * self.trainable_numel))

    def stage(self, stage: Stage, moved: int | None = None) -> Flops:
        """Add one Fast Forward stage: its validations, and one weight move after each of them.

        ``moved``: elements of one weight move, where they are not the trainable ones.
        """
        if stage.flops == 0:  # nothing was searched, or the stage was interrupted
            return Flops(0, 0)
        moved = stage.evaluations * (self.trainable_numel if moved is None else moved)
        validations = stage.flops - MEASURED_MOVE_FLOPS * moved
        if validations < 0:
            raise ValueError(
                f"the stage has {stage.flops} FLOPs, fewer than its {stage.evaluations} moves of {moved} "
                "weights in all; the meter's trainable_numel must be FastForward's"
            )
        return self.add(Flops(validations + PAPER_MOVE_FLOPS * moved, stage.flops))

    def state_dict(self) -> dict[str, int]:
        """The totals; shapes are measured again after a resume."""
        return self.totals

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from ``state_dict()``."""
        missing = {"paper", "measured"} - set(state)
        if missing:
            raise ValueError(
                f"the meter's state lacks {sorted(missing)}; it must come from FlopMeter.state_dict()"
            )
        self.paper, self.measured = int(state["paper"]), int(state["measured"])

    def add(self, flops: Flops) -> Flops:
        """Add work that was counted elsewhere."""
        self.paper += flops.paper
        self.measured += flops.measured
        return flops


def _own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    loss = model(**batch).loss
    if loss is None:
        raise ValueError(
            "the model returned no loss: put labels into the batch, or pass loss_fn(model, batch)"
        )
    return loss


def flops_of(model: nn.Module, forward: Callable[[], torch.Tensor | None]) -> Flops:
    """What one pass costs: ``forward``, and the backward pass from what it returns, if that takes gradients.

    They run apart from the model's training, which they leave as it was.
    """
    with apart(model), counter() as counted:
        result = forward()
        before = counted.total
        if result is None or not result.requires_grad:
            return Flops(before, before)
        # Not autograd.grad(): through reentrant checkpointing it finds no gradients and counts nothing.
        result.backward()
        # The paper charges a backward pass as two forwards.
        return Flops(3 * before, counted.total)


def shapes(batch: Any) -> Any:
    """The shapes and dtypes of the tensors in ``batch``, hashable."""
    if isinstance(batch, torch.Tensor):
        return tuple(batch.shape), batch.dtype
    if isinstance(batch, Mapping):
        return tuple(sorted((str(name), shapes(value)) for name, value in batch.items()))
    if isinstance(batch, (list, tuple)):
        return tuple(shapes(value) for value in batch)
    return type(batch).__name__
