"""The runs as one committed result: rounded, without the logs of single steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from benchmarks.learning_rate.workloads import LENGTH, RANK, WARMUP, Workload
from benchmarks.record import provenance

KIND = "alignment_rates"
KINDS = {"peft": "peft_methods"}  # by plan, where it is another
WORKLOAD = ["group", *(field.name for field in fields(Workload))]
RUN = ("workload", "seed", "contender", "lr", "loss", "start", "rate", "own", "worst", "worst_at")
RUN += ("rise", "peak", "undos", "failed")  # as far as a run has them


def document(done: Iterable[Mapping[str, Any]], plan: str) -> dict[str, Any]:
    """A result of these runs: losses to 1e-5, all else to four digits."""
    done = list(done)
    head = provenance("learning_rate", ["--plan", plan], kind=KINDS.get(plan, KIND), fast=plan == "fast")
    head["machine"]["threads"] = 1
    head["versions"]["git_commit"] = ", ".join(dict.fromkeys(line["commit"] for line in done))
    return {
        **head,
        "seconds": round(sum(line.get("seconds", 0.0) for line in done)),
        "config": {
            "model": done[0]["model"],
            "rank": RANK,
            "max_length": LENGTH,
            "optimizer": "AdamW, weight decay 0",
            "warmup_steps": f"{WARMUP}, of auto none",
        },
        "workloads": {line["workload"]: {name: line[name] for name in WORKLOAD} for line in done},
        "runs": [{name: rounded(name, line[name]) for name in RUN if name in line} for line in done],
    }


def rounded(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 5) if name in ("loss", "start") else float(f"{value:.4g}")
