"""The end-to-end results in the paper's own form: FLOPs saved per task and learning rate (its Figure 2), time
saved likewise (its Figure 3), beside the ranges that it reports and beside a tuned learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from results_tables import Results, counted, named, percent, rate, table, where

# What the paper (arXiv 2409.04206) reports: its lowest and its highest saving, FLOPs in its own count.
PAPER = {"flops_paper": (0.41, 0.87), "seconds": (0.40, 0.81)}
KINDS = ("linear", "parabolic", "adam-tuned")
METHODS = {"lora": "LoRA", "dora": "DoRA"}


def end_to_end_files(results: Results) -> dict[str, Mapping[str, Any]]:
    return {
        name: data for name, data in results.items() if data.get("kind") == "end-to-end" and data["cells"]
    }


def spread(cell: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    return next((found for found in cell["spreads"] if found["kind"] == kind), None)


def saved(cell: Mapping[str, Any], kind: str, cost: str) -> str:
    """The median, and the range where there are several seeds; "not reached" where one of them did not."""
    found = spread(cell, kind)
    if found is None:
        return "–"
    if found["median"] is None:
        return "not reached"
    text = percent(found["median"][cost])
    if found["count"] > 1:
        low, high = (f"{100 * found[end][cost]:.0f}".replace("-", "−") for end in ("low", "high"))
        text += f" ({low} to {high})"
    return text


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
    return sorted(
        data["cells"],
        key=lambda c: (
            methods.index(c["method"]),
            c["batch_size"],
            tasks.index(c["task"]),
            c["tuned"],
            c["lr"],
        ),
    )


def figure(data: Mapping[str, Any], cost: str) -> str:
    cells = in_order(data)
    head = ["task", "learning rate", "`linear` (the paper's)", "`parabolic`", "Adam, tuned lr"]
    rows = [[*cell_label(cell, cells), *(saved(cell, kind, cost) for kind in KINDS)] for cell in cells]
    return table(head, rows)


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
    return table(head, rows)


def medians(data: Mapping[str, Any], kind: str, cost: str, tuned: bool = False) -> list[float]:
    """The medians of all cells but those at the tuned rate."""
    found = [spread(cell, kind) for cell in data["cells"] if cell["tuned"] == tuned]
    return [one["median"][cost] for one in found if one is not None and one["median"] is not None]


def between(values: Sequence[float]) -> str:
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def beside_the_paper(data: Mapping[str, Any]) -> str:
    """One paragraph: the paper's range and ours, and what ours is a saving against."""
    lines = []
    names = {"flops_paper": "of the FLOPs in the paper's count", "seconds": "of the time"}
    for cost, (low, high) in PAPER.items():
        paper = f"{100 * low:.0f} to {100 * high:.0f} %"
        ours = {kind: medians(data, kind, cost) for kind in ("parabolic", "linear")}
        cells = [f"{between(values)} with `{kind}`" for kind, values in ours.items() if values]
        lines.append(f"{names[cost]}: {paper} in the paper, {' and '.join(cells) or 'nothing measured'} here")
    text = f"Saved {'; '.join(lines)}. "
    text += "That is against Adam at the same learning rate; "
    tuned = medians(data, "adam-tuned", "flops_measured")
    rates = {task: rate(found["lr"]) for task, found in data["tuned"].items()}
    if tuned and rates:
        which = ", ".join(f"{lr} for {task}" for task, lr in rates.items())
        text += f"Adam at a tuned one ({which}) saves {between(tuned)} on the way to the same loss."
        at_tuned = medians(data, "parabolic", "flops_measured", tuned=True)
        if at_tuned:
            text += f" Started at the tuned rate itself, `parabolic` saves {between(at_tuned)}."
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
        seeds = {one["seed"] for cell in data["cells"] for one in cell["rounds"]}
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
            f"{where(data)}. `{data['command']}`; `{name}`.",
            beside_the_paper(data),
        ]
        if "note" in data:
            parts.append(f"Note: {data['note']}.")
        several = "; median, and range over the seeds" if len(seeds) > 1 else ""
        for caption, body in (
            (f"**FLOPs saved** (the paper's Figure 2), measured{several}:", figure(data, "flops_measured")),
            (
                "**FLOPs saved**, in the paper's count (3 × forward for a training step):",
                figure(data, "flops_paper"),
            ),
            ("**Time saved** (the paper's Figure 3):", figure(data, "seconds")),
            ("**Work done** until the target, medians:", work(data)),
        ):
            parts += [caption, body]
        parts += [f"![{alt}](images/{path})" for path, alt in pictures.get(name, ())]
        if data["left_out"]:
            parts.append(left_out(data["left_out"]))
    return "\n\n".join(parts)


def left_out(rounds: Sequence[Mapping[str, Any]]) -> str:
    """What was not measured, told once per cell."""
    cells = list(dict.fromkeys(one["cell"] for one in rounds))
    return f"Not measured, for want of time or as the file says: {', '.join(cells)}."


def end_to_end_short(results: Results) -> str:
    """For README: a line per task, the two searches' FLOPs and time saved at each learning rate."""
    files = end_to_end_files(results)
    if not files:
        return "*All three tasks: not measured yet (`make bench-e2e`).*"
    parts = []
    for data in files.values():
        # One table of one line per task: of LoRA at the smallest batch, which every task has.
        cells = [c for c in in_order(data) if not c["tuned"] and c["method"] == data["cells"][0]["method"]]
        cells = [c for c in cells if c["batch_size"] == min(c["batch_size"] for c in cells)]
        rates = sorted({cell["lr"] for cell in cells})
        by_place = {(cell["task"], cell["lr"]): cell for cell in cells}
        head = [named(data["config"]["model"])]
        head += [f"`{kind}`, lr {rate(lr)}" for kind in ("parabolic", "linear") for lr in rates]
        head.append(f"Adam, tuned lr, against {rate(rates[0])}")
        rows = []
        for task in dict.fromkeys(cell["task"] for cell in cells):
            row = [task]
            for kind, lr in [(kind, lr) for kind in ("parabolic", "linear") for lr in rates] + [
                ("adam-tuned", rates[0])
            ]:
                row.append(pair(by_place.get((task, lr)), kind))
            rows.append(row)
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def pair(cell: Mapping[str, Any] | None, kind: str) -> str:
    """FLOPs (measured) and time saved, medians."""
    found = spread(cell, kind) if cell is not None else None
    if found is None:
        return "–"
    if found["median"] is None:
        return "not reached"
    return f"{percent(found['median']['flops_measured'])}, {percent(found['median']['seconds'])}"
