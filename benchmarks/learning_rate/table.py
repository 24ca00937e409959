"""What a result says, in Markdown: where "auto" misses its bounds first.

For each workload and seed L* is Adam's lowest final test loss of all its rates, L₀ the loss before training.
"Above" is L / L* − 1; the share of the recoverable loss is (L − L*) / (L₀ − L*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from end_to_end_table import rate

from learning_rate.workloads import METHODS

Result = Mapping[str, Any]
Line = Mapping[str, Any]

# By group, what "auto" is held to: above L*, the median and the worst of tasks and seeds.
BOUNDS = {
    "constant, 120 steps": (0.015, 0.04),
    "linear, 120 steps": (0.03, 0.05),
    "constant, 1,200 steps": (0.005, 0.02),
    "linear, 1,200 steps": (0.005, 0.02),
    "methods": (0.03, 0.06),
    "steep": (0.03, 0.06),
}
SPIKE = 1.5  # of the test loss before training
COMMON = 3e-3  # what "auto" is held to on SmolLM2-135M is Adam there
LOW = (1e-4, 2e-4, 1e-3, 1e-2)


class Results:
    """The runs of a result, each beside Adam tuned on the same workload and seed."""

    def __init__(self, data: Result) -> None:
        self.workloads, self.runs = data["workloads"], data["runs"]
        self.tuned: dict[tuple[str, int], Line] = {}
        for line in self.runs:
            key = line["workload"], line["seed"]
            if line["contender"] == "adam" and line["loss"] is not None:
                if key not in self.tuned or line["loss"] < self.tuned[key]["loss"]:
                    self.tuned[key] = line

    def group(self, line: Line) -> str:
        return self.workloads[line["workload"]]["group"]

    def of(self, contender: str, lr: float | None = None) -> list[Line]:
        """The runs of a contender, where Adam was run as well."""
        return [
            line
            for line in self.runs
            if line["contender"] == contender
            and (lr is None or line["lr"] == lr)
            and (line["workload"], line["seed"]) in self.tuned
        ]

    @property
    def parts(self) -> dict[str, Callable[[Line], bool]]:
        """What is summed up: each group, and where it has several batches each of them."""
        found: dict[str, Callable[[Line], bool]] = {}
        groups = {self.group(line) for line in self.of("auto")}
        for group in sorted(groups, key=lambda name: [*BOUNDS, name].index(name)):
            found[group] = lambda line, group=group: self.group(line) == group
            batches = sorted({self.batch(line) for line in self.of("auto") if self.group(line) == group})
            for batch in batches if len(batches) > 1 else ():
                found[f"{group}, batch {batch}"] = lambda line, key=(group, batch): (
                    (self.group(line), self.batch(line)) == key
                )
        return found

    def batch(self, line: Line) -> int:
        return self.workloads[line["workload"]]["batch"]

    def above(self, line: Line) -> float:
        """Infinite where the loss is not finite."""
        best = self.tuned[line["workload"], line["seed"]]["loss"]
        return float("inf") if line["loss"] is None else line["loss"] / best - 1

    def share(self, line: Line) -> float:
        """Of the recoverable loss, what is not recovered; infinite where the loss is not finite."""
        best = self.tuned[line["workload"], line["seed"]]["loss"]
        return float("inf") if line["loss"] is None else (line["loss"] - best) / (line["start"] - best)

    def inside(self, workload: str) -> bool:
        """Whether the best rate of the first seed has a worse one at a factor of 2 on both sides."""
        seed = min(seed for name, seed in self.tuned if name == workload)
        best = self.tuned[workload, seed]["lr"]
        rates = {one["lr"] for one in self.of("adam") if (one["workload"], one["seed"]) == (workload, seed)}
        return {best / 2, 2 * best} <= rates


def spiked(line: Line) -> bool:
    """Whether a training loss was far above where it began, also where an overshoot was undone at once."""
    return line.get("worst") is None or line["worst"] > SPIKE


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    rule = f"|{'---|' * text_columns}{'---:|' * (len(head) - text_columns)}"
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, rule, *rest])


def percent(share: float) -> str:
    return "not finite" if share == float("inf") else f"{100 * share:+.1f} %".replace("-", "−")


def verdicts(data: Result) -> str:
    """What is held to bounds, and by which it is missed."""
    results, rows = Results(data), []
    for part, belongs in results.parts.items():
        lines = [line for line in results.of("auto") if belongs(line)]
        above, shares = ([f(line) for line in lines] for f in (results.above, results.share))
        both = {"median": median(above), "worst": max(above)}
        allowed = dict(zip(both, BOUNDS.get(part, ()), strict=False))
        missed = [word for word, bound in allowed.items() if round(both[word], 4) > bound]
        row = [part, str(len(lines)), *map(percent, both.values())]
        row += [percent(median(shares)), percent(max(shares)), str(sum(map(spiked, lines)))]
        row += [", ".join(map(percent, allowed.values())), " and ".join(missed) or ("–" if allowed else "")]
        rows.append(row)
    head = ["workloads", "runs", "above tuned Adam, median", "worst", "not recovered, median", "worst"]
    return markdown([*head, "spiked", "bounds (median, worst)", "missed"], rows)


def contenders(data: Result) -> str:
    """Every contender on the first seed: median and worst above tuned Adam, where all of a part was run."""
    results = Results(data)
    ways: list[tuple[str, str, float | None]] = [('`learning_rate="auto"`', "auto", None)]
    others = dict.fromkeys(line["contender"] for line in results.runs)
    ways += [(name, name, None) for name in others if name not in ("auto", "adam")]
    ways += [(f"Adam at {rate(lr)}", "adam", lr) for lr in LOW]
    parts = list(results.parts.items())
    if len(parts) > 1:  # a group that has its batches beside it is shown by those
        parts = [one for one in parts if not any(name.startswith(f"{one[0]}, batch") for name, _ in parts)]
    rows = []
    for label, contender, lr in ways:
        row = [label]
        for _, belongs in parts:
            mine, every = (
                [line for line in some if line["seed"] == 0 and belongs(line)]
                for some in (results.of(contender, lr), results.of("auto"))
            )
            values = [results.above(line) for line in mine]
            row.append(
                f"{percent(median(values))} ({percent(max(values))})" if len(mine) == len(every) else ""
            )
        if any(row[1:]):
            rows.append(row)
    return markdown(["above tuned Adam, median (worst), seed 0", *(name for name, _ in parts)], rows)


def workloads(data: Result) -> str:
    """A row per workload: what Adam was tuned to, and each seed's "auto"."""
    results, rows = Results(data), []
    for name in sorted({line["workload"] for line in results.of("auto")}, key=list(results.workloads).index):
        lines = sorted(
            (line for line in results.of("auto") if line["workload"] == name), key=lambda line: line["seed"]
        )
        best = results.tuned[name, lines[0]["seed"]]
        tuned = rate(best["lr"]) + ("" if results.inside(name) else " (at the grid's end)")
        rows.append(
            [
                labelled(results.workloads[name]),
                tuned,
                f"{best['start']:.3f}",
                f"{best['loss']:.4f}",
                ", ".join(percent(results.above(line)) for line in lines),
                ", ".join(percent(results.share(line)) for line in lines),
                each(lines, "rate", lambda value: rate(float(f"{value:.2g}"))),
                each(lines, "rise", str),
                each(lines, "undos", str),
            ]
        )
    head = ["workload", "Adam tuned at", "L₀", "L*", "auto above L*, by seed", "not recovered"]
    return markdown([*head, "last rate", "steps of rise", "undone"], rows)


