"""The end-to-end results in the paper's own form: FLOPs saved per task and learning rate (its Figure 2), time
saved likewise (its Figure 3), beside the ranges that it reports and beside a tuned learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.end_to_end.table import spread
from benchmarks.tables import Results, counted, markdown, named, percent, rate, where

# What the paper (arXiv 2409.04206) reports: its lowest and its highest saving, FLOPs in its own count.
PAPER = {"flops_paper": (0.41, 0.87), "seconds": (0.40, 0.81)}
KINDS = ("linear", "parabolic", "adam-tuned")
METHODS = {"lora": "LoRA", "dora": "DoRA"}


def end_to_end_files(results: Results) -> dict[str, Mapping[str, Any]]:
    """Those that mean something: a --fast one does not."""
    found = {name: data for name, data in results.items() if data.get("kind") == "end-to-end"}
    return {name: data for name, data in found.items() if data["cells"] and not data["fast"]}


def seeds_of(data: Mapping[str, Any]) -> set[int]:
    return {one["seed"] for cell in data["cells"] for one in cell["rounds"]}


def saved(cell: Mapping[str, Any], kind: str, cost: str, seeds: int) -> str:
    """The median, and the range over the seeds; how many they are where not all ``seeds`` were measured.

    "not reached" where one of them did not get to Adam's test loss.
    """
    found = spread(cell, kind)
    if found is None:
        return "–"
    if found["median"] is None:
        return "not reached"
    words = []
    if found["count"] > 1:
        low, high = (f"{100 * found[end][cost]:.0f}".replace("-", "−") for end in ("low", "high"))
        words.append(f"{low} to {high}")
    if found["count"] < seeds:
        words.append(f"{found['count']} of {seeds} seeds")
    return percent(found["median"][cost]) + (f" ({'; '.join(words)})" if words else "")


def cell_label(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Task, what else tells the cells of this file apart, learning rate."""
    words = [cell["task"]]
    if len({c["method"] for c in cells}) > 1:
        words.append(METHODS.get(cell["method"], cell["method"]))
    if len({c["batch_size"] for c in cells}) > 1:
        words.append(f"batch {cell['batch_size']}")
    return [", ".join(words), rate(cell["lr"]) + (" (tuned)" if cell["tuned"] else "")]


