"""The loss at every τ of real stages, and what each search makes of it.

    python -m benchmarks.stages.search_noise --curves FILE.jsonl --out benchmarks/results

About a quarter of an hour on one core that is free.

Sweeps: LoRA on the embedded model, AdamW at a constant learning rate, a stage every 6 steps. In a stage the
sums of NLL by example are measured at τ = 0, 1, 2, … to beyond the lowest loss, then more sparsely to twice
its τ, and at the powers of two up to 1,024; training goes on from the lowest. One line of FILE per stage;
what it has is kept.

Replays: the searches on these curves, without the model. A τ that was not measured, beyond the sweep, is
interpolated between its neighbours. Second stages also as they follow a first, from the τ found there.
"""

from __future__ import annotations

import json
import random
import time
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import TASKS, record, tables
from ffkernels.search.search import REFINE_TOLERANCE, LinearSearch, ParabolicSearch, Search
from ffkernels.search.significance import LEVEL, Rises, critical_values, higher, jackknife_weights

KIND = "search_noise"
DTYPES = ("bfloat16", "float32")
RATES = (3e-4, 1e-4, 4e-5)
# Two runs of each: seed and the tokens that an example is cut to.
SEEDS = {1: 32, 0: 64}
STAGES, INTERVAL, BATCH = 2, 6, 64
VALIDATION = 32
SHORTEST, LONGEST, FARTHEST = 24, 400, 1024
DOUBLING = tuple(1 << power for power in range(11))
# Reached is the sweep's lowest loss where τ is within 10 % of its τ, or the loss within 1 % of the decrease.
NEAR_TAU, NEAR_LOSS = 0.1, 0.01
TRIALS = 4000
PLACE = ("task", "dtype", "lr", "seed", "stage")
WHAT = ("found", "validations")


