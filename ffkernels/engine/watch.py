"""Whether what Fast Forward goes by is so, seen while training runs.

StageWatch    what a stage moved stays moved: until the next optimizer step, and in it
StepWatch     the optimizer's ``step()`` is what changes the weights

    taken back = ⟨W_left − W, Δ⟩ / (τ · ⟨Δ, Δ⟩)      0: nothing, 1: all of the stage's τ·Δ

In a step the optimizer's own update may point back some of the way, since the stage went as far as it
helped: what counts there is only what is also many updates long.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ffkernels import ops
from ffkernels.engine.schedule import StageSchedule
from ffkernels.ops.notices import announce_once
from ffkernels.ranks.optimizer_wrappers import names_of, optimizer_chain
from ffkernels.ranks.ranks import UPDATE, Ranks

TOO_MUCH = 0.4  # of a stage: a Lookahead that interpolates halfway takes 0.5
UPDATES = 8.0  # back in one step; no gradient of another batch does that


class StageWatch:
    """Looks after each stage whether it is taken back; says so once and ends them.

    Args:
        optimizer: as it was given, with its wrappers.
        ranks: those that hold a shard of the weights each; None where this process holds them whole.
    """

    def __init__(self, optimizer: Any, schedule: StageSchedule, ranks: Ranks | None = None) -> None:
        self._names, self._ranks = names_of(optimizer_chain(optimizer)), ranks
        self._schedule = schedule
        self._tau = 0  # of the stage that is looked after; 0 for none

    def after_stage(self, tau: int) -> None:
        """Of which the weights are at best, moved by τ·Δ."""
        self._tau = tau

    def before_step(self, table: ops.TensorTable | None) -> None:
        """Look whether weights are as the stage left them, in best. Collective where sharded."""
        if self._tau and table is not None:
            self._look(table, "between that stage and the next optimizer step", 0.0)

    def after_step(self, table: ops.TensorTable | None) -> None:
        """Look whether the step that followed undid it; best holds the weights before that step."""
        if self._tau and table is not None:
            self._look(table, "in the optimizer step that followed it", UPDATES)
            self._tau = 0

    @torch.no_grad()
    def _look(self, table: ops.TensorTable, when: str, updates: float) -> None:
        back, whole = _products(table)
        if self._ranks is not None:
            back, whole = self._ranks.add(UPDATE, [back, whole])
        if not back > max(TOO_MUCH * self._tau, updates) * whole:
            return
        self._schedule.end()
        announce_once(
            f"stage-taken-back-{id(self)}",
            f"{back / self._tau / whole:.0%} of what a Fast Forward stage had moved was taken back {when} "
            f"({self._names}): something writes other weights over the model's, and no stage will run any "
            "more. Train without what does, such as averages that are copied back, or without Fast Forward",
        )
        self._tau = 0


def _products(table: ops.TensorTable) -> tuple[float, float]:
    """⟨best − W, Δ⟩ and ⟨Δ, Δ⟩, tensor by tensor, so that no copy of all weights is made."""
    back, whole = [], []
    for weight, best, delta in zip(table.weights, table.best, table.deltas, strict=True):
        if (weight.shape, weight.device) != (best.shape, best.device):
            return 0.0, 0.0  # it was replaced
        update = delta.float()
        back.append(((best.float() - weight.float()) * update).sum(dtype=torch.float64))
        whole.append(update.square().sum(dtype=torch.float64))
    sums = torch.stack([torch.stack(back).sum(), torch.stack(whole).sum()]).tolist()
    return sums[0], sums[1]


class StepWatch:
    """Says once where a weight changes from one gradient to the next and no step was heard of.

    Looked at after 4, 8, 16, … gradients of the smallest weight, until the first step.

    Attributes:
        hooks: removing them ends it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter]) -> None:
        self._gradients = 0
        self._first: torch.Tensor | None = None
        weight = min((w for w in weights if w.numel()), key=nn.Parameter.numel)
        self._on_weight = weight.register_post_accumulate_grad_hook(self._gradient)
        self.hooks = [self._on_weight, optimizer.register_step_pre_hook(self._step)]
        self._name = type(optimizer).__name__

    def _step(self, *args: Any) -> None:
        self._on_weight.remove()
        self._first = None

    @torch.no_grad()
    def _gradient(self, weight: torch.Tensor) -> None:
        self._gradients += 1
        if self._first is None:
            self._first = weight.detach().clone()
            return
        looks = self._gradients >= 4 and self._gradients.bit_count() == 1
        if looks and weight.shape == self._first.shape and bool((weight != self._first).any()):
            self._on_weight.remove()
            announce_once(
                f"step-unheard-{id(self)}",
                f"the weights have changed over {self._gradients} gradients, but {self._name}.step() has not "
                "been called, after which Fast Forward has its stages: something else updates them. Make "
                "FastForward with the optimizer whose step() does",
            )
