"""Which validation examples each rank runs, so that the slowest rank is done as early as possible.

    minimise  max over ranks  Σ over the rank's micro-batches (rows · longest + forward_cost)

Examples stay sorted by length and each rank takes a contiguous run of them: examples of one length pad
least, so the ranks with short ones take more. Every rank computes the same assignment from the lengths
alone. Beyond as many ranks as examples, the rest have nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence


def shard_examples(lengths: Sequence[int], ranks: int, max_tokens: int, forward_cost: int) -> list[list[int]]:
    """Indices of the examples of each rank; together every index exactly once.

    Args:
        lengths: tokens to compute per example.
        ranks: how many ranks share them; later ones get none where there are not enough examples.
        max_tokens: padded tokens per forward at most (one longer example is still one forward).
        forward_cost: what one more forward costs, in tokens.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ascending = [lengths[i] for i in order]
    low, high = 0, sum(ascending) + forward_cost * len(order)  # one forward per example fits always
    while low < high:
        limit = (low + high) // 2
        if _runs(ascending, limit, max_tokens, forward_cost, ranks) is None:
            low = limit + 1
        else:
            high = limit
    ends = _runs(ascending, low, max_tokens, forward_cost, ranks) or []
    starts = [0, *ends]
    shards = [order[start:end] for start, end in zip(starts, ends)]  # noqa: B905 - one start more than ends
    return shards + [[] for _ in range(ranks - len(shards))]


def _runs(
    ascending: Sequence[int], limit: int, max_tokens: int, forward_cost: int, ranks: int
) -> list[int] | None:
    """Where runs end that cost at most `limit` each, from short to long; None where `ranks` are too few.

    A run's cost only grows with each longer example, so filling every run up leaves the fewest runs.
    """
    ends: list[int] = []
    start = 0
    while start < len(ascending):
        end = _fill(ascending, start, limit, max_tokens, forward_cost)
        if end == start or len(ends) == ranks:
            return None
        ends.append(end)
        start = end
    return ends


def _fill(ascending: Sequence[int], start: int, limit: int, max_tokens: int, forward_cost: int) -> int:
    """The end of the longest run from `start` whose best cut into micro-batches costs at most `limit`."""
    best = [0]  # the least cost of the first n examples of the run
    for end in range(start, len(ascending)):
        longest, cost = ascending[end], None
        for first in range(end, start - 1, -1):
            padded = (end + 1 - first) * longest
            if first < end and padded > max_tokens:
                break
            here = best[first - start] + padded + forward_cost
            cost = here if cost is None else min(cost, here)
        if cost is None or cost > limit:
            return end
        best.append(cost)
    return len(ascending)


def shard_evenly(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of whole batches for each rank, in ascending order: the largest first, to who has least."""
    shards: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        shards[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(shard) for shard in shards]
