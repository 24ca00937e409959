"""One stage on several ranks: the examples shared out, or several τ at once?

    python benchmarks/search_on_ranks.py --out benchmarks/results

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
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import checkout  # noqa: F401  puts it on the path
import torch
import torch.distributed as dist
from bench_ranks import slowest

from ffkernels import ValidationLoss
from ffkernels.ranks.ranks import LOSS, Ranks
from ffkernels.reporting.machine import machine_info, version_info
from ffkernels.search.search import REFINE_TOLERANCE, make_search
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import open_session
from ffkernels.validation.fast import LabelledLoss
from ffkernels.validation.forward_price import forward_price

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

        def apart(search: TauRounds) -> None:
            while taus := search.propose():
                mine, loss = taus[ranks.rank] if ranks.rank < len(taus) else None, math.nan
                if mine is not None:
                    move(mine)
                    loss = float(validation.evaluator.run(whole.evaluate))
                found = ranks.exchange(LOSS, loss)
                search.observe({tau: row.a for tau, row in zip(taus, found, strict=False)})

        seconds: dict[str, list[float]] = {"shared": [], "apart": []}
        for _ in range(repeats):
            ranks.exchange(LOSS)
            begin = time.perf_counter()
            one = in_order(shared)
            seconds["shared"].append(time.perf_counter() - begin)
            several = TauRounds(ranks.size)
            ranks.exchange(LOSS)
            begin = time.perf_counter()
            apart(several)
            seconds["apart"].append(time.perf_counter() - begin)
        found = {
            "model": config.model,
            "task": config.task,
            "lr": config.lr,
            "examples": len(rows),
            "lengths": [row.computed for row in rows],
            "shared": {
                "tau": one.best_tau,
                "loss": one.best_loss,
                "evaluations": len(one.losses),
                "seconds": median(seconds["shared"]),
            },
            "apart": {
                "tau": several.best_tau,
                "loss": several.losses[several.best_tau],
                "rounds": several.rounds,
                "evaluations": len(several.losses),
                "seconds": median(seconds["apart"]),
            },
            "samples": seconds,
            "loss_before": one.losses[0][1],
        }
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
        rows.append(
            {
                "ranks": size,
                "tau": search.best_tau,
                "rounds": search.rounds,
                "evaluations": len(search.losses),
            }
        )
    return rows


def arithmetic(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both ways' cost in forwards of the whole set, medians over the stages."""
    rows = []
    for longer in LONGER:
        for i, size in enumerate(RANKS):
            row: dict[str, Any] = {"times_as_long": longer, "ranks": size}
            row["apart"] = median(stage["more_ranks"][i]["rounds"] for stage in stages)
            for name, device, limit in (("cpu", CPU, 2048), ("gpu", torch.device("cuda"), 16384)):
                shares = [share(stage["lengths"], longer, size, limit, device) for stage in stages]
                costs = zip(shares, stages, strict=True)
                row[f"share_{name}"] = median(shares)
                row[f"shared_{name}"] = median(s * stage["shared"]["evaluations"] for s, stage in costs)
            rows.append(row)
    return rows


def share(lengths: list[int], longer: int, ranks: int, limit: int, device: torch.device) -> float:
    """What is left of a forward of the whole set for the slowest rank."""
    cost, scaled = forward_price(None, device), [longer * length for length in lengths]
    (tokens, forwards), (whole, times) = (slowest(scaled, n, limit, cost) for n in (ranks, 1))
    return (tokens + cost * forwards) / (whole + cost * times)


def cells() -> list[TrainConfig]:
    common = {"device": "cpu", "threads": 1, "test_examples": 16, "steps": STEPS, "warmup_steps": 0}
    return [
        TrainConfig(**common, task=task, lr=lr, batch_size=64)
        for task in ("instruction", "medical", "chat")
        for lr in (1e-4, 3e-4)
    ]


def rank_main(out: Path, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    stages = []
    for config in cells():
        stages.append(stage_of(config, repeats))
        if dist.get_rank() == 0:
            out.write_text(json.dumps(stages))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        return rank_main(options.rank_of, options.repeats)
    now = datetime.now(timezone.utc)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "stages.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        own = ["--rank-of", str(out), "--repeats", str(options.repeats)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run([sys.executable, *launcher, __file__, *own], check=True, env=environment)
        stages = json.loads(out.read_text())
    report = {
        "kind": "search-on-ranks",
        "measured_at": now.isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/search_on_ranks.py", *sys.argv[1:]]),
        "machine": {**machine_info(), "load_before": load, "load_after": os.getloadavg()},
        "versions": version_info(),
        "note": "2 ranks of one thread each over gloo, on cores that other work was using",
        "stages": stages,
        "arithmetic": arithmetic(stages),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"search_on_ranks_cpu_{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for stage in stages:
        print(stage["task"], stage["lr"], stage["shared"], stage["apart"])
    for row in report["arithmetic"]:
        print({name: round(value, 2) for name, value in row.items()})
    print(path)


if __name__ == "__main__":
    main()
