"""How a stage runs in several processes: the eager loop on every rank, in agreement before and after.

    prologue    Δ and max |Δ| on each rank; DDP: equal bits everywhere, FSDP2: the largest of all shards
    loop        every rank validates its shard, all get the same loss, so all take the same step
    end         τ and the losses' hash are compared

A replica that has drifted from the others is found by checksum at the start of the next stage.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ffkernels import ops
from ffkernels.engine.ladder import NO_LAUNCHES
from ffkernels.ops.notices import announce_once
from ffkernels.ranks.digests import checksum, digest
from ffkernels.ranks.ranks import DECISION, UPDATE, telling
from ffkernels.ranks.trial import NoLoss
from ffkernels.stage.eager import EagerExecutor
from ffkernels.stage.program import StageProgram
from ffkernels.validation.loss import ValidationLoss

_DRIFTED = (
    "all ranks must hold the same weights: wrap the model in DistributedDataParallel, which broadcasts them "
    "and averages gradients, before its optimizer steps"
)
_NOT_ONE_SEARCH = "this should be impossible with one loss for all ranks; please report it"


class RankExecutor(EagerExecutor):
    """One search on all ranks.

    Args:
        wanted: "auto" or "eager".
        validation: the loss, of the ranks that train the model together.
        device: where the weights are.
        sharded: each rank holds its own part of the weights (FSDP2), instead of all of them.

    Raises:
        RuntimeError: when a graph is asked for.
    """

    def __init__(
        self, wanted: str, validation: ValidationLoss, device: torch.device, *, sharded: bool
    ) -> None:
        self.ranks, self.sharded = validation.ranks, sharded
        refused = (
            f"training runs in {self.ranks.size} processes, and collectives have no place in a graph that "
            "loops; train in one process to have graphs"
        )
        if wanted not in ("auto", "eager"):
            raise RuntimeError(f'executor="{wanted}" cannot run here: {refused}; or leave it at "auto"')
        self.reason = "asked for"
        if wanted == "auto":
            self.reason = NO_LAUNCHES if device.type == "cpu" else refused
            if device.type != "cpu":
                announce_once("ranks-eager", f"Fast Forward stages run eagerly (eager): {refused}")

    def run(self, program: StageProgram) -> None:
        """As ``EagerExecutor``; what raises on one rank raises on all, and all end with the same weights."""
        with telling(self.ranks, forwards=True):
            super().run(program)
            self._agree(program)

    def measure(self, program: StageProgram, counts: list[int] | None) -> tuple[Any, torch.Tensor | None]:
        self.ranks.forgiving = self._worked
        try:
            return super().measure(program, counts)
        finally:
            self.ranks.forgiving = False

    def forgives(self, error: Exception) -> bool:
        return isinstance(error, NoLoss)

    def largest_update(self, table: ops.TensorTable) -> float:
        mine = ops.delta_absmax(table)
        bits = 0 if self.sharded else checksum([*table.delta_flats, *table.best_flats])
        rows = self.ranks.exchange(UPDATE, mine, 0.0, bits)
        if not self.sharded:
            names = {"a": "max |Δ| of the optimizer's update", "c": "the bits of the weights and the update"}
            self.ranks.agree_on_rows(rows, names, _DRIFTED)
        values = [row.a for row in rows]
        return math.nan if any(map(math.isnan, values)) else max(values)

    def _agree(self, program: StageProgram) -> None:
        losses = int(digest([[tau, loss] for tau, loss in program.search.losses]), 16) >> 1
        rows = self.ranks.exchange(DECISION, float(program.search.best_tau), 0.0, losses)
        names = {"a": "the τ that was kept", "c": "their validation losses"}
        self.ranks.agree_on_rows(rows, names, _NOT_ONE_SEARCH)
