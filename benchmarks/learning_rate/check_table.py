"""What `make gpu-check` says of learning rates: aligned columns for a terminal, and targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.learning_rate.table import BOUNDS, Line, Result, Results, place
from benchmarks.tables import aligned, named, rate, signed, target

HEAD = ("workload", "Adam at", "L0", "Adam", "auto", "above", "last rate", "ms, Adam", "ms, auto", "GB, auto")
MOST = BOUNDS["methods"][1]


def autos(data: Result) -> list[Line]:
    return [line for line in data["runs"] if line["contender"] == "auto" and "failed" not in line]


def render_rates(data: Result) -> list[str]:
    """A line per run of "auto", beside the best that Adam's sweep has found by then."""
    results, rows, config = Results(data), [], data["config"]
    for line in autos(data):
        best = results.tuned.get(place(line))
        at = "–"
        if best is not None:
            inside = line["seed"] or results.inside(line["workload"])
            at = rate(best["lr"]) + ("" if inside else " (at the end)")
        rows.append([f"{line['workload'].removeprefix(config['model'] + ', ')}, seed {line['seed']}", at])
        rows[-1] += [f"{line['start']:.3f}", shown(best, "loss", ".4f"), shown(line, "loss", ".4f")]
        rows[-1] += [signed(None if best is None else results.above(line)), shown(line, "rate", ".2g")]
        rows[-1] += [shown(one, "seconds_per_step", ".1f", 1000) for one in (best, line)]
        rows[-1].append(shown(line, "peak_gigabytes", ".2f"))
    lines = [
        "",
        f'learning rates on {named(config["model"])}: "auto" beside the best of Adam\'s sweep;',
        "final test losses, median milliseconds of a step, most gigabytes allocated",
        aligned(HEAD, rows),
    ]
    if config["weights"] == "random":
        lines.append("-- weights are random: rates and losses say nothing of a pretrained model")
    if not data["fast"] and not any(one["task"] == "medical" for one in data["workloads"].values()):
        lines.append("-- nothing on medical: no time was left, or its package simple-icd-10-cm is not there")
    lines += [f"failed: {one['workload']}: {one['failed']}" for one in data["runs"] if "failed" in one]
    return lines


def shown(line: Mapping[str, Any] | None, name: str, form: str, times: float = 1) -> str:
    """Of a run the value as text; a dash where there is none."""
    value = None if line is None else line.get(name)
    return "–" if value is None else f"{times * value:{form}}"


def rate_targets(data: Result) -> list[dict[str, Any]]:
    """What "auto" has to reach beside a whole sweep; empty for what says nothing of a pretrained model."""
    if data["fast"] or data["config"]["weights"] != "pretrained":
        return []
    results, found = Results(data), []
    for line in autos(data):
        if line["seed"] or place(line) not in results.tuned or not results.inside(line["workload"]):
            continue
        above = results.above(line)
        what = f'"auto" at most {signed(MOST)} above tuned Adam, {line["workload"]}'
        found.append(target(what, above <= MOST, signed(above)))
    return found
