"""What `benchmarks/learning_rate.py` has measured, for the documentation: failures first, then the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from end_to_end_table import rate
from learning_rate_plan import SWEEP
from learning_rate_table import (
    FORWARDS,
    NAMES,
    NEAR,
    STANDARD,
    Line,
    compared,
    conditions,
    diverged,
    failures,
    flops_to,
    gap,
    tuned,
    verdicts,
)
from results_tables import Results, counted, heading, percent, signed, table, where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "learning_rate"
PICTURE = "learning_rate.png"
NOTHING = "*Not measured yet: `python benchmarks/learning_rate.py`.*"


def result_of(results: Results) -> tuple[str, Mapping[str, Any]] | None:
    """The newest result on the embedded model."""
    names = [
        name
        for name, data in results.items()
        if data.get("kind") == KIND and data["config"]["model"] == "tiny" and not data["fast"]
    ]
    return (max(names), results[max(names)]) if names else None


def learning_rates(results: Results) -> str:
    """All of it."""
    found = result_of(results)
    others = [real(*one) for one in others_of(results)]
    if found is None:
        return "\n\n".join(others) or NOTHING
    name, data = found
    lines = data["runs"]
    broken = failures(lines)
    parts = [
        said(name, data),
        f"What failed ({counted(len(broken), 'line')}):",
        "\n".join(f"- {line}" for line in broken) or "*nothing.*",
        'What was to be shown of `learning_rate="find"`, from 1e-5 to 1e-2:',
        held(lines),
        "Every way beside it, constant rate, standard settings, medians over tasks and seeds:",
        ways(lines),
        "What the part of the best update was chosen by (test loss at equal FLOPs):",
        parts_tried(data["calibration"], lines),
        *others,
    ]
    return "\n\n".join(parts)


def learning_rates_short(results: Results) -> str:
    """What was shown of the finder, on each model."""
    found = result_of(results)
    if found is None:
        return NOTHING
    parts = [said(*found), held(found[1]["runs"])]
    for _, data in others_of(results):
        best = tuned([*data["runs"], *data["calibration"]])
        mine = [line for line in compared(data["runs"], contender="find") if conditions(line) in best]
        gaps = [one for line in mine if (one := gap(line, best)) is not None]
        config, near = data["config"], sum(one <= NEAR for one in gaps)
        batch = f"batch {config['batch_size']} × {config['max_length']} tokens"
        parts.append(
            f"{heading(config['model'])}, {batch}, the FLOPs of {config['steps']} Adam steps: within "
            f"{percent(NEAR)} in {near} of {len(mine)} runs; the worst is {signed(max(gaps))}."
        )
    return "\n\n".join(parts)


def parts_tried(lines: Sequence[Line], runs: Sequence[Line]) -> str:
    """Final test loss by part of the best update, and Adam's at the best of the rates that were tried."""
    tried = [f"best*{part:g}" for part in (0.7, 1, 1.4)]
    best, rows = tuned([*lines, *runs]), []
    found = {(conditions(line), line["lr"]) for line in lines if line["contender"] in tried}
    for key, lr in sorted(found, key=str):
        task, seed, schedule, _, steps = key
        same = [line for line in compared(lines, lr=lr) if conditions(line) == key]
        losses = {line["contender"]: line["loss"] for line in same}
        adam = best.get(key)
        row = [f"{schedule}, {steps} steps, {task}, seed {seed}, from {rate(lr)}"]
        row += [f"{losses[one]:.4f}" if losses.get(one) else "" for one in tried]
        rows.append([*row, "" if adam is None else f"{adam['loss']:.4f} at {rate(adam['lr'])}"])
    return table(["conditions", "× 0.7", "× 1", "× 1.4", "Adam, best rate tried"], rows)


def others_of(results: Results) -> list[tuple[str, Mapping[str, Any]]]:
    """The newest result on each other model."""
    newest = {
        data["config"]["model"]: (name, data)
        for name, data in sorted(results.items())
        if data.get("kind") == KIND and not data["fast"]
    }
    return [one for model, one in newest.items() if model != "tiny"]