def in_order(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells as one reads them: by method, batch, task and rate, the tuned rate last."""
    tasks = list(dict.fromkeys(cell["task"] for cell in data["cells"]))
    methods = list(dict.fromkeys(cell["method"] for cell in data["cells"]))

    def key(c: Mapping[str, Any]) -> tuple:
        return methods.index(c["method"]), c["batch_size"], tasks.index(c["task"]), c["tuned"], c["lr"]

    return sorted(data["cells"], key=key)


def of_smallest_batch(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The cells for which there is room in a picture or a short table; the long tables have them all."""
    smallest = min(cell["batch_size"] for cell in cells)
    return [cell for cell in cells if cell["batch_size"] == smallest]


def figure(data: Mapping[str, Any], cost: str) -> str:
    cells, seeds = in_order(data), len(seeds_of(data))
    head = ["task", "learning rate", "`linear` (the paper's)", "`parabolic`", "Adam, tuned lr"]
    rows = [[*cell_label(cell, cells), *(saved(cell, kind, cost, seeds) for kind in KINDS)] for cell in cells]
    return markdown(head, rows)


def work(data: Mapping[str, Any]) -> str:
    """Optimizer steps, validation losses and how far the first stage went: medians over the seeds."""
    cells = in_order(data)
    head = ["task", "learning rate", "Adam: steps", "`linear`: steps, validations, first τ*"]
    head += ["`parabolic`: steps, validations, first τ*", "Adam, tuned lr: steps"]
    rows = []
    for cell in cells:
        row = cell_label(cell, cells)
        for kind in ("adam", *KINDS):
            runs = [run for one in cell["rounds"] for run in one["runs"] if run["kind"] == kind]
            if not runs:
                row.append("–")
                continue
            numbers = [median(run["optimizer_steps"] for run in runs)]
            if kind in ("linear", "parabolic"):
                numbers.append(median(run["validation_forwards"] for run in runs))
                first = [run["taus"][0][1] for run in runs if run["taus"]]
                numbers += [median(first)] if first else []
            row.append(", ".join(f"{number:g}" for number in numbers))
        rows.append(row)
    return markdown(head, rows)


def between(data: Mapping[str, Any], kind: str, cost: str, tuned: bool = False) -> str | None:
    """From the least to the largest median of the cells at given rates, or of those at the tuned rate.

    Says in how many cells the target was missed; None where there is no cell.
    """
    cells = (cell for cell in data["cells"] if cell["tuned"] == tuned)
    found = [one for cell in cells if (one := spread(cell, kind)) is not None]
    values = [one["median"][cost] for one in found if one["median"] is not None]
    if not found:
        return None
    missed = f"target not reached in {len(found) - len(values)} of {counted(len(found), 'cell')}"
    if not values:
        return f"nothing ({missed})"
    low, high = percent(min(values)), percent(max(values))
    text = low if low == high else f"{low.removesuffix(' %')} to {high}"
    return text if len(values) == len(found) else f"{text} ({missed})"


def beside_the_paper(data: Mapping[str, Any]) -> str:
    """One paragraph: the paper's range and ours, and what ours is a saving against."""
    lines = []
    names = {"flops_paper": "of the FLOPs in the paper's count", "seconds": "of the time"}
    for cost, (low, high) in PAPER.items():
        paper = f"{100 * low:.0f} to {100 * high:.0f} %"
        ours = {kind: between(data, kind, cost) for kind in ("parabolic", "linear")}
        cells = [f"{range_} with `{kind}`" for kind, range_ in ours.items() if range_]
        lines.append(f"{names[cost]}: {paper} in the paper, {' and '.join(cells) or 'nothing measured'} here")
    text = f"Saved {'; '.join(lines)}. "
    text += "That is against Adam at the same learning rate; "
    tuned = between(data, "adam-tuned", "flops_measured")
    rates = {task: rate(found["lr"]) for task, found in data["tuned"].items()}
    if tuned and rates:
        which = ", ".join(f"{lr} for {task}" for task, lr in rates.items())
        text += f"Adam at a tuned one ({which}) saves {tuned} on the way to the same loss."
        if at_tuned := between(data, "parabolic", "flops_measured", tuned=True):
            text += f" Started at the tuned rate itself, `parabolic` saves {at_tuned}."
    return text


def end_to_end(results: Results, pictures: Mapping[str, Sequence[str]]) -> str:
    """All of it for every end-to-end result; ``pictures`` are the plots of each by the name of its file."""
    files = end_to_end_files(results)
    if not files:
        return "*Not measured yet: `make bench-e2e`.*"
    parts = []
    for name, data in files.items():
        config = data["config"]
        methods = sorted({cell["method"] for cell in data["cells"]}, reverse=True)
        seeds = seeds_of(data)
        commits = {one.get("git_commit") or "?" for cell in data["cells"] for one in cell["rounds"]}
        batches = sorted({cell["batch_size"] for cell in data["cells"]})
        title = named(config["model"])
        parts += [
            f"### {title[0].upper()}{title[1:]}",
            f"{' and '.join(METHODS.get(m, m) for m in methods)} r = {config['rank']}, "
            f"α = {config['alpha']:g} on attention, {config['dtype']} base, "
            f"batch {', '.join(map(str, batches))}, {config['steps']} Adam steps, "
            f"{config['max_length']} tokens per example, constant learning rate after "
            f"{config['warmup_steps']} warm-up steps, {config['test_examples']} test and "
            f"{config['validation_examples']} validation examples, {counted(len(seeds), 'seed')}. "
            f"{where(data)}; commit {', '.join(sorted(commits))}. `{data['command']}`; `{name}`.",
            beside_the_paper(data),
        ]
        if "note" in data:
            parts.append(f"Note: {data['note']}.")
        several = "; median, and range over the seeds" if len(seeds) > 1 else ""
        if several and any(found["median"] is None for cell in data["cells"] for found in cell["spreads"]):
            several += "; “not reached”: by one of them at least"
        parts += [
            f"**FLOPs saved** (the paper's Figure 2), measured{several}:",
            figure(data, "flops_measured"),
            "**FLOPs saved**, in the paper's count (3 × forward for a training step):",
            figure(data, "flops_paper"),
            "**Time saved** (the paper's Figure 3):",
            figure(data, "seconds"),
            "**Work done** until the target, medians:",
            work(data),
        ]
        parts += [f"![{alt}](images/{path})" for path, alt in pictures.get(name, ())]
        if data["left_out"]:
            parts.append(left_out(data["left_out"]))
    return "\n\n".join(parts)


def left_out(rounds: Sequence[Mapping[str, Any]]) -> str:
    """What was not measured, or not to its end: each cell with its seeds."""
    seeds: dict[str, list[int]] = {}
    for one in rounds:
        seeds.setdefault(one["cell"], []).append(one["seed"])
    cells = [
        f"{cell} (seed{'s' * (len(of) > 1)} {', '.join(map(str, sorted(of)))})" for cell, of in seeds.items()
    ]
    return f"Not measured to the end, for want of time or as the file says: {'; '.join(cells)}."
