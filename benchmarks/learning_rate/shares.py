"""What a result of the kind ``rate_workloads`` says, in Markdown: where "auto" is beaten first.

A share is what a contender leaves of the loss that tuned Adam recovers, (L − L*) / (L₀ − L*), on one workload
and seed; see ``record.shares``. What never gets somewhere counts as infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from statistics import median
from typing import Any

from benchmarks.learning_rate.record import SHARES, called
from benchmarks.learning_rate.table import conditions, labelled
from benchmarks.tables import Results as Files
from benchmarks.tables import counted, markdown, missing, newest, rate, signed

Result = Mapping[str, Any]
Line = Mapping[str, Any]
Place = tuple[str, int]  # a workload's name and a seed
Point = Sequence[Any]  # of a curve: share of the budget, seconds, loss

NEAR = (0.02, 0.08)
NOTHING = "*No workload has been run to its end.*"
LABELS = {
    "auto": '`learning_rate="auto"`',
    "Thinking Machines": "Thinking Machines' rule",
    "sweep of 3": "sweep of 3 rates",
    "gen": "GeN",
    "gala": "GALA",
    "schedule-free+": "ScheduleFree+",
    "mechanic": "Mechanic",
    "prodigy": "Prodigy",
    "greedy": "GreedyLR",
    "lightning": "Lightning's `lr_find`",
}


class Shares:
    """The evaluation of a result.

    Attributes:
        places: every workload and seed, in the order of all lists.
        shares: by contender, its share on each place; infinite where it is not finite.
        tuned: by place, the oracle's run.
        runs: by place, the runs of the contenders by name.
    """

    def __init__(self, data: Result) -> None:
        self.entries = data["evaluation"]
        self.places = [(entry["workload"], seed) for entry in self.entries for seed in entry["seeds"]]
        self.shares: dict[str, list[float]] = {}
        for entry in self.entries:
            for name, values in entry["share"].items():
                self.shares.setdefault(name, []).extend(map(number, values))
        self.tuned: dict[Place, Line] = {}
        self.runs: dict[Place, dict[str, Line]] = {place: {} for place in self.places}
        naming = (data["config"]["constant"],), data["config"]["hypergradient"]
        for run in data["runs"]:
            place = run["workload"], run["seed"]
            if place not in self.runs:
                continue
            self.runs[place][called(run["contender"], run["lr"], *naming)] = run
            if run["contender"] == "adam" and run["loss"] is not None:
                best = self.tuned.get(place, run)
                self.tuned[place] = min(best, run, key=lambda one: (one["loss"], one["lr"]))

    @property
    def ranked(self) -> list[str]:
        """Contenders, the lowest median first; among equal ones the lower worst."""
        return sorted(self.shares, key=lambda name: (*both(self.shares[name]), name))

    def costs(self, name: str) -> list[tuple[float, float]]:
        """On each place, FLOPs and seconds until ``NEAR[0]`` of the oracle's recoverable loss is left.

        Both as multiples of what the oracle itself takes to get there. The loss is that of the curves, on a
        quarter of the test examples. Places where that is not below L₀ at the oracle's end are left out.
        """
        found = []
        for place in self.places:
            tuned, run = self.tuned[place], self.runs[place][name]
            curve, start = tuned.get("curve"), tuned["start"]
            if not curve or number(curve[-1][2]) >= start:
                continue
            target = curve[-1][2] + NEAR[0] * (start - curve[-1][2])
            own, other = (reached(c, start, target) for c in (curve, run.get("curve") or []))
            found.append((other[0] / own[0], other[1] / own[1]))
        return found


def number(value: float | None) -> float:
    return inf if value is None else value


def both(shares: Sequence[float]) -> tuple[float, float]:
    """Median and worst."""
    return median(shares), max(shares)


def reached(curve: Iterable[Point], start: float, target: float) -> tuple[float, float]:
    """Share of the budget and seconds until a curve is at ``target`` for the first time; infinite if never.

    Linear between points and from the loss ``start`` at no cost to the first point. Where more than a fifth
    of the budget went before the first point, something else than training took it: nothing is known to
    have been reached before that point.
    """
    before: tuple[float, float, float] | None = (0.0, 0.0, start)
    for part, seconds, value in curve:
        loss = number(value)
        if before is not None and before[0] == 0.0 and part > 0.2:
            before = None
        if loss <= target:
            if before is None or before[2] == inf:
                return part, seconds
            way = (before[2] - target) / (before[2] - loss)
            return before[0] + way * (part - before[0]), before[1] + way * (seconds - before[1])
        before = (part, seconds, loss)
    return inf, inf


def within(shares: Iterable[float], bound: float) -> int:
    return sum(share <= bound for share in shares)


def bold(row: Iterable[str]) -> list[str]:
    return [f"**{cell}**" for cell in row]


def label(name: str) -> str:
    return LABELS.get(name, name)


def multiple(values: Sequence[float]) -> str:
    """The median of multiples in words; "never" where it is infinite."""
    if not values:
        return "–"
    middle = median(values)
    return "never" if middle == inf else f"{middle:.2f}"


def standing(data: Result) -> str:
    """A row per contender over the evaluation."""
    shares, rows = Shares(data), []
    every = len(shares.places)
    tuned = ["Adam, tuned; its sweep charged to nobody", signed(0.0), signed(0.0), str(every), str(every)]
    rows.append([*tuned, "0", "1.00", "1.00"])
    for name in shares.ranked:
        mine, costs = shares.shares[name], shares.costs(name)
        row = [label(name), *map(signed, both(mine)), *(str(within(mine, bound)) for bound in NEAR)]
        row += [str(mine.count(inf)), *(multiple([cost[i] for cost in costs]) for i in range(2))]
        rows.append(bold(row) if name == "auto" else row)
    head = [f"not recovered, {counted(every, 'run')}", "median", "worst", "within 2 %", "within 8 %"]
    return markdown([*head, "not finite", "FLOPs to 2 %, × tuned Adam's", "seconds"], rows)


def shortlist(data: Result) -> str:
    """Of ``standing`` the five lowest medians, the two lowest worst cases, and what tutorials say."""
    shares = Shares(data)
    by_worst = sorted(shares.shares, key=lambda name: both(shares.shares[name])[::-1])
    chosen = {"auto", "Adam, 2e-4", *shares.ranked[:5], *by_worst[:2]}
    rows = []
    for name in (name for name in shares.ranked if name in chosen):
        mine = shares.shares[name]
        row = [label(name), *map(signed, both(mine)), str(within(mine, NEAR[0]))]
        rows.append(bold(row) if name == "auto" else row)
    head = [f"not recovered, {counted(len(shares.places), 'run')}", "median", "worst", "within 2 %"]
    return markdown(head, rows)


def beaten(data: Result) -> str:
    """Who is better than "auto" in median or in worst: first those better in both."""
    shares = Shares(data)
    mine, found = both(shares.shares["auto"]), []
    for name in shares.ranked:
        theirs = both(shares.shares[name])
        better = [their < my for their, my in zip(theirs, mine, strict=True)]
        if any(better):
            pairs = zip(("median", "worst"), theirs, mine, better, strict=True)
            parts = [
                f"{word} {signed(their)} against {signed(my)}" + ("" if yes else ", which is no better")
                for word, their, my, yes in sorted(pairs, key=lambda pair: not pair[3])
            ]
            closer = sum(o < a for o, a in zip(shares.shares[name], shares.shares["auto"], strict=True))
            said = f"- {label(name)}: {'; '.join(parts)}; lower in {closer} of {len(shares.places)} runs"
            found.append((-sum(better), said))
    return "\n".join(said for _, said in sorted(found, key=lambda one: one[0])) or "*none.*"


def span(data: Result) -> str:
    """How far the tuned rates of the workloads lie apart."""
    rates = {entry["workload"]: entry["tuned_lr"] for entry in data["evaluation"]}
    low, high = (of(rates, key=rates.get) for of in (min, max))
    ends = (f"{rate(rates[name])} ({labelled(data['workloads'][name])})" for name in (low, high))
    return (
        f"Tuned rates of {counted(len(rates), 'workload')} lie a factor of {rates[high] / rates[low]:,.0f} "
        f"apart, from {' to '.join(ends)}."
    )


def unfinished(data: Result) -> str:
    """What was begun and is in no table."""
    found = [
        f"- {labelled(data['workloads'][one['workload']])}, seed {one['seed']}: without "
        + ", ".join(map(label, one["missing"]))
        for one in data["incomplete"]
    ]
    return "\n".join(["Run only in part, and left out above:\n", *found]) if found else ""


def each_workload(data: Result) -> str:
    """A row per workload: what Adam was tuned to, each seed's "auto", and who comes closest besides."""
    shares, rows = Shares(data), []
    for entry in shares.entries:
        name, seeds = entry["workload"], entry["seeds"]
        tuned = [shares.tuned[name, seed] for seed in seeds]
        mine = [shares.runs[name, seed]["auto"] for seed in seeds]
        rivals = {rival: list(map(number, v)) for rival, v in entry["share"].items() if rival != "auto"}
        closest = min(rivals, key=lambda rival: (*both(rivals[rival]), rival))
        row = [labelled(data["workloads"][name])]
        row.append(rate(entry["tuned_lr"]) + ("" if entry["inside"] else " (at the grid's end)"))
        row.append(listed(entry["tuned_lrs"], rate))
        row.append(", ".join(dict.fromkeys(f"{one['start']:.3f}" for one in tuned)))
        row.append(listed([one["loss"] for one in tuned], "{:.4f}".format))
        row.append(listed(map(number, entry["share"]["auto"]), signed))
        row.append(listed([one.get("rate") for one in mine], lambda lr: rate(float(f"{lr:.2g}"))))
        rows.append([*row, label(closest), signed(median(rivals[closest]))])
    head = ["workload", "Adam tuned at, median", "by seed", "L₀", "L*", "auto: not recovered"]
    return markdown([*head, "last rate", "best of the others", "its median"], rows)


