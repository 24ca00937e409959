"""Shards of the validation set: complete, disjoint, and as balanced as contiguous runs can be."""

import itertools
import random

import pytest

from ffkernels.ranks.shards import shard_evenly, shard_examples
from ffkernels.validation.micro_batches import plan_micro_batches


def cost(lengths, shard, max_tokens, forward_cost):
    mine = [lengths[i] for i in shard]
    groups = plan_micro_batches(mine, max_tokens, forward_cost) if mine else []
    return sum(len(group) * max(mine[i] for i in group) + forward_cost for group in groups)


def lengths_of(seed, n, longest=200):
    draw = random.Random(seed)
    return [draw.randint(1, longest) for _ in range(n)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 32, 40, 1024])
@pytest.mark.parametrize("n", [0, 1, 7, 32])
def test_every_example_is_run_once(n, ranks):
    shards = shard_examples(lengths_of(n, n), ranks, 2048, 48)
    assert len(shards) == ranks
    assert sorted(itertools.chain(*shards)) == list(range(n))
    assert sum(map(bool, shards)) <= min(n, ranks)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_tokens", [100, 2048])
@pytest.mark.parametrize("forward_cost", [0, 48, 512])
def test_the_slowest_rank_is_as_fast_as_the_best_contiguous_cut(seed, max_tokens, forward_cost):
    lengths, ranks = lengths_of(seed, 9), 3
    order = sorted(range(9), key=lengths.__getitem__)
    best = min(
        max(cost(lengths, order[a:b], max_tokens, forward_cost) for a, b in ((0, i), (i, j), (j, 9)))
        for i in range(10)
        for j in range(i, 10)
    )
    shards = shard_examples(lengths, ranks, max_tokens, forward_cost)
    assert max(cost(lengths, shard, max_tokens, forward_cost) for shard in shards) == best


def test_two_ranks_halve_the_work_of_thirty_two_examples():
    lengths = lengths_of(0, 32)
    alone = cost(lengths, range(32), 2048, 48)
    shards = shard_examples(lengths, 2, 2048, 48)
    assert max(cost(lengths, shard, 2048, 48) for shard in shards) < 0.56 * alone


def test_a_thousand_examples_over_a_thousand_ranks_are_quickly_assigned():
    assert shard_examples([100] * 1000, 1000, 16384, 512) == [[i] for i in range(1000)]


def test_whole_batches_go_to_who_has_least():
    shards = shard_evenly([5, 1, 4, 2, 3], 2)
    assert sorted(itertools.chain(*shards)) == list(range(5))
    assert max(sum([5, 1, 4, 2, 3][i] for i in shard) for shard in shards) == 8
    assert shard_evenly([1.0], 3) == [[0], [], []]
    assert shard_evenly([], 2) == [[], []]
