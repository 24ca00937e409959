"""The report's pictures. matplotlib is imported when one is drawn, and never opens a window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ffkernels.reporting.numbers import flop_unit, percent
from ffkernels.reporting.savings import Run
from ffkernels.reporting.written import written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # for annotations; matplotlib is imported when something is drawn
    Axes = Figure = Any

Event = Mapping[str, Any]  # of a run log
Points = list[tuple[float, float]]

DPI = 150
# Okabe and Ito's colours, a wine red and an indigo, which the colour-blind can tell apart; line styles and
# markers say the same again.
STYLES: dict[str, dict[str, Any]] = {
    "adam": {"color": "#4d4d4d", "marker": "o", "linestyle": "-"},
    "linear": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "parabolic": {"color": "#0072B2", "marker": "^", "linestyle": "-"},
    "adam-tuned": {"color": "#009E73", "marker": "D", "linestyle": "--"},
    "auto": {"color": "#332288", "marker": "*", "linestyle": ":"},
    "authors": {"color": "#E69F00", "marker": "P", "linestyle": "-."},
    "peft-prototype": {"color": "#56B4E9", "marker": "X", "linestyle": "-."},
    "lora-plus": {"color": "#882255", "marker": "p", "linestyle": "--"},
    "other": {"color": "#CC79A7", "marker": "v", "linestyle": "-."},
}
# Of runs of one kind with other settings: the first has its kind's.
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
SGD = {"color": STYLES["adam"]["color"], "marker": "o", "linestyle": "none", "markersize": 3.5}
LEGEND_CHARACTERS = 90  # beside each other, with their marks
LEGEND = {"frameon": True, "edgecolor": "none", "facecolor": "white", "framealpha": 0.85}
# A legend on top of its panel.
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "borderaxespad": 0, "frameon": False}
TEXT = "#333333"
DOTTED = {"color": TEXT, "linewidth": 0.9, "linestyle": (0, (1, 2)), "zorder": 0}
PATH = "steps along the path: optimizer steps + Fast Forward steps (τ)"

# What runs of a kind are called; others by their own name.
LABELS = {
    "adam": "Adam",
    "linear": "Fast Forward, linear",
    "parabolic": "Fast Forward, parabolic",
    "authors": "the authors' loop",
    "peft-prototype": "PEFT's prototype",
    "lora-plus": "LoRA+",
}


def kind_label(run: Run) -> str:
    """What a run is called in pictures: its kind, and what tells it from others of that."""
    if run.kind != "adam-tuned":
        no_rate = f"{LABELS.get(run.kind, 'Adam')}, no learning rate given"
        label = no_rate if run.auto else LABELS.get(run.kind, run.name)
    elif run.lr is None:
        label = "Adam, tuned lr"
    elif run.tuned:
        label = f"Adam, tuned lr {run.lr:g}"
    else:
        return f"Adam, lr {run.lr:g} (not tuned)"
    return f"{label}, {run.variant}" if run.variant else label


def style_of(run: Run) -> dict[str, Any]:
    """Colour, marker and line style of a run; peers that have none of their own share one.

    Runs of a kind with other settings have its colour and marker, and lines of their own.
    """
    style = STYLES.get(run.kind, STYLES["other"])
    if run.variant_number == 0:
        return style
    lines = [line for line in LINES if line != style["linestyle"]]
    return {**style, "linestyle": lines[(run.variant_number - 1) % len(lines)]}


def draw_all(runs: Sequence[Run], folder: Path) -> dict[str, Path]:
    """Draw what the runs have something to show for; the files by their stems, in the order of the report."""
    largest = max((e["flops"]["measured"] for run in runs for e in run.log.tests), default=0)
    size, unit = flop_unit(largest)
    tested = any(run.log.tests for run in runs)
    staged = any(run.log.stages for run in runs)
    moved = [run for run in runs if any("alignment" in step for step in run.log.steps)]

    def over_flops(figure: Figure) -> None:
        label = f"training compute ({unit}, measured)"
        _test_loss(figure, runs, "flops_measured", lambda e: e["flops"]["measured"] / size, label)

    def over_seconds(figure: Figure) -> None:
        _test_loss(figure, runs, "seconds", lambda e: e["seconds"]["total"], "training time (s)")

    pictures = (
        ("test_loss_flops", tested, over_flops),
        ("test_loss_seconds", tested, over_seconds),
        ("tau", staged, lambda figure: _taus(figure, runs)),
        ("learning_rate", bool(moved), lambda figure: draw_learning_rates(figure, moved)),
        ("training", staged, lambda figure: _training(figure, runs)),
    )
    drawn = {}
    for stem, wanted, draw in pictures:
        if wanted:
            drawn[stem] = folder / f"{stem}.png"
            save_figure(draw, drawn[stem])
    return drawn


def save_figure(draw: Callable[[Figure], None], path: Path) -> None:
    """Let ``draw`` fill a figure in the house style and write it to ``path`` as PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = {"font.size": 10, "axes.titlesize": 11, "text.color": TEXT, "axes.labelcolor": TEXT}
    settings |= {"axes.edgecolor": "#999999", "xtick.color": TEXT, "ytick.color": TEXT}
    with rc_context(settings):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        with written(path):
            figure.savefig(path, dpi=DPI)


