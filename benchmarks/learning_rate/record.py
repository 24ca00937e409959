"""The runs as one committed result: rounded, without the logs of single steps.

Two kinds: ``alignment_rates``, of which the tables sum up the runs, and ``rate_workloads``, which has each
contender's share of the recoverable loss beside the runs that it is computed from, and can be gone on with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from statistics import median_low
from typing import Any

from benchmarks.learning_rate.plan import (
    CONSTANT,
    CONSTANTS,
    HYPERGRADIENT,
    PLANS,
    Done,
    Item,
    Run,
    best,
    swept,
)
from benchmarks.learning_rate.workloads import LENGTH, MODELS, RANK, WARMUP, Workload
from benchmarks.record import provenance
from benchmarks.tables import rate

KIND, SHARES = "alignment_rates", "rate_workloads"
KINDS = {"peft": "peft_methods"}  # by plan, where it is another
SETS = ("calibration", "evaluation")
ORACLE = "the oracle"
WORKLOAD = ["group", *(field.name for field in fields(Workload))]
RUN = ("workload", "seed", "contender", "lr", "loss", "start", "rate", "own", "worst", "worst_at")
RUN += ("rise", "peak", "undos", "failed")  # as far as a run has them
RUN += ("seconds_per_step", "peak_gigabytes")  # on a GPU
MORE = (*RUN, "taken", "seconds", "commit", "cpu", "curve")  # what going on later needs


def document(done: Iterable[Mapping[str, Any]], plan: str) -> dict[str, Any]:
    """A result of these runs: losses to 1e-5, all else to four digits."""
    if plan in ("workloads", *SETS):
        return shares(done, plan)
    done = list(done)
    model = {
        "model": done[0]["model"],
        "weights": ", ".join(dict.fromkeys(line.get("weights", "pretrained") for line in done)),
        "device": done[0].get("device", "cpu"),
    }
    return {
        **head_of(done, plan, KINDS.get(plan, KIND)),
        "config": {**model, **config()},
        "workloads": workloads_of(done),
        "runs": [{name: rounded(name, line[name]) for name in RUN if name in line} for line in done],
    }


def head_of(done: Sequence[Mapping[str, Any]], plan: str, kind: str) -> dict[str, Any]:
    head = provenance("learning_rate", ["--plan", plan], kind=kind, fast=plan.endswith("fast"))
    if "device" not in done[0]:
        head["machine"]["threads"] = 1
    # An exported tree knows of none.
    commits = dict.fromkeys(line["commit"] for line in done)
    head["versions"]["git_commit"] = ", ".join(filter(None, commits)) or None
    return {**head, "seconds": round(sum(line.get("seconds", 0.0) for line in done))}


def config() -> dict[str, Any]:
    return {
        "rank": RANK,
        "max_length": LENGTH,
        "optimizer": "AdamW, weight decay 0",
        "warmup_steps": f"{WARMUP}, of auto none",
    }


def workloads_of(done: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {line["workload"]: {name: line[name] for name in WORKLOAD} for line in done}


def rounded(name: str, value: Any) -> Any:
    if name == "curve":
        return [
            [round(part, 4), round(seconds, 2), None if loss is None else round(loss, 4)]
            for part, seconds, loss in value
        ]
    if not isinstance(value, float):
        return value
    return round(value, 5) if name in ("loss", "start") else float(f"{value:.4g}")


def shares(lines: Iterable[Mapping[str, Any]], plan: str = "workloads") -> dict[str, Any]:
    """What each contender leaves of the loss that tuned Adam recovers, and the runs behind it.

    Args:
        lines: finished runs; those that are not of the plan are left out.

    Returns:
        ``evaluation`` and ``calibration`` have an entry per workload::

            {"workload": name, "tuned_lr": rate, "tuned_lrs": [one per seed], "inside": bool,
             "seeds": [...], "share": {contender: [one per seed]}}

        A share is (L − L*) / (L₀ − L*) as a fraction; L* is Adam's lowest final test loss over all its rates
        on that workload and seed, L₀ the test loss before training. It is None where the loss is not finite
        or the contender failed, and counts as infinite. ``tuned_lr`` is the median of the seeds' best rates;
        ``inside`` says whether on every seed the best one has a worse one within a factor of 2 on both
        sides. Only seeds are there on which the oracle and all contenders have run. ``incomplete`` names the
        others that were begun, with what is missing.
    """
    wanted = {(w.name, seed) for name in SETS for w, seed in places(name)}
    if plan in SETS:
        wanted = {(w.name, seed) for w, seed in places(plan)}
    done = {line["key"]: line for line in lines if (line["workload"], line["seed"]) in wanted}
    head = head_of(list(done.values()), plan, SHARES)
    here, runs = head["machine"]["cpu"], []
    for line in done.values():
        run = {name: line[name] for name in MORE if name in line}
        # Rates of runs are part of their keys.
        run = {name: value if name == "lr" else rounded(name, value) for name, value in run.items()}
        runs.append({k: value for k, value in run.items() if (k, value) != ("cpu", here)})
    found, incomplete = {}, []
    for name in SETS:
        found[name], missing = evidence(done, name)
        incomplete += missing
    chosen = {"constant": CONSTANT, "hypergradient": HYPERGRADIENT}
    return {
        **head,
        "config": {"model": "tiny", **config(), "test_examples": MODELS["tiny"][1], **chosen},
        "evaluation": found["evaluation"],
        "calibration": found["calibration"],
        "incomplete": incomplete,
        "workloads": workloads_of(done.values()),
        "runs": runs,
    }


def resumed(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that a result was made of, to go on with them.

    Raises:
        ValueError: for a result of another kind, which lacks what its runs are known by.
    """
    if result.get("kind") != SHARES:
        raise ValueError(f"a result of the kind {result.get('kind')!r}; only {SHARES!r} can be gone on with")
    cpu = result["machine"]["cpu"]
    return [
        {
            "key": f"{run['workload']}, seed {run['seed']}: {run['contender']} {run['lr']}",
            **result["workloads"][run["workload"]],
            **run,
            "cpu": run.get("cpu", cpu),
        }
        for run in result["runs"]
    ]