def real(name: str, data: Mapping[str, Any]) -> str:
    """Every run on a real model; what it ended at beside Adam, at equal FLOPs and at as many steps."""
    lines = [*data["runs"], *data["calibration"]]
    best, rows = tuned(lines), []
    for line in sorted(lines, key=lambda line: data["config"]["tasks"].index(line["task"])):
        if conditions(line) not in best:
            continue
        adam = best[conditions(line)]
        over, same = gap(line, best), loss_at(adam, line["optimizer_steps"])
        apart = None if over is None or same is None else line["loss"] / same - 1
        rows.append(
            [
                line["task"],
                NAMES.get(line["contender"], line["contender"]),
                rate(line["lr"]),
                "–" if line["found"] is None else rate(float(f"{line['found']:.2g}")),
                str(line["optimizer_steps"]),
                str(line["forwards"]),
                "not finite" if line["loss"] is None else f"{line['loss']:.3f}",
                "diverged" if diverged(line) else signed(over),
                "diverged" if diverged(line) else signed(apart),
            ]
        )
    head = ["task", "way", "begins at", "found", "steps", "validation losses", "test loss"]
    head += ["above the sweep's best, equal FLOPs", "equal steps"]
    broken = failures(data["runs"])
    parts = [said(name, data)]
    if broken:
        parts += [f"What failed ({counted(len(broken), 'line')}):", "\n".join(f"- {line}" for line in broken)]
    return "\n\n".join([*parts, table(head, rows, text_columns=2)])


def loss_at(line: Line, steps: int) -> float | None:
    """A run's test loss after so many steps, between measured ones in proportion."""
    for (low, _, before), (high, _, after) in pairwise(line["curve"]):
        if low <= steps <= high and None not in (before, after):
            return before + (after - before) * (steps - low) / (high - low)
    return None


def said(name: str, data: Mapping[str, Any]) -> str:
    """The conditions of the measurement."""
    config = data["config"]
    seeds = sorted({line["seed"] for line in data["runs"]})
    tasks, which = ", ".join(config["tasks"]), ", ".join(map(str, seeds))
    return (
        f"{heading(config['model'])}; {tasks}; LoRA r = {config['rank']} on attention, {config['dtype']} "
        f"base, AdamW, batch {config['batch_size']} × {config['max_length']} tokens, the FLOPs of "
        f"{config['steps']} Adam steps, {config['warmup_steps']} of them warm-up; "
        f"{config['test_examples']} test and "
        f"{config['validation_examples']} validation examples; seeds {which}. {where(data)} "
        f"(`{data['command']}`; `{name}`)."
    )


def held(lines: Sequence[Line]) -> str:
    """The finder beside what was asked of it."""
    rows = []
    for one in verdicts(lines):
        label = one["schedule"] + ("" if one["variant"] == "standard" else f", {one['variant']}")
        label += "" if one["steps"] == STANDARD else f", {one['steps']} steps"
        middle, most = one["forwards"]
        rows.append(
            [
                label,
                str(one["runs"]),
                percent(one["near"]),
                signed(one["median"]),
                signed(one["worst"]),
                str(one["diverged"]),
                f"{middle:.0f} ({most})",
            ]
        )
    head = ["schedule", "runs", f"within {percent(NEAR)} of tuned Adam", "median", "worst"]
    return table([*head, "diverged", f"validation losses, median (most; {FORWARDS} allowed)"], rows)