def each(lines: Sequence[Line], name: str, show: Callable[[Any], str]) -> str:
    return ", ".join(show(line[name]) if line.get(name) is not None else "–" for line in lines)


def labelled(workload: Mapping[str, Any]) -> str:
    text = f"{workload['task']}, permuted" if workload["permuted"] else workload["task"]
    method = METHODS[workload["method"]].label
    return f"{method}, {text}, batch {workload['batch']}, {workload['steps']:,} steps, {workload['schedule']}"


def misses(data: Result) -> str:
    """Every run of "auto" beyond the worst that is allowed, or spiked."""
    results, found = Results(data), []
    for line in results.of("auto"):
        above, bound = results.above(line), BOUNDS.get(results.group(line), (0.0, float("inf")))[1]
        if round(above, 4) > bound or spiked(line):
            said = f"- {labelled(results.workloads[line['workload']])}, seed {line['seed']}: {percent(above)}"
            said += "" if line.get("rate") is None else f", rate {line['rate']:.2g} at its end"
            if spiked(line):
                worst = "not finite" if line.get("worst") is None else f"{line['worst']:.2f} L₀"
                said += f", a training loss {worst}"
            found.append(said)
    return "\n".join(found) or "*none.*"


def beside_common(data: Result) -> str:
    """ "auto" beside Adam at one common rate, task by task."""
    results, rows = Results(data), []
    for line in results.of("auto"):
        same = [one for one in results.of("adam", COMMON) if one["workload"] == line["workload"]]
        for other in (one for one in same if one["seed"] == line["seed"]):
            best = results.tuned[line["workload"], line["seed"]]
            rows.append(
                [
                    labelled(results.workloads[line["workload"]]),
                    f"{line['loss']:.4f}",
                    percent(line["loss"] / other["loss"] - 1),
                    f"{percent(results.above(line))} ({rate(best['lr'])})",
                    rate(float(f"{line['rate']:.2g}")),
                ]
            )
    head = ["workload", "auto", f"above Adam at {rate(COMMON)}", "above Adam's best (at)", "last rate"]
    return markdown(head, rows)


def summary(data: Result) -> str:
    tiny = data["config"]["model"] == "tiny"  # bounds are of the embedded model
    shown, other = (verdicts(data), contenders(data)) if tiny else (beside_common(data), "")
    words = "Beyond what is allowed in the worst case, or with a spike:"
    return "\n\n".join(part for part in (shown, words, misses(data), other) if part)


def all_tables(data: Result) -> str:
    return f"{summary(data)}\n\n{workloads(data)}"
