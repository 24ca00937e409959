"""What a run saved: its cost to reach the Adam run's test loss, against what that run cost.

    L*      final test loss of the Adam run at the same learning rate
    saved   1 − cost(first test loss ≤ L* + tolerance) / cost(Adam run), in FLOPs (both kinds) and seconds

A run that never got there saved nothing that could be named: None, with the reason. A negative saving is a
loss and stands as it is. Adam at a tuned learning rate, runs without a given one ("auto"), LoRA+ and the
peers, other people's Fast Forward loops, are held to the same target.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ffkernels.reporting.recorder import RunLog

COSTS = ("flops_paper", "flops_measured", "seconds")
# In the order of a report. A peer's kind is its name, and its place is before LoRA+.
KINDS = ("adam", "linear", "parabolic", "lora-plus", "auto", "adam-tuned")
# What a run of a kind may have otherwise than the Adam run it is held to.
MAY_DIFFER = {"adam-tuned": ("lr",), "lora-plus": ("optimizer",)}
SECONDS = ("train", "validate", "move", "other", "total")
# What two runs must share for one to be measured by the other.
CONDITIONS = (
    "lr model attn task source chat_loss data test_data method rank alpha dropout targets optimizer "
    "lora_plus_ratio weight_decay beta1 beta2 max_grad_norm schedule warmup_steps batch_size max_length "
    "test_examples seed dtype"
).split()


@dataclass(eq=False)
class Run:
    """A run log with what the report needs to know of it."""

    log: RunLog
    kind: str  # one of KINDS, or the name of a peer
    row: dict[str, Any]  # its entry in report.json
    adam: Run | None = None  # what it is measured by; None for Adam itself and where there is none
    target: float | None = None  # the test loss it had to reach; for an Adam run the one it sets
    reached_at: dict[str, Any] | None = None  # the event of the first test loss at or below the target
    saved: dict[str, float | None] | None = None  # fractions by name (COSTS); None for an Adam run
    reason: str | None = None  # why ``saved`` holds no numbers
    variant: str = ""  # what tells it from other runs of its kind but its seed, such as "lr 0.001"
    variant_number: int = 0  # of those in the report, counted from 0

    @property
    def tuned(self) -> bool:
        """Whether its rate was tuned, where its kind says so; `compare` may not have one that was."""
        return self.kind == "adam-tuned" and "untuned" not in self.name

    @property
    def group(self) -> str:
        """Its kind, and what tells it from others of that: runs of one group differ in their seed only."""
        return f"{self.kind}, {self.variant}" if self.variant else self.kind

    @property
    def name(self) -> str:
        return self.log.name

    @property
    def auto(self) -> bool:
        """Whether no learning rate was given: what its settings say of one is then nothing."""
        return (self.log.config.get("fast_forward") or {}).get("learning_rate") == "auto"

    @property
    def lr(self) -> float | None:
        return None if self.auto else self.log.config.get("lr")

    def entry(self) -> dict[str, Any]:
        return _entry(self.name, self.saved, self.reason)


@dataclass(frozen=True)
class Spread:
    """Median and range of the savings of several seeds; empty, with the reason, when one of them has none."""

    kind: str
    count: int
    median: dict[str, float] | None
    low: dict[str, float] | None = None
    high: dict[str, float] | None = None
    reason: str | None = None

    def entry(self) -> dict[str, Any]:
        return _entry(f"{self.kind}-median", self.median, self.reason)


def kind_of(log: RunLog) -> str:
    """What a run is: by its settings, and of the plain optimizer's by its name."""
    name, forward = log.name.lower(), log.config.get("fast_forward")
    if peer := log.config.get("peer"):
        return str(peer)
    if forward is None:
        if "lora-plus" in name and log.config.get("optimizer") == "lora-plus":
            return "lora-plus"
        return "adam-tuned" if "tuned" in name else "adam"
    without_rate = forward.get("learning_rate") == "auto" and forward.get("interval") is None
    return "auto" if without_rate else forward["search"]


