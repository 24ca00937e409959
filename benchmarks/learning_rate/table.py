"""What a result says, in Markdown: where "auto" misses its bounds first.

For each workload and seed L* is Adam's lowest final test loss of all its rates, L₀ the loss before training.
"Above" is L / L* − 1; the share of the recoverable loss is (L − L*) / (L₀ − L*).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.learning_rate.plan import LOW, smollm2
from benchmarks.learning_rate.workloads import METHODS
from benchmarks.tables import Results as Files
from benchmarks.tables import counted, heading, markdown, missing, rate, source, where
from benchmarks.tables import signed as percent

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
CLOSE = 0.03  # above tuned Adam, of a cell of SmolLM2-135M


class Results:
    """The runs of a result, each beside Adam tuned on the same workload and seed."""

    def __init__(self, data: Result) -> None:
        self.workloads, runs = data["workloads"], data["runs"]
        adam: dict[tuple[str, int], list[Line]] = {}
        for line in runs:
            if line["contender"] == "adam" and line["loss"] is not None:
                adam.setdefault(place(line), []).append(line)
        self.tuned = {where: min(lines, key=lambda line: line["loss"]) for where, lines in adam.items()}
        self.runs = [line for line in runs if place(line) in self.tuned]

    def labels(self, line: Line) -> tuple[str, str]:
        """The parts that a run may belong to."""
        workload = self.workloads[line["workload"]]
        return workload["group"], f"{workload['group']}, batch {workload['batch']}"

    def of(self, contender: str, lr: float | None = None) -> list[Line]:
        """The runs of a contender, where Adam was run as well."""
        return [one for one in self.runs if one["contender"] == contender and lr in (None, one["lr"])]

    @property
    def parts(self) -> list[str]:
        """What is summed up: each group, and where it has several batches each of them."""
        found: dict[str, set[int]] = {}
        for line in self.of("auto"):
            workload = self.workloads[line["workload"]]
            found.setdefault(workload["group"], set()).add(workload["batch"])
        parts = []
        for group in sorted(found, key=lambda name: [*BOUNDS, name].index(name)):
            parts.append(group)
            if len(found[group]) > 1:
                parts += [f"{group}, batch {batch}" for batch in sorted(found[group])]
        return parts

    def above(self, line: Line) -> float:
        """Infinite where the loss is not finite."""
        best = self.tuned[place(line)]["loss"]
        return float("inf") if line["loss"] is None else line["loss"] / best - 1

    def share(self, line: Line) -> float:
        """Of the recoverable loss, what is not recovered; infinite where the loss is not finite."""
        best = self.tuned[place(line)]["loss"]
        return float("inf") if line["loss"] is None else (line["loss"] - best) / (line["start"] - best)

    def inside(self, workload: str) -> bool:
        """Whether the best rate of the first seed has a worse one at a factor of 2 on both sides."""
        seed = min(seed for name, seed in self.tuned if name == workload)
        best = self.tuned[workload, seed]["lr"]
        rates = {one["lr"] for one in self.of("adam") if place(one) == (workload, seed)}
        return {best / 2, 2 * best} <= rates


def place(line: Line) -> tuple[str, int]:
    return line["workload"], line["seed"]


def spiked(line: Line) -> bool:
    """Whether a training loss was far above where it began, also where an overshoot was undone at once."""
    return line.get("worst") is None or line["worst"] > SPIKE


def verdicts(data: Result) -> str:
    """What is held to bounds, and by which it is missed."""
    results, rows = Results(data), []
    for part in results.parts:
        lines = [line for line in results.of("auto") if part in results.labels(line)]
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
    # A group that has its batches beside it is shown by those.
    parts = [p for p in results.parts if not any(one.startswith(f"{p}, batch") for one in results.parts)]
    rows = []
    for label, contender, lr in ways:
        row = [label]
        for part in parts:
            mine, every = (
                [line for line in some if line["seed"] == 0 and part in results.labels(line)]
                for some in (results.of(contender, lr), results.of("auto"))
            )
            above = [results.above(line) for line in mine]
            whole = len(mine) == len(every)
            row.append(f"{percent(median(above))} ({percent(max(above))})" if whole else "")
        if any(row[1:]):
            rows.append(row)
    return markdown(["above tuned Adam, median (worst), seed 0", *parts], rows)


def workloads(data: Result) -> str:
    """A row per workload: what Adam was tuned to, and each seed's "auto"."""
    results, rows = Results(data), []
    for name in sorted({line["workload"] for line in results.of("auto")}, key=list(results.workloads).index):
        lines = [line for line in results.of("auto") if line["workload"] == name]
        lines.sort(key=lambda line: line["seed"])
        best = results.tuned[name, lines[0]["seed"]]
        tuned = rate(best["lr"]) + ("" if results.inside(name) else " (at the grid's end)")
        row = [labelled(results.workloads[name]), tuned, f"{best['start']:.3f}", f"{best['loss']:.4f}"]
        row += [", ".join(percent(f(line)) for line in lines) for f in (results.above, results.share)]
        row.append(each(lines, "rate", lambda value: rate(float(f"{value:.2g}"))))
        rows.append([*row, each(lines, "rise", str), each(lines, "undos", str)])
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
        above, bound = results.above(line), BOUNDS.get(results.labels(line)[0], (0.0, float("inf")))[1]
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
        for other in (one for one in results.of("adam", COMMON) if place(one) == place(line)):
            best = results.tuned[place(line)]
            row = [labelled(results.workloads[line["workload"]]), f"{line['loss']:.4f}"]
            row.append(percent(line["loss"] / other["loss"] - 1))
            row.append(f"{percent(results.above(line))} ({rate(best['lr'])})")
            rows.append([*row, rate(float(f"{line['rate']:.2g}"))])
    head = ["workload", "auto", f"above Adam at {rate(COMMON)}", "above Adam's best (at)", "last rate"]
    return markdown(head, rows)


