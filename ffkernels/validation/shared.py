"""The validation loss of several processes: each runs its shard, all get the whole set's loss.

    L = Σ over ranks (Σ NLL of its shard) / Σ over ranks (its labelled tokens)
    S = the sums by example of rank 0's shard, then of rank 1's, …, each in the order of its micro-batches

Under DDP a rank without examples has nothing to run. Under FSDP2 every forward gathers parameters from all
ranks, so all run equally many, the idle ones a short one for company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ffkernels.ranks.ranks import Ranks
from ffkernels.ranks.shards import shard_evenly, shard_examples
from ffkernels.validation.batches import Example
from ffkernels.validation.causal_lm import CausalLM
from ffkernels.validation.fast import LabelledLoss, token_limit
from ffkernels.validation.forward_price import forward_price
from ffkernels.validation.generic import ModelLoss, size_of
from ffkernels.validation.mean import Mean
from ffkernels.validation.micro_batches import plan_micro_batches, read_together

__all__ = ["SharedLoss", "shared_function", "shared_labelled_loss", "shared_model_loss"]


# What an idle rank runs for company: two tokens, of which one predicts the other.
_SHORTEST = Example(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


class SharedLoss:
    """The loss over all ranks: calling it, on all of them, returns the same 0-dim float64 tensor on each.

    Args:
        ranks: those that share the examples.
        local: what this rank runs; returns the sum over its shard, 0-dim.
        weight: how many targets that sum is over.
        scored, rows: targets and rows of all ranks together.
        measured: as ``local``, and the sums by example of this rank's shard.
        counts: of each rank in turn, the tokens of each of its examples, in the order of those sums.
    """

    def __init__(
        self,
        ranks: Ranks,
        local: Callable[[], torch.Tensor],
        weight: int,
        device: torch.device,
        scored: int = 0,
        rows: int = 0,
        measured: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
        counts: Sequence[Sequence[int]] = (),
    ) -> None:
        self.ranks, self.local, self.weight, self.device = ranks, local, weight, device
        self.scored, self.rows = scored, rows
        self._measured, self._shares = measured, [len(shard) for shard in counts]
        self.example_counts = self.example_tokens = None
        if measured is not None:
            self.example_counts = [n for shard in counts for n in shard]
            self.example_tokens = torch.tensor(self.example_counts, dtype=torch.float64, device=device)

    def __call__(self) -> torch.Tensor:
        mean = self.ranks.mean(lambda: (self.local(), self.weight))
        return torch.tensor(mean, dtype=torch.float64, device=self.device)

    def measure(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, and S of all ranks, the same on each."""

        def mine() -> tuple[float, int, list[float] | None]:
            total, sums = read_together(*self._measured())
            return total, self.weight, sums

        mean, sums = self.ranks.mean_with_sums(mine, self._shares)
        both = torch.tensor([mean, *(sums or ())], dtype=torch.float64, device=self.device)
        return both[0], None if sums is None else both[1:]


def shared_labelled_loss(
    ranks: Ranks, lm: CausalLM, examples: Sequence[Example], max_tokens: int, device: torch.device
) -> SharedLoss:
    """The fast path over the ranks."""
    lengths = [example.computed for example in examples]
    limit, price = token_limit(lm, max_tokens, device), forward_price(lm, device)
    shards = shard_examples(lengths, ranks.size, limit, price)
    plans = [plan_micro_batches([lengths[i] for i in shard], limit, price) for shard in shards]
    mine = [examples[i] for i in shards[ranks.rank]]
    local = LabelledLoss(lm, mine, max_tokens=max_tokens, device=device) if mine else None
    idle, company = 0, None
    if ranks.forward_is_collective:
        idle = max(map(len, plans)) - len(plans[ranks.rank])
        company = LabelledLoss(lm, [_SHORTEST], max_tokens=max_tokens, device=device)

    def total() -> torch.Tensor:
        own = torch.zeros((), dtype=torch.float64, device=device)
        if local is not None:
            own = local() * local.scored
        keep_company()
        return own

    def measured() -> tuple[torch.Tensor, torch.Tensor]:
        own, sums = torch.zeros((), dtype=torch.float64, device=device), None
        if local is not None:
            loss, sums = local.measure()
            own = loss * local.scored
        keep_company()
        return own, own.new_zeros(0) if sums is None else sums

    def keep_company() -> None:
        for _ in range(idle):
            company()

    counts = [
        [examples[shard[i]].scored for group in groups for i in group]
        for shard, groups in zip(shards, plans, strict=True)
    ]
    weight = local.scored if local else 0
    return SharedLoss(ranks, total, weight, device, sum(map(sum, counts)), len(examples), measured, counts)


def shared_model_loss(
    ranks: Ranks, model: nn.Module, batches: list[dict[str, Any]], device: torch.device, mean: Mean
) -> SharedLoss:
    """The generic path over the ranks: whole batches, as they were given."""
    local = ModelLoss(model, batches, device, mean)
    scored, rows = local.scored, local.rows
    shards = shard_evenly([size_of(batch) for batch in local.batches], ranks.size)
    forwards = max(map(len, shards)) if ranks.forward_is_collective else 0
    local.keep(shards[ranks.rank], forwards)
    return SharedLoss(ranks, local.total, local.scored, device, scored, rows)


def shared_function(ranks: Ranks, function: Callable[[], torch.Tensor], device: torch.device) -> SharedLoss:
    """The mean of what a user's loss function returns on each rank."""
    return SharedLoss(ranks, function, 1, device)