def _test_loss(
    figure: Figure,
    runs: Sequence[Run],
    cost: str,
    x_of: Callable[[dict[str, Any]], float],
    x_label: str,
) -> None:
    axes = figure.add_subplot()
    clean_axes(axes, x_label, "test loss (nats per token)")
    labelled: set[str] = set()
    furthest = 0.0
    for run in runs:
        points = [(x_of(e), e["loss"]) for e in run.log.tests if math.isfinite(e["loss"])]
        if not points:
            continue
        furthest = max(furthest, points[-1][0])
        style, label = style_of(run), kind_label(run)
        line = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 1.6}
        axes.plot(*zip(*points, strict=True), **line, alpha=_alpha(runs, run))
        # The last point is where the run ended, at the target or not.
        text = None if label in labelled else label + _saved(runs, run.group, cost)
        axes.plot(*points[-1], **line, marker=style["marker"], markersize=6, label=text, zorder=3)
        labelled.add(label)
    # The room on the right is for the name of the target line, which runs end at.
    axes.set_xlim(0, 1.16 * furthest or 1.0)
    targets = sorted({run.target for run in runs if run.kind == "adam" and run.target is not None})
    for target in targets:
        axes.axhline(target, **DOTTED)
    if targets:
        text = f"target {targets[0]:.4f}" if len(targets) == 1 else "targets"
        place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 5), "textcoords": "offset points"}
        axes.annotate(text, (1.0, targets[-1]), **place, ha="right", va="bottom", fontsize=9)
    axes.legend(loc="upper right", **LEGEND)


def _saved(runs: Sequence[Run], group: str, cost: str) -> str:
    """What the runs of a group saved, for the legend; nothing where one of them has no number."""
    values = [run.saved and run.saved[cost] for run in runs if run.group == group]
    if not values or None in values:
        return ""
    share = percent(median(values))
    return f": {share} saved" if len(values) == 1 else f": {share} saved (median of {len(values)})"