def planned() -> dict[str, int]:
    """The cells of the plan ``smollm2``, which differ in method, task and batch, each with its seeds."""
    return Counter(item.workload.name for item in smollm2() if item.contender == "auto")


def cells(data: Result) -> str:
    """A row per cell of SmolLM2-135M with its seeds, and how many runs are close."""
    results, rows, above, tuned = Results(data), [], [], {}
    for name in planned():
        lines = [line for line in results.of("auto") if line["workload"] == name]
        if not lines:
            continue
        lines.sort(key=lambda line: line["seed"])
        workload, best = results.workloads[name], results.tuned[place(lines[0])]
        above += map(results.above, lines)
        tuned[name] = best["lr"]
        row = [METHODS[workload["method"]].label, workload["task"], str(workload["batch"])]
        row += [", ".join(percent(f(line)) for line in lines) for f in (results.above, results.share)]
        row.append(rate(best["lr"]) + ("" if results.inside(name) else " (at the grid's end)"))
        rows.append([*row, each(lines, "rate", lambda value: rate(float(f"{value:.2g}")))])
    if not rows:
        return "*No cell has been run to its end.*"
    near = sum(value <= CLOSE for value in above)
    rest = sum(planned().values()) - len(above)
    low, high = (of(tuned, key=tuned.get) for of in (min, max))
    words = (
        f"{near} of {counted(len(above), 'run')} in {counted(len(rows), 'cell')} end within "
        f"{100 * CLOSE:.0f} % of the loss of tuned Adam"
        + (f" ({counted(rest, 'run')} of the plan left)" if rest else "")
        + f"; tuned rates lie a factor of {tuned[high] / tuned[low]:.0f} apart, from {rate(tuned[low])} to "
        f"{rate(tuned[high])}."
    )
    head = ["method", "task", "batch", "auto above tuned Adam, by seed", "not recovered"]
    head += ["Adam tuned at", "rate found"]
    return f"{words}\n\n{markdown(head, rows, text_columns=2)}"


def smollm2_result(results: Files) -> tuple[str, Result] | None:
    """The newest result that has cells of the plan; earlier ones had two shorter workloads."""
    found = newest_of_each(results).get("smollm2-135m")
    return found if found is not None and planned().keys() & found[1]["workloads"].keys() else None


def smollm2_rates(results: Files) -> str:
    """The cells of SmolLM2-135M."""
    found = smollm2_result(results)
    if found is None:
        return missing("learning_rate --plan smollm2")
    return f"{conditions(*found)}\n\n{cells(found[1])}"


def summary(data: Result) -> str:
    tiny = data["config"]["model"] == "tiny"  # bounds are of the embedded model
    shown, other = (verdicts(data), contenders(data)) if tiny else (beside_common(data), "")
    words = "Beyond what is allowed in the worst case, or with a spike:"
    return "\n\n".join(part for part in (shown, words, misses(data), other) if part)


def all_tables(data: Result) -> str:
    if planned().keys() & data["workloads"].keys():
        return cells(data)
    return f"{summary(data)}\n\n{workloads(data)}"


def newest_of_each(results: Files) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """By model, the embedded one first."""
    found = {
        data["config"]["model"]: (name, data)
        for name, data in sorted(results.items())
        if data.get("kind") == "alignment_rates" and not data["fast"]
    }
    return dict(sorted(found.items(), key=lambda one: one[0] != "tiny"))


def learning_rates(results: Files) -> str:
    """ "auto" beside its bounds and beside the other contenders, what misses first."""
    found = newest_of_each(results)
    if smollm2_result(results) is not None:
        del found["smollm2-135m"]  # has a table of its own
    return "\n\n".join(f"{conditions(*one)}\n\n{summary(one[1])}" for one in found.values()) or missing(
        "learning_rate"
    )


def learning_rates_by_workload(results: Files) -> str:
    """A row per workload."""
    parts = []
    for model, (name, data) in newest_of_each(results).items():
        parts.append(f"{heading(model)} (`{name}`):\n\n{workloads(data)}")
    return "\n\n".join(parts) or missing("learning_rate")


def conditions(name: str, data: Mapping[str, Any]) -> str:
    """The conditions of the measurement."""
    config, versions = data["config"], data["versions"]
    return (
        f"{heading(config['model'])}; rank {config['rank']} on attention but where said, "
        f"{config['max_length']} tokens per example, {config['optimizer']}, warm-up steps "
        f"{config['warmup_steps']}. {where(data)}; commit {versions['git_commit']} "
        f"{source(name, data)}."
    )
