"""The runs as one committed result: rounded, without the logs of single steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from learning_rate.workloads import LENGTH, RANK, WARMUP, Workload

KIND = "alignment_rates"
WORKLOAD = [field.name for field in fields(Workload)]
RUN = ("workload", "seed", "contender", "lr", "loss", "start", "rate", "own", "worst", "worst_at")
RUN += ("rise", "peak", "undos", "failed")  # as far as a run has them


def document(done: Iterable[Mapping[str, Any]], plan: str) -> dict[str, Any]:
    """A result of these runs."""
    from ffkernels.reporting.machine import machine_info, version_info

    done = list(done)
    commits = list(dict.fromkeys(line["commit"] for line in done))
    return {
        "kind": KIND,
        "fast": plan == "fast",
        "command": f"python -m benchmarks.learning_rate --plan {plan}",
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(sum(line.get("seconds", 0.0) for line in done)),
        "machine": {**machine_info(), "threads": 1},
        "versions": {**version_info(), "git_commit": ", ".join(commits)},
        "config": {
            "model": done[0]["model"],
            "rank": RANK,
            "max_length": LENGTH,
            "optimizer": "AdamW, weight decay 0",
            "warmup_steps": f"{WARMUP}, of auto none",
        },
        "workloads": {line["workload"]: {name: line[name] for name in ("group", *WORKLOAD)} for line in done},
        "runs": [reduced(line) for line in done],
    }


def reduced(line: Mapping[str, Any]) -> dict[str, Any]:
    """One run: losses to 1e-5, all else to four digits."""
    return {name: rounded(name, line[name]) for name in RUN if name in line}


def rounded(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 5) if name in ("loss", "start") else float(f"{value:.4g}")


def write(result: Mapping[str, Any], path: Path) -> None:
    """A line per workload and per run: a diff shows which have changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**result, "workloads": "§w", "runs": "§r"}, indent=1, ensure_ascii=False)
    workloads = [f"{said(name)}: {said(fields)}" for name, fields in result["workloads"].items()]
    text = text.replace('"§w"', "{\n  " + ",\n  ".join(workloads) + "\n }")
    text = text.replace('"§r"', "[\n  " + ",\n  ".join(map(said, result["runs"])) + "\n ]")
    path.write_text(text + "\n", encoding="utf-8")


def said(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
