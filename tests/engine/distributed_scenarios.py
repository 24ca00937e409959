"""What the ranks of the distributed tests do; each function runs on every rank and returns plain values."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from ffkernels.engine.distributed import LOSS, UPDATE, Ranks

CPU = torch.device("cpu")


def exchange_rows(rank, size):
    ranks = Ranks(CPU)
    rows = ranks.exchange(UPDATE, 0.1 * rank, float("nan"), -(2**62) - rank)
    return [[row.kind, row.failed, row.a, repr(row.b), row.c] for row in rows]


def mean_loss(rank, size):
    """Sums whose order of adding shows in float64."""
    ranks = Ranks(CPU)
    totals = [1e16, 1.0, -1e16, 1.0]
    mean = ranks.mean(lambda: (torch.tensor(totals[rank], dtype=torch.float64), rank + 1))
    nothing = ranks.mean(lambda: (float("inf") if rank else float("-inf"), 1))
    return [mean.hex(), repr(nothing)]


def one_raises(rank, size, who, kind):
    """Rank `who` raises in its measurement, then all go on together."""
    ranks = Ranks(CPU)
    kinds = {"RuntimeError": RuntimeError, "KeyboardInterrupt": KeyboardInterrupt}

    def measure():
        if rank in who:
            raise kinds[kind](f"rank {rank} stumbles")
        return 1.0, 1

    try:
        ranks.mean(measure)
    except BaseException as error:
        ranks.fail(error)  # as the stage around it does; must not be sent twice
        return [type(error).__name__, str(error), ranks.mean(lambda: (rank, 1))]


def one_raises_while_made(rank, size):
    ranks = Ranks(CPU)
    with ranks.together():
        if rank == 1:
            raise ValueError("no labels here")
    return "made"


def different_places(rank, size):
    Ranks(CPU).exchange(LOSS if rank else UPDATE)


def different_facts(rank, size):
    ranks = Ranks(CPU)
    ranks.agree({"interval": 6, "weights": ["a", "b"]}, "do so")
    ranks.agree({"search": "linear", "interval": 6 if rank != 1 else 8}, "give all ranks the same config")


def one_dies(rank, size, how):
    ranks = Ranks(CPU)
    ranks.mean(lambda: (1.0, 1))
    if rank == 1:
        if how == "kill":
            os.kill(os.getpid(), 9)
        raise SystemExit(3)  # leaves without a word, as sys.exit() in a user's loop does
    time.sleep(0.05)
    ranks.mean(lambda: (1.0, 1))


def a_group_of_some(rank, size):
    """Ranks 0 and 1 of three train together, rank 2 does something else."""
    group = dist.new_group([0, 1])
    if rank == 2:
        try:
            Ranks(CPU, group)
        except ValueError as error:
            return str(error)
    return Ranks(CPU, group).mean(lambda: (rank, 1))
