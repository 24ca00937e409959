"""The result file of this benchmark: runs and savings of a round, medians and ranges of a cell.

    {"kind": "end-to-end", "fast", "command", "measured_at", "seconds", "machine", "versions", "config",
     "tuned": {TASK: {"lr", "source"}},
     "cells": [{"name", "task", "method", "lr", "tuned", "batch_size",
                "rounds": [{"seed", "complete", "measured_at", "git_commit", "wall_seconds",
                            "runs": […], "savings": […]}],
                "spreads": [{"kind", "count", "median", "low", "high"}]}],
     "left_out": [{"cell", "seed", "reason"}]}

``runs`` and ``savings`` are report.json's; each run has besides its ``kind``, ``lr`` and ``target``, its
stages as ``taus`` ([optimizer step, τ*]), and a thinned ``curve`` ([optimizer step, measured FLOPs, seconds,
test loss]).
The file is written after every round, and a later call goes on from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.plan import Cell
from ffkernels.reporting.recorder import RunLog, read_run
from ffkernels.reporting.savings import Run, compare_runs, median_and_range
from ffkernels.training.trainer import INTERRUPTED

KIND = "end-to-end"
CURVE_POINTS = 14
# What must be the same for two rounds to stand in one table.
CONDITIONS = ("fast", "config", "machine", "versions")
FREE = ("git_commit", "ffkernels", "load", "os")  # a machine that is rented again may have another kernel


def finished_logs(folder: Path) -> list[RunLog]:
    """The logs of runs that went to their end."""
    logs = [read_run(path) for path in sorted(folder.glob("*.jsonl"))]
    return [log for log in logs if log.end is not None and log.end["stopped_because"] != INTERRUPTED]


def round_of(logs: Sequence[RunLog], tolerance: float) -> dict[str, Any]:
    """Runs and savings of one seed, for the result file."""
    runs = compare_runs(logs, tolerance)
    return {
        "runs": [_run(run) for run in runs],
        "savings": [run.entry() for run in runs if run.saved is not None],
    }


def _run(run: Run) -> dict[str, Any]:
    row = dict(run.row)
    row |= {"kind": run.kind, "lr": run.lr, "target": run.target}
    row["taus"] = [[stage["optimizer_step"], stage["tau"]] for stage in run.log.stages]
    row["curve"] = [
        [
            test["optimizer_step"],
            test["flops"]["measured"],
            round(test["seconds"]["total"], 3),
            round(test["loss"], 5) if math.isfinite(test["loss"]) else None,
        ]
        for test in thinned(run.log.tests)
    ]
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def thinned(points: Sequence[Any], most: int = CURVE_POINTS) -> list[Any]:
    """At most ``most`` of the points, evenly chosen, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def spreads_of(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median and range of each kind's savings over the seeds; none, with the reason, where one has none."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in rounds:
        kind_of = {row["name"]: row["kind"] for row in one["runs"]}
        for entry in one["savings"]:
            kinds.setdefault(kind_of[entry["name"]], []).append(entry)
    found = []
    for kind, entries in kinds.items():
        spread: dict[str, Any] = {"kind": kind, "count": len(entries)}
        reasons = [f"{entry['name']} {entry['reason']}" for entry in entries if "reason" in entry]
        ends = [None] * 3 if reasons else median_and_range(entries)
        spread |= zip(("median", "low", "high"), ends, strict=True)
        found.append({**spread, "reason": "; ".join(reasons)} if reasons else spread)
    return found


def cell_of(document: dict[str, Any], cell: Cell, lr: float) -> dict[str, Any]:
    """The cell's entry in the document, made where there is none."""
    for entry in document["cells"]:
        if entry["name"] == cell.name:
            return entry
    entry = {
        "name": cell.name,
        "task": cell.task,
        "method": cell.method,
        "lr": lr,
        "tuned": cell.lr is None,
        "batch_size": cell.batch_size,
        "rounds": [],
        "spreads": [],
    }
    document["cells"].append(entry)
    return entry


def add_round(entry: dict[str, Any], one: dict[str, Any]) -> None:
    """Put a round into its cell, in place of one of the same seed that has not more runs."""
    before = next((r for r in entry["rounds"] if r["seed"] == one["seed"]), None)
    if not one["complete"] and before is not None and len(before["runs"]) > len(one["runs"]):
        return
    entry["rounds"] = sorted(
        [*(r for r in entry["rounds"] if r["seed"] != one["seed"]), one], key=lambda r: r["seed"]
    )
    entry["spreads"] = spreads_of(entry["rounds"])


def finished(document: Mapping[str, Any], cell: Cell, seed: int) -> dict[str, Any] | None:
    """The round, where it has been measured to its end."""
    for entry in document["cells"]:
        if entry["name"] == cell.name:
            return next((r for r in entry["rounds"] if r["seed"] == seed and r["complete"]), None)
    return None


def load(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The document at ``path`` to go on with, or ``fresh`` where there is none.

    Raises:
        ValueError: when the file cannot be read, or was made under other conditions, whose numbers would
            not compare.
    """
    if not path.is_file():
        return fresh
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        ours = before["kind"] == KIND and fresh.keys() - {"note"} <= before.keys()
    except (ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise ValueError(f"{path} is no whole result of this benchmark; give another --out, or --fresh")
    differing = []
    for key in CONDITIONS:
        mine, its = fresh[key], before[key]
        if isinstance(mine, dict):
            # A setting that came into the world since then has its default, which is what was done before.
            names = sorted(n for n in mine.keys() & its.keys() if mine[n] != its[n])
            differing += [f"{n}={mine[n]!r} (there {its[n]!r})" for n in names if n not in FREE]
        elif mine != its:
            differing.append(f"{key}={mine!r} (there {its!r})")
    if differing:
        raise ValueError(
            f"{path} was measured under other conditions: {', '.join(differing)}. Give another --out, or "
            "--fresh to measure all of it again."
        )
    kept = {key: before[key] for key in ("tuned", "cells", "seconds", "left_out")}
    # Who wants the same file again has to give all of these.
    commands = dict.fromkeys([*before["command"].split(" && "), fresh["command"]])
    return {**fresh, **kept, "command": " && ".join(commands)}