def listed(values: Iterable[Any], show: Callable[[Any], str]) -> str:
    """One per seed."""
    return ", ".join("–" if value is None else show(value) for value in values)


def candidates(data: Result) -> str:
    """What the constant rate and the hypergradient's step are chosen from: over the calibration."""
    found: dict[str, list[float]] = {}
    for entry in data["calibration"]:
        for name, values in entry["share"].items():
            found.setdefault(name, []).extend(map(number, values))
    rows, lowest = [], {}
    for name in sorted(found, key=lambda name: (family(name), *both(found[name]), name)):
        chosen = name != "auto" and lowest.setdefault(family(name), name) == name
        row = [label(name), *map(signed, both(found[name]))]
        rows.append(bold(row) if chosen else row)
    runs = sum(len(entry["seeds"]) for entry in data["calibration"])
    return markdown([f"not recovered, calibration, {counted(runs, 'run')}", "median", "worst"], rows)


def family(name: str) -> int:
    """Which of the choices a candidate belongs to."""
    return next((i for i, word in enumerate(("auto", "Adam", "hypergradient")) if name.startswith(word)), 3)


def calibrated(data: Result) -> str:
    """The candidates, and which of them the evaluation was run with."""
    config = data["config"]
    if not data["calibration"]:
        return ""
    return (
        "Calibration, the lowest median of each kind bold; the evaluation has Adam at "
        f"{rate(config['constant'])} and {config['hypergradient']}:\n\n{candidates(data)}"
    )


