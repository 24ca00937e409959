"""One stage on several ranks: the examples shared out, or several τ at once?

    python -m benchmarks.stages.search_on_ranks --out benchmarks/results

    shared    every τ is validated by all ranks, each running its part of the examples (what the library does)
    apart     every rank validates all examples, at a τ of its own: `TauRounds`, a prototype that lives here

Two processes over gloo, one thread each, train the same LoRA adapter of the embedded model on the same
batches and search along the last of six updates in both ways, in turn. Both move weights alike, by W₀ + τ·Δ.
Then, of the same stages and with the losses of the whole set, rounds are counted that larger numbers of ranks
would need. What both ways cost there is arithmetic, in forwards of the whole set:

    shared    evaluations · (the slowest rank's share of a forward)      apart    rounds

with the planner's own model of a forward, c · tokens + f · forwards (`ranks/shards.py`), f = 48 c for a CPU
and 512 c for a GPU, for examples as long as these, 4 and 16 times as long.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import RESULTS, TASKS, record, tables
from benchmarks.stages import ranks as processes
from benchmarks.timing import seconds_of
from ffkernels import ValidationLoss
from ffkernels.ranks.ranks import LOSS, Ranks
from ffkernels.search.search import REFINE_TOLERANCE, make_search
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import open_session
from ffkernels.validation.fast import LabelledLoss

CPU = torch.device("cpu")
STEPS, MAX_TAU = 6, 1024
RANKS = (2, 4, 8, 16, 32)
LONGER = (1, 4, 16)


class TauRounds:
    """A bracket search that gets ``width`` losses at a time.

    Doublings from 0 on, ``width`` of them in a round; inside the bracket the parabola's vertex and places
    around it. It ends as `ParabolicSearch` does: by the same tolerance on what the parabola promises plus the
    larger of its last two errors, or when no integer is left.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.losses: dict[int, float] = {}
        self.rounds = 0
        self._predicted: dict[int, float] = {}

    @property
    def best_tau(self) -> int:
        return min(self.losses, key=lambda tau: (self.losses[tau], tau))

    def propose(self) -> list[int]:
        """The next round's τ, at most ``width``; none when the search has ended."""
        if not self.losses:
            return self._doublings(0)
        best, known = self.best_tau, sorted(self.losses)
        if best == known[-1]:
            return self._doublings(max(1, 2 * best)) if best < MAX_TAU else []
        c = known[known.index(best) + 1]
        a = known[known.index(best) - 1] if best else 0
        inside = [tau for tau in range(a + 1, c) if tau != best]
        if not inside:
            return []
        if not best:  # between no step and one: halves of what is left
            return self._spread(inside, inside[len(inside) // 2])
        fa, fb, fc = (self.losses[tau] for tau in (a, best, c))
        left, right = (fb - fa) / (best - a), (fc - fb) / (c - best)
        curvature = (right - left) / (c - a)

        def parabola(tau: int) -> float:
            return fb + (tau - best) * (left + curvature * (tau - a))

        middle = (a + c) // 2
        if 0.0 < curvature < math.inf:
            vertex = 0.5 * (a + best) - 0.5 * left / curvature
            middle = min(max(math.floor(vertex + 0.5), a + 1), c - 1)
            misses = [abs(self.losses[tau] - loss) for tau, loss in list(self._predicted.items())[-2:]]
            wrong = max(misses) if len(misses) == 2 else math.inf
            if fb - parabola(middle) + wrong <= REFINE_TOLERANCE * (self.losses[0] - fb):
                return []
        chosen = self._spread(inside, middle)
        self._predicted |= {tau: parabola(tau) for tau in reversed(chosen)}
        return chosen

    def observe(self, losses: dict[int, float]) -> None:
        self.losses |= losses
        self.rounds += 1

    def _doublings(self, first: int) -> list[int]:
        taus = [first]
        while len(taus) < self.width and taus[-1] < MAX_TAU:
            taus.append(max(1, 2 * taus[-1]))
        return list(dict.fromkeys(min(tau, MAX_TAU) for tau in taus))

    def _spread(self, inside: list[int], middle: int) -> list[int]:
        """``middle`` and places evenly around it, the longer side first."""
        low, high = inside[0], inside[-1]
        stride = max(1, (high - low + 1) // (self.width + 1))
        chosen = [middle] if middle in inside else []
        for k in range(1, high - low + 2):
            sides = (k * stride, -k * stride) if high - middle >= middle - low else (-k * stride, k * stride)
            chosen += [middle + offset for offset in sides if middle + offset in inside]
            if len(chosen) >= self.width:
                break
        return list(dict.fromkeys(chosen))[: self.width]


def in_order(loss: Callable[[int], float]) -> Any:
    """The library's search, one τ after the other."""
    search = make_search("parabolic", MAX_TAU)
    while (tau := search.propose()) is not None:
        search.observe(tau, loss(tau))
    return search


def stage_of(config: TrainConfig, repeats: int) -> dict[str, Any]:
    """Train up to the stage, search it both ways; the same on every rank."""
    with open_session(config) as session:
        weights = session.trainable
        for step in range(STEPS):
            before = [w.detach().clone() for w in weights]
            session.step(step)
        after = [w.detach().clone() for w in weights]
        delta = [a - b for a, b in zip(after, before, strict=True)]
        examples = session.task.validation
        validation = ValidationLoss(session.model, examples, collator=session.collator)
        rows = validation.rows
        whole = LabelledLoss(validation.causal_lm, rows, max_tokens=2048, device=CPU)
        ranks = Ranks(CPU)

        @torch.no_grad()
        def move(tau: int) -> None:
            for w, a, d in zip(weights, after, delta, strict=True):
                torch.add(a, d, alpha=tau, out=w)

        def shared(tau: int) -> float:
            move(tau)
            return float(validation())

        def in_rounds() -> TauRounds:
            search = TauRounds(ranks.size)
            while taus := search.propose():
                mine, loss = taus[ranks.rank] if ranks.rank < len(taus) else None, math.nan
                if mine is not None:
                    move(mine)
                    loss = float(validation.evaluator.run(whole.evaluate))
                found = ranks.exchange(LOSS, loss)
                search.observe({tau: row.a for tau, row in zip(taus, found, strict=False)})
            return search

        ways = {"shared": lambda: in_order(shared), "apart": in_rounds}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        ends: dict[str, Any] = {}
        for _ in range(repeats):
            for name, way in ways.items():
                ranks.exchange(LOSS)  # together
                seconds[name].append(seconds_of(lambda name=name, way=way: ends.update({name: way()})))
        one, several = ends.values()
        found = {
            "model": config.model,
            "task": config.task,
            "lr": config.lr,
            "examples": len(rows),
            "lengths": [row.computed for row in rows],
            "shared": {"tau": one.best_tau, "loss": one.best_loss, "evaluations": len(one.losses)},
            "apart": {
                "tau": several.best_tau,
                "loss": several.losses[several.best_tau],
                "rounds": several.rounds,
                "evaluations": len(several.losses),
            },
            "samples": seconds,
            "loss_before": one.losses[0][1],
        }
        for name, samples in seconds.items():
            found[name]["seconds"] = median(samples)
        if ranks.rank == 0:
            found["more_ranks"] = more_ranks(
                lambda tau: (move(tau), float(validation.evaluator.run(whole.evaluate)))[1]
            )
        dist.barrier()
        return found


def more_ranks(loss: Callable[[int], float]) -> list[dict[str, int]]:
    """The rounds of the prototype with more ranks, on this stage's losses."""
    known: dict[int, float] = {}
    rows = []
    for size in RANKS:
        search = TauRounds(size)
        while taus := search.propose():
            known |= {tau: loss(tau) for tau in taus if tau not in known}
            search.observe({tau: known[tau] for tau in taus})
        row = {"ranks": size, "tau": search.best_tau, "rounds": search.rounds}
        rows.append({**row, "evaluations": len(search.losses)})
    return rows


def arithmetic(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both ways' cost in forwards of the whole set, medians over the stages."""
    rows = []
    for longer in LONGER:
        for i, size in enumerate(RANKS):
            row: dict[str, Any] = {"times_as_long": longer, "ranks": size}
            row["apart"] = median(stage["more_ranks"][i]["rounds"] for stage in stages)
            for name, device in (("cpu", "cpu"), ("gpu", "cuda")):
                scaled = [[longer * length for length in stage["lengths"]] for stage in stages]
                shares = [processes.share(lengths, size, device)[-1] for lengths in scaled]
                costs = zip(shares, stages, strict=True)
                row[f"share_{name}"] = median(shares)
                row[f"shared_{name}"] = median(s * stage["shared"]["evaluations"] for s, stage in costs)
            rows.append(row)
    return rows


def cells() -> list[TrainConfig]:
    common = {"device": "cpu", "threads": 1, "test_examples": 16, "steps": STEPS, "warmup_steps": 0}
    return [TrainConfig(**common, task=task, lr=lr, batch_size=64) for task in TASKS for lr in (1e-4, 3e-4)]


def rank_main(out: Path, repeats: int) -> None:
    stages = []
    for config in cells():
        stages.append(stage_of(config, repeats))
        if dist.get_rank() == 0:
            out.write_text(json.dumps(stages))


def main() -> None:
    module, name = "stages.search_on_ranks", "search_on_ranks_cpu"
    parser = record.parser(module, __doc__, out=RESULTS, name=name)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        return processes.as_rank(lambda: rank_main(options.rank_of, options.repeats))
    head = record.provenance(module, kind="search-on-ranks")
    stages = processes.start(module, 2, "--repeats", options.repeats)
    for stage in stages:
        print(stage["task"], stage["lr"], stage["shared"], stage["apart"])
    rows = arithmetic(stages)
    print(tables.aligned(list(rows[0]), [[f"{value:.2f}" for value in row.values()] for row in rows], 0))
    print(record.write({**head, "stages": stages, "arithmetic": rows}, options.out, name))


if __name__ == "__main__":
    main()
