"""What `learning_rate.py` has measured, in tables: failures first.

All is said beside tuned Adam: the best of the sweep's rates, by its own test loss, for each task, seed and
schedule. A gap is how far a run's final test loss is above that, at the same FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from end_to_end_table import rate
from learning_rate_plan import CLAIMED, SWEEP
from learning_rate_plan import STEPS as STANDARD

Line = Mapping[str, Any]
NEAR, FORWARDS = 0.02, 20  # what the finder is held to

NAMES = {
    "adam": "Adam",
    "find": '`learning_rate="find"`, no stages',
    "best*0.35": "the same, but 0.35 of the best update",
    "best*1": "the same, but all of the best update",
    "find+stages": '`learning_rate="find"`',
    "keep": "Fast Forward, no finding",
}


def conditions(line: Line) -> tuple[Any, ...]:
    """What has to be equal where losses are compared."""
    return line["task"], line["seed"], line["schedule"], line["variant"], line["steps"]


def tuned(lines: Iterable[Line]) -> dict[tuple[Any, ...], Line]:
    """Adam's best run of the sweep under each condition."""
    best: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        swept = line["contender"] == "adam" and line["lr"] in SWEEP and line["loss"] is not None
        if swept and ((key := conditions(line)) not in best or line["loss"] < best[key]["loss"]):
            best[key] = line
    return best


def gap(line: Line, best: Mapping[tuple[Any, ...], Line]) -> float | None:
    """How far above tuned Adam a run ended; None where it diverged."""
    return None if line["loss"] is None else line["loss"] / best[conditions(line)]["loss"] - 1


def diverged(line: Line) -> bool:
    """Not finite, or above where it began, at any test loss or at the end."""
    losses = [loss for _, _, loss in line.get("curve", [])]
    return line["loss"] is None or any(loss is None or loss > losses[0] for loss in losses)


def compared(lines: Iterable[Line], **fields: Any) -> list[Line]:
    """The runs with these fields."""
    return [line for line in lines if all(line[name] == value for name, value in fields.items())]


def groups(lines: Sequence[Line]) -> dict[tuple[str, str, int], list[Line]]:
    """Runs by schedule, variant and length."""
    found: dict[tuple[str, str, int], list[Line]] = {}
    for line in lines:
        found.setdefault((line["schedule"], line["variant"], line["steps"]), []).append(line)
    return found


def verdicts(lines: Sequence[Line], contender: str = "find") -> list[dict[str, Any]]:
    """What was claimed of the finder, and whether it is so, for each schedule, variant and length."""
    best, found = tuned(lines), []
    for (schedule, variant, steps), some in groups(lines).items():
        mine = [line for line in compared(some, contender=contender) if line["lr"] in CLAIMED]
        if not mine:
            continue
        # A length at which Adam was not tuned shows only whether the finder's runs hold.
        gaps = [gap(line, best) for line in mine if conditions(line) in best]
        known = [one for one in gaps if one is not None]
        found.append(
            {
                "schedule": schedule,
                "variant": variant,
                "steps": steps,
                "runs": len(mine),
                "near": sum(one <= NEAR for one in known) / len(gaps) if gaps else None,
                "median": median(known) if known else None,
                "worst": max(known) if known and len(known) == len(gaps) else None,
                "diverged": sum(map(diverged, mine)),
                "forwards": [
                    median(line["forwards"] for line in mine),
                    max(line["forwards"] for line in mine),
                ],
            }
        )
    return found


def failures(lines: Sequence[Line], contender: str = "find") -> list[str]:
    """Every run of the finder that misses what it is held to, and every run of others that broke down."""
    best, found = tuned(lines), []
    for line in lines:
        name = f"{line['task']}, seed {line['seed']}, {line['schedule']}, {line['variant']}"
        name += f", {line['steps']} steps" if line["steps"] != STANDARD else ""
        name += f": {line['contender']} from {rate(line['lr'])}"
        if line["contender"] != contender:
            if line["contender"] != "adam" and line.get("failed"):
                found.append(f"{name}: {line['failed']}")
            continue
        if line.get("failed") or line["loss"] is None:
            found.append(f"{name}: {line['failed']}")
            continue
        if diverged(line):
            found.append(f"{name}: above where it began")
        if line["forwards"] > FORWARDS:
            found.append(f"{name}: {line['forwards']} validation forwards")
        if conditions(line) in best and (over := gap(line, best)) > NEAR:
            at, ours = best[conditions(line)]["lr"], float(f"{line['found']:.2g}")
            found.append(f"{name}: found {rate(ours)}, {over:.1%} above Adam at {rate(at)}")
    return found


def flops_to(line: Line, target: float) -> float | None:
    """FLOPs to a test loss, between measured ones in proportion; None where it was not reached."""
    before: Sequence[Any] | None = None
    for point in line["curve"]:
        if point[2] is not None and point[2] <= target:
            if before is None or before[2] is None or before[2] == point[2]:
                return float(point[1])
            share = (before[2] - target) / (before[2] - point[2])
            return before[1] + share * (point[1] - before[1])
        before = point
    return None
