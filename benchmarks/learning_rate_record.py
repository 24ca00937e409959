"""The runs of `learning_rate.py` as one committed result: rounded, without what no table or picture shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from learning_rate_plan import SEEDS, STEPS, TASKS, WARMUP, Run

KIND = "learning_rate"
FIELDS = ("task", "seed", "contender", "lr", "schedule", "variant", "steps", "loss", "found", "failed")
COUNTS = ("optimizer_steps", "forwards", "batches", "own_flops", "flops", "budget")


def document(done: Iterable[Mapping[str, Any]], command: str, fast: bool) -> dict[str, Any]:
    """A result of these runs; what the rule was chosen by stands apart."""
    from ffkernels.reporting.machine import machine_info, version_info

    done = list(done)
    lines = [reduced(line) for line in done]
    tasks = [task for task in TASKS if any(line["task"] == task for line in done)]
    variants, lengths = ({line[name] for line in done} for name in ("variant", "steps"))
    # What all runs have in common; where they differ, that of the standard run, and each says what it has.
    variant = variants.pop() if len(variants) == 1 else "standard"
    steps = lengths.pop() if len(lengths) == 1 else STEPS
    config = Run(TASKS[0], 0, "find", 1e-4, variant=variant).config()
    return {
        "kind": KIND,
        "fast": fast,
        "command": command,
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(sum(line.get("seconds") or 0.0 for line in done)),
        "machine": machine_info(),
        "versions": version_info(),
        "config": {
            **{
                "model": config.model,
                "tasks": tasks,
                "steps": steps,
                "warmup_steps": min(WARMUP, steps // 10),
            },
            **{
                name: getattr(config, name) for name in ("rank", "alpha", "dtype", "batch_size", "max_length")
            },
            **{name: getattr(config, name) for name in ("test_examples", "validation_examples")},
        },
        "runs": [line for line in lines if not _calibrates(line)],
        "calibration": [line for line in lines if _calibrates(line)],
    }


def _calibrates(line: Mapping[str, Any]) -> bool:
    return line["seed"] not in SEEDS or line["contender"].startswith("best")


def reduced(line: Mapping[str, Any]) -> dict[str, Any]:
    """One run: losses to 1e-5, the found rate to four digits."""
    kept: dict[str, Any] = {name: line.get(name) for name in FIELDS}
    kept |= {name: line.get(name, 0) for name in COUNTS}
    for name in ("loss", "found"):
        if kept[name] is not None:
            kept[name] = round(kept[name], 5) if name == "loss" else float(f"{kept[name]:.4g}")
    kept["curve"] = [
        [steps, flops, None if loss is None else round(loss, 5)]
        for steps, flops, loss in line.get("curve", [])
    ]
    return kept


def write(result: Mapping[str, Any], path: Path) -> None:
    """A line per run: a diff shows which have changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {**result, "runs": [], "calibration": []}, indent=1, ensure_ascii=False, allow_nan=False
    )
    for name in ("runs", "calibration"):
        lines = ",\n  ".join(json.dumps(line, ensure_ascii=False, allow_nan=False) for line in result[name])
        text = re.sub(
            rf'"{name}": \[\]', lambda found, name=name, lines=lines: f'"{name}": [\n  {lines}\n ]', text
        )
    path.write_text(text + "\n", encoding="utf-8")
