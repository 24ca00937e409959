"""The validation loss of several processes: each runs its shard, all get the whole set's loss.

    L = Σ over ranks (Σ NLL of its shard) / Σ over ranks (its labelled tokens)
    S = the sums by example of rank 0's shard, then of rank 1's, …, each in the order of its micro-batches

Under DDP a rank without examples has nothing to run. Under FSDP2 every forward gathers parameters from all
ranks, so all run equally many, the idle ones a short one for company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ffkernels.ranks.ranks import Ranks
from ffkernels.ranks.shards import shard_evenly, shard_examples
from ffkernels.validation.batches import Example
from ffkernels.validation.causal_lm import CausalLM
from ffkernels.validation.evaluator import Loss
from ffkernels.validation.fast import LabelledLoss, token_limit
from ffkernels.validation.forward_price import forward_price
from ffkernels.validation.generic import FunctionLoss, ModelLoss, size_of
from ffkernels.validation.micro_batches import plan_micro_batches, read_together

# What an idle rank runs for company: two tokens, of which one predicts the other.
_SHORTEST = Example(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


class SharedLoss(Loss):
    """The loss over all ranks: evaluating it, on all of them, returns the same number on each.

    Args:
        ranks: those that share the examples.
        part: what this rank runs; returns the sum over its shard, 0-dim.
        weight: how many targets that sum is over.
        measured: as ``part``, and the sums by example of this rank's shard.
        counts: of each rank in turn, the tokens of each of its examples, in the order of those sums.
    """

    def __init__(
        self,
        ranks: Ranks,
        part: Callable[[], torch.Tensor],
        weight: int,
        device: torch.device,
        measured: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
        counts: Sequence[Sequence[int]] = (),
    ) -> None:
        self.ranks, self.part, self.weight, self.device = ranks, part, weight, device
        self._measured, self._shares = measured, [len(shard) for shard in counts]
        if measured is not None:
            self.example_counts = [n for shard in counts for n in shard]
            self.example_tokens = torch.tensor(self.example_counts, dtype=torch.float64, device=device)

    def evaluate(self) -> torch.Tensor:
        mean = self.ranks.mean(lambda: (self.part(), self.weight))
        return torch.tensor(mean, dtype=torch.float64, device=self.device)

    def measure(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, and S of all ranks, the same on each."""
        if self._measured is None:
            return self.evaluate(), None

        def mine() -> tuple[float, int, list[float] | None]:
            total, sums = read_together(*self._measured())
            return total, self.weight, sums

        mean, sums = self.ranks.mean_with_sums(mine, self._shares)
        both = torch.tensor([mean, *(sums or ())], dtype=torch.float64, device=self.device)
        return both[0], None if sums is None else both[1:]


def shared_labelled_loss(
    ranks: Ranks, lm: CausalLM, rows: Sequence[Example], max_tokens: int, device: torch.device
) -> SharedLoss:
    """The fast path over the ranks."""
    lengths = [row.computed for row in rows]
    limit, price = token_limit(lm, max_tokens, device), forward_price(lm, device)
    shards = shard_examples(lengths, ranks.size, limit, price)
    plans = [plan_micro_batches([lengths[i] for i in shard], limit, price) for shard in shards]
    mine = [rows[i] for i in shards[ranks.rank]]
    local = LabelledLoss(lm, mine, max_tokens=max_tokens, device=device) if mine else None
    weight = local.tokens if local else 0
    idle, company = 0, None
    if ranks.forward_is_collective:
        idle = max(map(len, plans)) - len(plans[ranks.rank])
        company = LabelledLoss(lm, [_SHORTEST], max_tokens=max_tokens, device=device)

    def measured(sums: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        nothing = torch.zeros(1, dtype=torch.float64, device=device)
        mine = nothing[0], nothing[1:]
        if local is not None:
            mine = local.measure() if sums else (local.evaluate(), None)
        for _ in range(idle):
            company.evaluate()
        return mine[0] * weight, mine[1]

    def part() -> torch.Tensor:
        return measured(sums=False)[0]

    counts = [
        [rows[shard[i]].scored for group in groups for i in group]
        for shard, groups in zip(shards, plans, strict=True)
    ]
    shared = SharedLoss(ranks, part, weight, device, measured, counts)
    shared.lm, shared.rows, shared.computed_tokens = lm, rows, sum(lengths)
    shared.examples, shared.tokens = len(rows), sum(map(sum, counts))
    return shared


def shared_model_loss(ranks: Ranks, loss: ModelLoss) -> SharedLoss:
    """The generic path over the ranks: whole batches, of which ``loss`` keeps this rank's."""
    whole = {name: getattr(loss, name) for name in ("examples", "tokens", "computed_tokens")}
    shards = shard_evenly([size_of(batch) for batch in loss.batches], ranks.size)
    forwards = max(map(len, shards)) if ranks.forward_is_collective else 0
    loss.keep(shards[ranks.rank], forwards)
    shared = SharedLoss(ranks, loss.total, loss.tokens, loss.device)
    vars(shared).update(whole)
    return shared


def shared_function(ranks: Ranks, loss: FunctionLoss) -> SharedLoss:
    """The mean of what a user's loss function returns on each rank."""
    return SharedLoss(ranks, loss.evaluate, 1, loss.device)