def compare_runs(logs: Sequence[RunLog], tolerance: float) -> list[Run]:
    """Every run with its saving, in the order Adam, linear, parabolic, peers, LoRA+, auto, tuned.

    Raises:
        ValueError: when two runs have the same name, or tolerance is not a number ≥ 0.
    """
    if not tolerance >= 0:
        raise ValueError(f"target_tolerance is {tolerance!r}; it must be a number ≥ 0")
    names = [log.name for log in logs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several runs are named {', '.join(twice)}; rename them or report them separately")
    runs = [Run(log, kind_of(log), _row(log)) for log in logs]
    runs.sort(key=lambda run: (_place(run.kind), _natural(run.name)))
    _tell_apart(runs)
    adams = [run for run in runs if run.kind == "adam"]
    for run in adams:
        if run.log.end is not None and _finite(run.row["test_loss"]):
            run.target = run.row["test_loss"] + tolerance
            run.reached_at = _first_at(run.log, run.target)
    for run in runs:
        if run.kind != "adam":
            _judge(run, adams)
    return runs


def spreads(runs: Sequence[Run]) -> list[Spread]:
    """Median and range per group that has two or more runs."""
    found = []
    for kind in dict.fromkeys(run.group for run in runs if run.kind != "adam"):
        same = [run for run in runs if run.group == kind]
        if missing := [run.name for run in same if run.reason is not None]:
            reason = f"no number for {', '.join(missing)}"
            found.append(Spread(kind, len(same), None, reason=reason))
        else:
            found.append(Spread(kind, len(same), *median_and_range([run.saved for run in same])))
    return [spread for spread in found if spread.count > 1]


def median_and_range(saved: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Of savings their median, lowest and highest, each cost on its own."""
    return [{cost: f(one[cost] for one in saved) for cost in COSTS} for f in (median, min, max)]


def last_state(log: RunLog) -> dict[str, Any]:
    """Cumulative ``flops`` and ``seconds`` at the end, or at the last thing an unfinished run logged."""
    if log.end is not None:
        return {"flops": log.end["flops"], "seconds": log.end["seconds"]}
    states = [{"flops": e["flops"], "seconds": e["seconds"]} for e in (*log.steps[-1:], *log.tests[-1:])]
    states += [{"flops": e["run_flops"], "seconds": e["run_seconds"]} for e in log.stages[-1:]]
    nothing = {"flops": {"paper": 0, "measured": 0}, "seconds": {"total": 0.0}}
    return max(states, key=lambda state: state["flops"]["measured"], default=nothing)


def _row(log: RunLog) -> dict[str, Any]:
    end, state = log.end or {}, last_state(log)
    steps = [e["optimizer_step"] for e in (*log.steps[-1:], *log.tests[-1:])]
    losses = [e["loss"] for e in log.tests[-1:]]
    return {
        "name": log.name,
        "optimizer_steps": end.get("optimizer_steps", max(steps, default=0)),
        "test_loss": end.get("test_loss", losses[0] if losses else None),
        "flops": {name: state["flops"][name] for name in ("paper", "measured")},
        "seconds": {name: state["seconds"].get(name, 0.0) for name in SECONDS},
        "validation_forwards": end.get("validation_forwards", sum(len(s["losses"]) for s in log.stages)),
        "stages": end.get("stages", len(log.stages)),
    }


def _judge(run: Run, adams: Sequence[Run]) -> None:
    run.saved = dict.fromkeys(COSTS)
    run.adam, run.reason = _adam_for(run, adams)
    if run.adam is None:
        return
    if run.adam.target is None:
        run.reason = f"{run.adam.name} did not end with a finite test loss"
        return
    run.target = run.adam.target
    run.reached_at = _first_at(run.log, run.target)
    if run.reached_at is None:
        losses = [e["loss"] for e in run.log.tests if _finite(e["loss"])]
        best = f"the best was {min(losses):.4f}" if losses else "none was measured"
        run.reason = f"did not reach test loss {run.target:.4f}; {best}"
        return
    spent, whole = _costs(run.reached_at), _costs(last_state(run.adam.log))
    run.saved = {cost: 1.0 - spent[cost] / whole[cost] if whole[cost] > 0 else None for cost in COSTS}


def _adam_for(run: Run, adams: Sequence[Run]) -> tuple[Run | None, str | None]:
    """The Adam run of the same name but for its kind, else the only one under the same conditions."""
    named = [adam for adam in adams if _rest(adam) == _rest(run)]
    differing = {adam.name: _differences(run, adam) for adam in adams}
    alike = [adam for adam in adams if not differing[adam.name]]
    if fitting := [adam for adam in named if adam in alike]:
        return fitting[0], None
    if len(alike) == 1:
        return alike[0], None
    if named:
        return None, f"{named[0].name} ran with another {' and '.join(differing[named[0].name])}"
    if alike:
        return None, f"cannot tell which Adam run it belongs to: {', '.join(adam.name for adam in alike)}"
    return None, "no Adam run under the same conditions"


def _tell_apart(runs: Sequence[Run]) -> None:
    """Name in each run the settings in which runs of its kind differ."""
    for kind in {run.kind for run in runs}:
        same = [run for run in runs if run.kind == kind]
        settings = [_settings(run) for run in same]
        names = dict.fromkeys(name for one in settings for name in one)
        differing = [n for n in names if len({repr(one[n]) for one in settings if n in one}) > 1]
        variants: dict[str, int] = {}
        for run, one in zip(same, settings, strict=True):
            run.variant = ", ".join(f"{name} {_short(one[name])}" for name in differing if name in one)
            run.variant_number = variants.setdefault(run.variant, len(variants))


def _settings(run: Run) -> dict[str, Any]:
    """What could tell a run from others of its kind; of the tuned one the rate is in its name already."""
    config, forward = run.log.config, run.log.config.get("fast_forward")
    free = {"seed", "lr"} if run.kind == "adam-tuned" or run.lr is None else {"seed"}
    own = {key: config[key] for key in CONDITIONS if key in config and key not in free}
    stages = {key: value for key, value in forward.items() if key != "search"} if forward else {}
    return {**own, **stages}


def _short(value: Any) -> str:
    if isinstance(value, str):
        return Path(value).name  # of a file, not somebody's folders
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differences(run: Run, adam: Run) -> list[str]:
    mine, other = run.log.config, adam.log.config
    free = ("lr",) if run.auto else MAY_DIFFER.get(run.kind, ())
    return [k for k in CONDITIONS if k not in free and k in mine and k in other and mine[k] != other[k]]


def _rest(run: Run) -> str:
    return run.name.lower().replace(run.kind, "", 1)


def _first_at(log: RunLog, target: float) -> dict[str, Any] | None:
    for event in log.tests:
        if event["loss"] <= target:
            return event
    if log.end is not None and _finite(log.end["test_loss"]) and log.end["test_loss"] <= target:
        return {**log.end, "optimizer_step": log.end["optimizer_steps"], "loss": log.end["test_loss"]}
    return None


def _costs(event: dict[str, Any]) -> dict[str, float]:
    return {
        "flops_paper": event["flops"]["paper"],
        "flops_measured": event["flops"]["measured"],
        "seconds": event["seconds"]["total"],
    }


def _entry(name: str, saved: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    """An entry under ``savings`` in report.json."""
    entry = {"name": name, **(saved or dict.fromkeys(COSTS))}
    return entry if reason is None else {**entry, "reason": reason}


def _place(kind: str) -> tuple[int, str]:
    return (KINDS.index(kind), "") if kind in KINDS else (KINDS.index("parabolic"), kind)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