def _taus(figure: Figure, runs: Sequence[Run]) -> None:
    axes = figure.add_subplot()
    label = "optimizer step at which the stage ran"
    clean_axes(axes, label, "τ*: times the update was repeated", integer="xy")
    labelled: set[str] = set()
    for run in (run for run in runs if run.log.stages):
        label, below = kind_label(run), run.kind == "linear"
        axes.plot(
            [stage["optimizer_step"] for stage in run.log.stages],
            [stage["tau"] for stage in run.log.stages],
            **style_of(run),
            # Both searches often find the same τ*: the one below must show through.
            markerfacecolor="none",
            markeredgewidth=1.5,
            markersize=9 if below else 6,
            linewidth=2.4 if below else 1.2,
            alpha=_alpha(runs, run),
            label=None if label in labelled else label,
        )
        labelled.add(label)
    stages = [stage for run in runs for stage in run.log.stages]
    axes.set_xlim(0, 1.05 * max(stage["optimizer_step"] for stage in stages))
    axes.set_ylim(0, 1.08 * max(1, *(stage["tau"] for stage in stages)))
    columns = min(3, max(1, LEGEND_CHARACTERS // max(map(len, labelled))))
    axes.legend(**{**ABOVE, "ncols": columns})


def draw_learning_rates(figure: Figure, runs: Sequence[Run]) -> None:
    """How the rates of runs with none given went: loss, rate and alignment, a panel each."""
    figure.set_size_inches(7.2, 7.0)
    losses, rates, alignments = figure.subplots(3, sharex=True, height_ratios=(1.3, 1, 1))
    clean_axes(losses, y="loss (nats per token)")
    clean_axes(rates, y="learning rate")
    clean_axes(alignments, "optimizer step", "alignment", integer="x")
    labelled: set[str] = set()
    for run in runs:
        label, style, steps = kind_label(run), style_of(run), run.log.steps
        line = {"color": style["color"], "linewidth": 1.2, "alpha": _alpha(runs, run)}
        line["linestyle"] = LINES[run.variant_number % len(LINES)]
        at = [step["optimizer_step"] for step in steps]
        tests = [(test["optimizer_step"], test["loss"]) for test in run.log.tests]
        of_tests = losses.plot(
            [step for step, _ in tests],
            [loss for _, loss in tests],
            **line,
            marker=style["marker"],
            markersize=5,
        )[0]
        of_batches = losses.plot(at, [step["train_loss"] for step in steps], **line)[0]
        of_batches.set_alpha(0.4 * line["alpha"])
        if label not in labelled:
            of_tests.set_label(f"{label}: test loss")
            of_batches.set_label("its batches: training loss")
            labelled.add(label)
        rates.plot(at, [_or_nan(step["lr"] or None) for step in steps], **line, drawstyle="steps-mid")
        cosines = [_or_nan(step.get("alignment")) for step in steps]
        alignments.plot(at, cosines, **line, marker=".", markersize=4)
    figure.align_ylabels()
    losses.legend(loc="upper right", fontsize=9, **LEGEND)
    rates.set_yscale("log")
    alignments.axhline(0.0, **DOTTED)
    alignments.set_xlim(left=0)


def _or_nan(value: float | None) -> float:
    """A gap in the line: an alignment that is not known, a rate of 0 on a log axis."""
    return math.nan if value is None else value


def _training(figure: Figure, runs: Sequence[Run]) -> None:
    shown: list[Run] = []
    for run in runs:
        if run.log.stages and run.group not in {other.group for other in shown}:
            shown.append(run)
    figure.set_size_inches(7.2, 1.2 + 3.0 * len(shown))
    panels = figure.subplots(len(shown), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, run in zip(panels, shown, strict=True):
        draw_walk(axes, style_of(run), run.log.steps, run.log.stages)
        several = len([r for r in runs if r.group == run.group]) > 1
        axes.set_title(kind_label(run) + (f" ({run.name})" if several else ""), loc="left")
    panels[-1].set_xlim(left=0)
    panels[-1].set_xlabel(PATH)


def draw_walk(axes: Axes, style: Mapping[str, Any], steps: Sequence[Event], stages: Sequence[Event]) -> None:
    """The loss along the path of a run: a point per optimizer step, a line per stage; see ``walk``."""
    clean_axes(axes, y="loss (nats per token)")
    sgd, forwards = walk(steps, stages)
    axes.plot(*zip(*sgd, strict=True), **SGD, label="optimizer step: training loss of its batch")
    # A stage that stayed at τ = 0 has one loss, which fell nowhere.
    stayed = [points[0] for points in forwards if len(points) == 1]
    mark = {"color": style["color"], "marker": style["marker"]}
    moved = [points for points in forwards if len(points) > 1]
    draw_stages(axes, mark, moved, "Fast Forward step: validation loss, where it fell")
    if stayed:
        label = "stage without a step (τ = 0): validation loss"
        axes.plot(*zip(*stayed, strict=True), **mark, markerfacecolor="none", linestyle="none", label=label)
    axes.legend(loc="upper right", fontsize=9, **LEGEND)


def draw_stages(axes: Axes, style: Mapping[str, Any], stages: Iterable[Points], label: str) -> None:
    """A line per stage through its points; the first has the label."""
    for points in stages:
        size = 2.0 if len(points) > 30 else 4.0  # so many would merge
        axes.plot(*zip(*points, strict=True), **style, markersize=size, linewidth=1.2, label=label)
        label = None


def walk(steps: Sequence[Event], stages: Sequence[Event]) -> tuple[Points, list[Points]]:
    """A run along its path: a point per optimizer step, its training loss, and per stage its points.

    A stage's points are the validation losses the search accepted on its way to τ*, the first of them τ = 0.
    """
    path = list(along(steps, stages))
    # The loss was taken before the update, so it belongs one step back.
    sgd = [(x - 1, step["train_loss"]) for x, step, _ in path if math.isfinite(step["train_loss"])]
    forwards = [[(x + tau, loss) for tau, loss in accepted(stage)] for x, _, stage in path if stage]
    return sgd, [points for points in forwards if points]


def along(steps: Sequence[Event], stages: Sequence[Event]) -> Iterator[tuple[int, Event, Event | None]]:
    """Each optimizer step's place on the path, where it is 1 long and a stage τ*, and its stage, if any."""
    searched, forwarded = {stage["optimizer_step"]: stage for stage in stages if stage["losses"]}, 0
    for step in steps:
        stage = searched.get(step["optimizer_step"])
        yield step["optimizer_step"] + forwarded, step, stage
        forwarded += stage["tau"] if stage else 0


def accepted(stage: Event) -> list[tuple[int, float]]:
    """The (τ, loss) of a stage that became the best when they were measured, up to τ*, by rising τ."""
    best, found = math.inf, []
    for tau, loss in stage["losses"]:
        if loss < best:
            best = loss
            found.append((tau, loss))
    return sorted((tau, loss) for tau, loss in found if tau <= stage["tau"])


def _alpha(runs: Sequence[Run], run: Run) -> float:
    """Lines of several seeds are drawn over each other, lighter."""
    return 1.0 if sum(other.group == run.group for other in runs) == 1 else 0.55


def clean_axes(
    axes: Axes, x: str | None = None, y: str | None = None, *, title: str = "", integer: str = ""
) -> None:
    """The house style of a panel: no frame above and on the right, faint horizontal lines behind the data.

    ``x`` and ``y`` are its labels; the axes named in ``integer``, as in ``"xy"``, have whole numbers alone.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(**{f"{name}label": text for name, text in (("x", x), ("y", y)) if text is not None})
    axes.set_title(title, loc="left")
    for name in integer:
        getattr(axes, f"{name}axis").get_major_locator().set_params(integer=True)