def places(plan: str) -> dict[tuple[Workload, int], list[Item]]:
    """What a plan runs on each workload and seed."""
    found: dict[tuple[Workload, int], list[Item]] = {}
    for item in PLANS[plan]():
        found.setdefault((item.workload, item.seed), []).append(item)
    return found


def called(contender: str, lr: float | None, constants: Iterable[float], hypergradient: str | None) -> str:
    """A contender's name in results.

    Args:
        constants: the rates that stand for "one constant rate for everything".
        hypergradient: the contender that is "hypergradient" without its step; None, none is.
    """
    if lr is None:
        return "hypergradient" if contender == hypergradient else contender
    if contender == "adam":
        return f"Adam, one constant ({rate(lr)})" if lr in constants else f"Adam, {rate(lr)}"
    return f"{contender}, {rate(lr)}"


def contenders(items: Iterable[Item], plan: str) -> dict[str, Run]:
    """All but the oracle, by name."""
    naming = ((CONSTANT,), HYPERGRADIENT) if plan == "evaluation" else (CONSTANTS, None)
    return {
        called(item.contender, lr, *naming): Run(item.workload, item.seed, item.contender, lr)
        for item in items
        if item.more is None
        for lr in item.rates
    }


def evidence(done: Done, plan: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of a plan's workloads, and what was begun and not run to its end."""
    entries: dict[str, dict[str, Any]] = {}
    incomplete, every = [], places(plan)
    first: dict[Workload, int] = {}
    for workload, seed in every:
        first[workload] = min(seed, first.get(workload, seed))
    for (workload, seed), items in sorted(every.items(), key=lambda one: one[0][1]):
        runs = contenders(items, plan)
        missing = [name for name, run in runs.items() if run.key not in done]
        losses = swept(done, workload, seed)
        if not oracle_ran(done, items, (workload, first[workload])):
            missing.insert(0, ORACLE)
        tuned = done[Run(workload, seed, "adam", best(losses)).key] if losses else None
        if not missing and not (tuned["loss"] is not None and tuned["loss"] < tuned["start"]):
            missing = ["a rate at which Adam recovers anything"]
        if missing:
            if losses or any(run.key in done for run in runs.values()):
                incomplete.append({"workload": workload.name, "seed": seed, "missing": missing})
            continue
        entry = entries.setdefault(
            workload.name,
            {"workload": workload.name, "tuned_lr": 0.0, "tuned_lrs": [], "inside": True, "seeds": []},
        )
        entry["seeds"].append(seed)
        entry["tuned_lrs"].append(tuned["lr"])
        entry["tuned_lr"] = median_low(entry["tuned_lrs"])
        entry["inside"] &= inside(losses)
        for name, run in runs.items():
            values = entry.setdefault("share", {}).setdefault(name, [])
            values.append(share(done[run.key]["loss"], tuned["loss"], tuned["start"]))
    order = list(dict.fromkeys(workload.name for workload, _ in every))
    return sorted(entries.values(), key=lambda entry: order.index(entry["workload"])), incomplete


def share(loss: float | None, lowest: float, start: float) -> float | None:
    return None if loss is None else round((loss - lowest) / (start - lowest), 5)


def inside(losses: Mapping[float, float]) -> bool:
    """Whether the best rate has a worse one within a factor of 2 on both sides."""
    at = best(losses)
    return any(at / 2 <= lr < at for lr in losses) and any(at < lr <= 2 * at for lr in losses)


def oracle_ran(done: Done, items: Iterable[Item], first: tuple[Workload, int]) -> bool:
    """Whether Adam's sweep is at its end: on the first seed when its best rate is inside what was run."""
    oracle = next(item for item in items if item.more is not None)
    losses = swept(done, *first)
    if not losses or (oracle.seed == first[1] and not set(oracle.rates) <= losses.keys()):
        return False
    return inside(losses) and (oracle.seed == first[1] or oracle.next(done) is None)