def sweep(task: str, dtype: str, lr: float, seed: int) -> list[dict[str, Any]]:
    """The stages of one short run, each with its curve: {τ: sums by example}."""
    import torch

    from ffkernels import ValidationLoss
    from ffkernels.training.models import add_adapter, load_model
    from ffkernels.training.tasks import collate, load_task

    torch.set_num_threads(1)
    base, tokenizer = load_model("tiny", dtype=dtype)
    model = add_adapter(base, seed=seed)
    model.train()
    data = load_task(task, tokenizer, max_length=SEEDS[seed], seed=seed, validation_examples=VALIDATION)
    validation = ValidationLoss(model, [collate(data.validation, tokenizer.pad_token_id)])
    tokens = validation.example_tokens.tolist()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=draw).tolist()
    stages = []
    for stage in range(STAGES):
        for step in range(INTERVAL):
            first = (stage * INTERVAL + step) * BATCH
            batch = collate([data.train[i] for i in order[first : first + BATCH]], tokenizer.pad_token_id)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            before = [p.detach().clone() for p in weights]
            optimizer.step()
        after = [p.detach().clone() for p in weights]
        update = [a - b for a, b in zip(after, before, strict=True)]

        def at(tau: int, after: list = after, update: list = update) -> list[float]:
            with torch.no_grad():
                for p, w, d in zip(weights, after, update, strict=True):
                    p.copy_(w + tau * d)
            return validation.measure()[1].tolist()

        curve: dict[int, list[float]] = {}
        best, tau = 0, 0
        while tau <= LONGEST and (tau <= SHORTEST or tau <= 1.1 * best + 10):
            curve[tau] = at(tau)
            if sum(curve[tau]) < sum(curve[best]):
                best = tau
            tau += 1
        last = tau - 1
        beyond = {*range(last, min(2 * best, FARTHEST), max(1, best // 16)), *DOUBLING} - {*curve}
        curve |= {tau: at(tau) for tau in sorted(beyond) if tau > last}
        at(best)
        place = {"task": task, "dtype": dtype, "lr": lr, "seed": seed, "stage": stage}
        measured = {"swept_to": last, "argmin": best, "tokens": tokens, "sums": sorted(curve.items())}
        stages.append({**place, **measured})
    return stages


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sweeps(path: Path) -> list[dict[str, Any]]:
    """Every stage there is to be, from the file or measured now."""
    kept = read(path)
    have = {(s["task"], s["dtype"], s["lr"], s["seed"]) for s in kept if s["stage"] == STAGES - 1}
    for dtype, seed, lr, task in product(DTYPES, SEEDS, RATES, TASKS):
        if (task, dtype, lr, seed) in have:
            continue
        begin = time.perf_counter()
        stages = sweep(task, dtype, lr, seed)
        with path.open("a") as file:
            file.write("".join(json.dumps(stage) + "\n" for stage in stages))
        kept += stages
        found = " ".join(f"{s['argmin']} of {s['swept_to']}" for s in stages)
        seconds = time.perf_counter() - begin
        print(f"{task} {dtype} lr {lr:g} seed {seed}: {found}, {seconds:.0f} s", flush=True)
    return kept


class Curve:
    """A measured stage: its loss and sums at any τ."""

    def __init__(self, stage: dict[str, Any]) -> None:
        self.tokens, self.size = stage["tokens"], sum(stage["tokens"])
        self.measured = {int(tau): sums for tau, sums in stage["sums"]}
        self.taus = sorted(self.measured)
        self.swept = [sum(self.measured[tau]) / self.size for tau in range(stage["swept_to"] + 1)]
        self.losses = [sum(self.measured[tau]) / self.size for tau in self.taus]
        self.lowest = min(self.losses)
        self.argmin = self.taus[self.losses.index(self.lowest)]

    def sums(self, tau: int) -> list[float]:
        if tau in self.measured:
            return self.measured[tau]
        after = bisect(self.taus, tau)
        low, high = self.taus[after - 1], self.taus[after]
        share = (tau - low) / (high - low)
        pairs = zip(self.measured[low], self.measured[high], strict=True)
        return [(1 - share) * a + share * b for a, b in pairs]

    def lost(self, tau: int) -> float:
        """The share of the decrease that stopping at this τ forgoes."""
        whole = self.swept[0] - self.lowest
        return (sum(self.sums(tau)) / self.size - self.lowest) / whole if whole > 0 else 0.0

    def reached(self, tau: int) -> bool:
        return abs(tau - self.argmin) <= NEAR_TAU * self.argmin or self.lost(tau) <= NEAR_LOSS


def replay(curve: Curve, search: Search, rises: Rises) -> Search:
    while (tau := search.propose()) is not None:
        sums = curve.sums(tau)
        loss = sum(sums) / curve.size
        search.observe(tau, loss, rises.sure(loss, sums))
    return search


def judged(curve: Curve, search: Search) -> dict[str, Any]:
    tau = search.best_tau
    return {
        "tau": tau,
        "evaluations": len(search.losses),
        "lost": curve.lost(tau),
        "reached": curve.reached(tau),
        "within_bound": abs(tau - curve.argmin) <= 2 or curve.lost(tau) <= REFINE_TOLERANCE,
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "stages": len(rows),
        "reached": sum(row["reached"] for row in rows),
        "within_bound": sum(row["within_bound"] for row in rows),
        "mean_evaluations": fmean(row["evaluations"] for row in rows),
        "mean_lost": fmean(row["lost"] for row in rows),
        "worst_lost": max(row["lost"] for row in rows),
    }


def verdicts(curve: Curve) -> dict[str, int]:
    """What the rule says after 0, 1, 2, 4, … of a τ whose loss is not the lowest of them.

    ``beyond``, at any measured τ: a lower one lies further on, and a sure rise would end the search before
    it. ``passed``, at powers of two: none does, and a rise that is not sure costs one more validation.
    """
    counts = dict.fromkeys(("beyond", "beyond_sure", "passed", "passed_unsure"), 0)
    weights = jackknife_weights(curve.tokens)
    critical = critical_values(sum(n > 0 for n in curve.tokens), len(DOUBLING) + 2)
    lowest_from = [*accumulate(reversed(curve.losses), min)][::-1]
    best, seen = 0, 1  # an index into curve.taus
    for at, (tau, loss) in enumerate(zip(curve.taus[:-1], curve.losses, strict=False)):
        if tau and loss >= curve.losses[best]:
            low, high = curve.measured[curve.taus[best]], curve.measured[tau]
            sure = higher(low, high, curve.tokens, weights, critical[seen])
            if lowest_from[at + 1] < curve.losses[best]:
                counts["beyond"] += 1
                counts["beyond_sure"] += sure
            elif tau in DOUBLING:
                counts["passed"] += 1
                counts["passed_unsure"] += not sure
        if tau in DOUBLING:
            best, seen = min(best, at, key=curve.losses.__getitem__), seen + 1
    return counts


def noise_of(curve: Curve) -> list[list[float]]:
    """Rounding alone: the sums at every fifth τ less the cubic through its four neighbours, by example."""
    around = ((-2, 1 / 6), (-1, -2 / 3), (0, 1.0), (1, -2 / 3), (2, 1 / 6))
    return [
        [sum(share * curve.measured[tau + by][i] for by, share in around) for i in range(len(curve.tokens))]
        for tau in range(2, len(curve.swept) - 2, 5)
    ]


def sure_of_noise(curves: Sequence[Curve], seen: int, trials: int, seed: int = 0) -> float:
    """How often the rule proves a rise between places that differ by rounding alone."""
    draw, sure = random.Random(seed), 0
    places = [(curve, noise) for curve in curves if len(noise := noise_of(curve)) > seen]
    for _ in range(trials):
        curve, noises = draw.choice(places)
        rises, verdict = Rises(curve.tokens), False
        for noise in draw.sample(noises, seen + 1):
            sums = [a + b for a, b in zip(curve.measured[0], noise, strict=True)]
            verdict = rises.sure(sum(sums) / curve.size, sums)
        sure += verdict
    return sure / trials


SEARCHES: dict[str, Callable[[Curve], Search]] = {
    "linear": lambda curve: replay(curve, LinearSearch(len(curve.swept) - 1), Rises()),
    "every rise counts": lambda curve: replay(curve, ParabolicSearch(FARTHEST), Rises()),
    "parabolic": lambda curve: replay(curve, ParabolicSearch(FARTHEST), Rises(curve.tokens)),
}


def by_rate(rows: Sequence[Mapping[str, Any]], dtype: str) -> list[tuple[float | None, list]]:
    """The rows of all rates together, and those of each."""
    of = [row for row in rows if row["dtype"] == dtype]
    chosen = [(lr, [row for row in of if lr in (None, row["lr"])]) for lr in (None, *sorted(RATES))]
    return [(lr, found) for lr, found in chosen if found]


def report(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    curves = {key(stage): Curve(stage) for stage in stages}
    rows, warm = [], []
    for stage in stages:
        curve = curves[key(stage)]
        slopes = [b - a for a, b in pairwise(curve.swept)]
        found = {name: judged(curve, search(curve)) for name, search in SEARCHES.items()}
        row = {name: stage[name] for name in (*PLACE, "swept_to")} | {"argmin": curve.argmin}
        row |= {"turning_points": sum(a * b < 0 for a, b in pairwise(slopes)), "searches": found}
        rows.append(row)
        before = curves.get(key(stage | {"stage": stage["stage"] - 1}))
        if before is not None:
            row["start"] = max(1, SEARCHES["parabolic"](before).best_tau)
            search = replay(curve, ParabolicSearch(FARTHEST, row["start"]), Rises(curve.tokens))
            found_from = {"cold": found["parabolic"], "warm": judged(curve, search)}
            warm.append({"dtype": stage["dtype"], "lr": stage["lr"], **found_from})
    groups = [
        {
            "dtype": dtype,
            "lr": lr,
            "turning_points": fmean(row["turning_points"] for row in chosen),
            "argmin": [row["argmin"] for row in chosen],
            "searches": {name: summary([row["searches"][name] for row in chosen]) for name in SEARCHES},
        }
        for dtype in DTYPES
        for lr, chosen in by_rate(rows, dtype)
    ]
    rule: dict[str, Any] = {"level": LEVEL, "trials": TRIALS}
    for dtype in DTYPES:
        every = dict(by_rate(stages, dtype))
        counted_ = [verdicts(curves[key(stage)]) for stage in every.get(None, ())]
        # At the smallest tables.rate, where a cubic leaves nothing of the curve.
        slow = [curves[key(stage)] for stage in every.get(min(RATES), ())]
        if counted_:
            rule[dtype] = {
                "verdicts": {name: sum(each[name] for each in counted_) for name in counted_[0]},
                "sure_of_noise": {str(seen): sure_of_noise(slow, seen, TRIALS) for seen in (1, 2, 4, 8)},
            }
    warm_start = {
        dtype: [
            {"lr": lr, **{side: summary([each[side] for each in chosen]) for side in ("cold", "warm")}}
            for lr, chosen in by_rate(warm, dtype)
        ]
        for dtype in DTYPES
    }
    return {"groups": groups, "rule": rule, "warm_start": warm_start, "stages": rows}


def key(stage: Mapping[str, Any]) -> tuple:
    return tuple(stage[name] for name in PLACE)


def table(results: tables.Results) -> str:
    """How often each search finds the lowest loss of a full sweep, and in how many evaluations."""
    if (found := tables.newest(results, KIND)) is None:
        return tables.missing("stages.search_noise")
    name, data = found
    labels = {"linear": "`linear`", "every rise counts": "every rise counts", "parabolic": "`parabolic`"}
    head = ["frozen base", "learning rate", "stages"]
    head += [f"{label}: {what}" for label in (*labels.values(), "second stages") for what in WHAT]
    rows = []
    for group in (group for group in data["groups"] if group["lr"] is not None):
        later = next(each["warm"] for each in data["warm_start"][group["dtype"]] if each["lr"] == group["lr"])
        row = [group["dtype"], tables.rate(group["lr"]), str(group["searches"]["linear"]["stages"])]
        for one in (*(group["searches"][search] for search in labels), later):
            row += [tables.percent(one["reached"] / one["stages"]), f"{one['mean_evaluations']:.1f}"]
        rows.append(row)
    config = data["config"]
    said = (
        f"{', '.join(config['tasks'])}, {tables.counted(len(config['seeds']), 'seed')}, the first "
        f"{config['stages']} stages, batch {config['batch_size']}, {config['validation_examples']} "
        "validation examples"
    )
    return tables.captioned(name, data, said, head, rows)


def main() -> None:
    module, name = "stages.search_noise", "search_noise_tiny"
    parser = record.parser(module, __doc__, name=name)
    parser.add_argument(
        "--curves", type=Path, required=True, help="kept between calls; not for the repository"
    )
    parser.add_argument("--replay", action="store_true", help="only what the file has")
    options = parser.parse_args()
    head = record.provenance(module, kind=KIND)
    head["config"] = {
        "model": "tiny",
        **{"tasks": TASKS, "lr": sorted(RATES), "seeds": list(SEEDS), "stages": STAGES, "interval": INTERVAL},
        **{"batch_size": BATCH, "validation_examples": VALIDATION, "max_length": SEEDS},
        **{"max_tau": FARTHEST, "near_tau": NEAR_TAU, "near_loss": NEAR_LOSS},
    }
    stages = read(options.curves) if options.replay else sweeps(options.curves)
    result = head | report(stages)
    print(table({name: result}))
    print(json.dumps({part: result[part] for part in ("rule", "warm_start")}, indent=1))
    if options.out is not None:
        print(record.write(result, options.out, name))


if __name__ == "__main__":
    main()
