"""The validation loss of several processes: each runs its shard, all get the whole set's loss.

    L = Σ over ranks (Σ NLL of its shard) / Σ over ranks (its labelled tokens)

Under DDP a rank without examples has nothing to run. Under FSDP2 every forward gathers parameters from all
ranks, so all run equally many, the idle ones a short one for company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ffkernels.engine.causal_lm import CausalLM
from ffkernels.engine.distributed import Ranks
from ffkernels.engine.shards import shard_evenly, shard_examples
from ffkernels.engine.validation_batches import Example
from ffkernels.engine.validation_fast import LabelledLoss, forward_cost, plan, token_limit
from ffkernels.engine.validation_generic import ModelLoss, size_of

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
    """

    def __init__(
        self,
        ranks: Ranks,
        local: Callable[[], torch.Tensor],
        weight: int,
        device: torch.device,
        scored: int = 0,
        rows: int = 0,
    ) -> None:
        self.ranks, self.local, self.weight, self.device = ranks, local, weight, device
        self.scored, self.rows = scored, rows

    def __call__(self) -> torch.Tensor:
        mean = self.ranks.mean(lambda: (self.local(), self.weight))
        return torch.tensor(mean, dtype=torch.float64, device=self.device)


def shared_labelled_loss(
    ranks: Ranks, lm: CausalLM, examples: Sequence[Example], max_tokens: int, device: torch.device
) -> SharedLoss:
    """The fast path over the ranks."""
    lengths = [example.computed for example in examples]
    shards = shard_examples(lengths, ranks.size, token_limit(lm, max_tokens, device), forward_cost(device))
    mine = [examples[i] for i in shards[ranks.rank]]
    local = LabelledLoss(lm, mine, max_tokens=max_tokens, device=device) if mine else None
    idle, company = 0, None
    if ranks.forward_is_collective:
        forwards = [len(plan(lm, [lengths[i] for i in shard], max_tokens, device)) for shard in shards]
        idle = max(forwards) - forwards[ranks.rank]
        company = LabelledLoss(lm, [_SHORTEST], max_tokens=max_tokens, device=device)

    def total() -> torch.Tensor:
        own = torch.zeros((), dtype=torch.float64, device=device)
        if local is not None:
            own = local() * local.scored
        for _ in range(idle):
            company()
        return own

    scored = sum(example.scored for example in examples)
    return SharedLoss(ranks, total, local.scored if local else 0, device, scored, len(examples))


def shared_model_loss(
    ranks: Ranks, model: nn.Module, batches: list[dict[str, Any]], device: torch.device
) -> SharedLoss:
    """The generic path over the ranks: whole batches, as they were given."""
    local = ModelLoss(model, batches, device)
    scored, rows = local.scored, local.rows
    shards = shard_evenly([size_of(batch) for batch in local.batches], ranks.size)
    forwards = max(map(len, shards)) if ranks.forward_is_collective else 0
    local.keep(shards[ranks.rank], forwards)
    return SharedLoss(ranks, local.total, local.scored, device, scored, rows)


def shared_function(ranks: Ranks, function: Callable[[], torch.Tensor], device: torch.device) -> SharedLoss:
    """The mean of what a user's loss function returns on each rank."""
    return SharedLoss(ranks, function, 1, device)