def ways(lines: Sequence[Line]) -> str:
    """A row per contender and first learning rate."""
    some = compared(lines, schedule="constant", variant="standard", steps=STANDARD)
    best = tuned(some)
    adams = [line for line in compared(some, contender="adam") if line["lr"] in SWEEP]
    swept = [len({line["lr"] for line in adams if conditions(line) == key}) for key in best]
    sweep = max(swept, default=0)  # of the first seed; the others have the best rates of there
    rows = []
    for contender in dict.fromkeys(line["contender"] for line in some):
        mine = [line for line in compared(some, contender=contender) if conditions(line) in best]
        if contender == "adam":  # beside itself where it is the only rate, it would show nothing
            mine = compared(mine, seed=min(line["seed"] for line in mine))
        for lr in sorted({line["lr"] for line in mine}):
            of = compared(mine, lr=lr)
            gaps = sorted(one for line in of if (one := gap(line, best)) is not None)
            row = [NAMES.get(contender, contender), rate(lr), str(len(of))]
            if not gaps:
                rows.append([*row, "failed", "", "", ""])
                continue
            worst = signed(gaps[-1]) if len(gaps) == len(of) else "failed"
            own = median(line["own_flops"] / line["budget"] for line in of if line["loss"] is not None)
            rows.append([*row, signed(median(gaps)), worst, percent(own), reached(of, best)])
    rows.append(
        [
            "Adam, tuned by a sweep",
            "–",
            str(len(best)),
            "0 %",
            "0 %",
            percent(sweep - 1),
            f"{sweep:.1f}",
        ]
    )
    head = [
        "way",
        "begins at",
        "runs",
        "above tuned Adam",
        "worst",
        "own cost",
        f"FLOPs to within {percent(NEAR)}",
    ]
    return table(head, rows, text_columns=2)


def reached(of: Sequence[Line], best: Mapping[tuple[Any, ...], Line]) -> str:
    """FLOPs until within 2 % of what tuned Adam ends at, in those of a run; of runs that were looked at."""
    found = []
    for line in of:
        if line["seed"] != 0 or line["loss"] is None:
            continue
        flops = flops_to(line, (1 + NEAR) * best[conditions(line)]["loss"])
        found.append(None if flops is None else flops / line["budget"])
    if not found:
        return ""
    return "not reached" if None in found else f"{median(found):.2f}"


def draw(figure: Figure, data: Mapping[str, Any]) -> None:
    """How far above tuned Adam each run ends, over the learning rate that it begins with."""
    from ffkernels.reporting.plots import STYLES, TEXT, clean_axes

    lines = compared(data["runs"], variant="standard", steps=STANDARD)
    best = tuned(lines)
    schedules = [s for s in ("constant", "linear") if compared(lines, schedule=s, contender="find")]
    figure.set_size_inches(7.6, 3.4)
    panels = figure.subplots(1, len(schedules), squeeze=False, sharey=True)[0]
    ways = (("adam", "Adam", STYLES["adam"]), ("find", 'learning_rate="find"', STYLES["parabolic"]))
    legend: dict[str, Any] = {}
    for axes, schedule in zip(panels, schedules, strict=True):
        clean_axes(axes)
        style = STYLES["adam-tuned"]
        legend["Adam at the best rate of a sweep"] = axes.axhline(
            0, color=style["color"], linestyle=style["linestyle"], linewidth=1.2
        )
        for contender, label, style in ways:
            some = compared(lines, schedule=schedule, contender=contender)
            points = gaps_by_rate([line for line in some if conditions(line) in best], best)
            dots = [(lr, 100 * one) for lr, gaps in points.items() for one in gaps]
            look = {"color": style["color"], "marker": style["marker"]}
            axes.plot(*zip(*dots, strict=True), **look, linestyle="none", markersize=3.5, alpha=0.5)
            middle = [100 * median(gaps) for gaps in points.values()]
            (legend[label],) = axes.plot(list(points), middle, **look, markersize=5, linewidth=1.4)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=5)
        axes.set_yticks([-2, 0, 2, 5, 10, 20, 50, 100], ["−2", "0", "2", "5", "10", "20", "50", "100"])
        axes.axhspan(-5, 100 * NEAR, color="#f2ead3", zorder=0)
        axes.set_title("constant rate" if schedule == "constant" else "linear decay", loc="left")
        axes.tick_params(colors=TEXT)
    panels[0].set_ylim(-2.5, 150)
    panels[0].set_ylabel("test loss above tuned Adam's (%)")
    figure.supxlabel("learning rate that the run begins with", fontsize=10)
    figure.legend(
        legend.values(), legend.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=9
    )


def gaps_by_rate(lines: Sequence[Line], best: Mapping[tuple[Any, ...], Line]) -> dict[float, list[float]]:
    """By rising first learning rate, how far above tuned Adam the runs ended."""
    found: dict[float, list[float]] = {}
    for line in sorted(lines, key=lambda line: line["lr"]):
        if (one := gap(line, best)) is not None:
            found.setdefault(line["lr"], []).append(one)
    return found