def summary(data: Result) -> str:
    if not data["evaluation"]:
        return "\n\n".join(part for part in (NOTHING, unfinished(data)) if part)
    better = f'Better than `learning_rate="auto"` in median or in worst:\n\n{beaten(data)}'
    return "\n\n".join(part for part in (better, standing(data), span(data), unfinished(data)) if part)


def all_tables(data: Result) -> str:
    parts = (summary(data), each_workload(data) if data["evaluation"] else "", calibrated(data))
    return "\n\n".join(part for part in parts if part)


def measured(name: str, data: Result) -> str:
    """The conditions, and on what else than this machine some of the runs were made."""
    others = dict.fromkeys(run["cpu"] for run in data["runs"] if "cpu" in run)
    return conditions(name, data) + (f" Some runs: {', '.join(others)}." if others else "")


def rate_workloads(results: Files, picture: Callable[[Result], str] = lambda data: "") -> str:
    """The newest result: who beats "auto", everyone's standing, the picture."""
    found = newest(results, SHARES)
    if found is None:
        return missing("learning_rate --plan workloads")
    parts = (measured(*found), summary(found[1]), picture(found[1]))
    return "\n\n".join(part for part in parts if part)


def rate_workloads_short(results: Files) -> str:
    """The newest result in few rows."""
    found = newest(results, SHARES)
    return missing("learning_rate --plan workloads") if found is None else shortlist(found[1])


def rate_workloads_each(results: Files) -> str:
    """The newest result, a row per workload, and its calibration."""
    found = newest(results, SHARES)
    if found is None:
        return missing("learning_rate --plan workloads")
    name, data = found
    rows = each_workload(data) if data["evaluation"] else NOTHING
    return "\n\n".join(part for part in (f"`{name}`:", rows, calibrated(data)) if part)
