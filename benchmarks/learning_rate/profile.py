"""The performance profile: how often each contender is how close to tuned Adam.

rate_profile.png    the share of runs that leave at most x of the recoverable loss, a line per contender
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.learning_rate.record import SHARES
from benchmarks.learning_rate.shares import NEAR, Result, Shares, label, within
from benchmarks.tables import Results as Files
from benchmarks.tables import counted, newest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "rate_profile.png"
LOW, HIGH = 1e-3, 1.0  # of the axis; what is closer, or better than tuned Adam, is there from its left end on
DRAWING = 1  # to be raised with every change here
GREYS = ("#6f6f6f", "#9a9a9a")  # rates that nobody adjusts
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#56B4E9", "#882255", "#CC79A7")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def points(shares: Sequence[float]) -> list[tuple[float, float]]:
    """The corners of a profile from ``LOW`` to ``HIGH``: at most x is left in a fraction y of the runs."""
    at = sorted({LOW, HIGH, *(share for share in shares if LOW < share < HIGH)})
    return [(x, within(shares, x) / len(shares)) for x in at]


def pictures(
    results: Files,
) -> dict[str, tuple[Callable[[Figure], None], Mapping[str, Any]]]:
    """File name: what draws it, and the data that it shows, as ``plots.write`` takes them."""
    found = newest(results, SHARES)
    if found is None or not found[1]["evaluation"]:
        return {}
    data = found[1]
    cells = [entry["share"] for entry in data["evaluation"]]
    return {FILE: (lambda figure: draw(figure, data), {"cells": cells, "config": DRAWING})}


def words(data: Result) -> str:
    """What the picture says, for those who do not see it."""
    shares = Shares(data)
    every = len(shares.places)

    def counts(name: str) -> str:
        return " and ".join(f"{within(shares.shares[name], x)} within {100 * x:.0f} %" for x in NEAR)

    rival = next((name for name in shares.ranked if name != "auto"), None)
    said = (
        "Share of runs over what is left of the recoverable loss, a line per way to a learning rate: of "
        f"{counted(every, 'run')}, auto has {counts('auto')}"
    )
    return said + (
        f"; of the others {label(rival).replace('`', '')} is best in median, with {counts(rival)}"
        if rival
        else ""
    )


def shown(data: Result) -> str:
    """The picture as a document beside the folder ``images`` includes it; nothing where there is none."""
    return f"![{words(data)}](images/{FILE})" if data["evaluation"] else ""


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Fixed rates grey, all else coloured, in an order that does not depend on the results; "auto" bold."""
    from ffkernels.reporting.plots import STYLES

    found: dict[str, dict[str, Any]] = {}
    fixed = sorted(name for name in names if name.startswith(("Adam", "Fast Forward")))
    rest = sorted(name for name in names if name not in (*fixed, "auto"))
    for few, colours in ((fixed, GREYS), (rest, COLOURS)):
        for i, name in enumerate(few):
            turn = i if few is fixed else i // len(colours)
            style = {"color": colours[i % len(colours)], "linestyle": LINES[turn % len(LINES)]}
            found[name] = {**style, "linewidth": 1.3, "alpha": 0.8, "zorder": 2}
    found["auto"] = {"color": STYLES["auto"]["color"], "linestyle": "-", "linewidth": 3.0, "zorder": 3}
    return found


def draw(figure: Figure, data: Result) -> None:
    from ffkernels.reporting.plots import DOTTED, clean_axes

    shares = Shares(data)
    figure.set_size_inches(8.6, 4.4)
    axes = figure.add_subplot()
    clean_axes(axes, "left of the recoverable loss", f"share of {counted(len(shares.places), 'run')}")
    style = styles(shares.ranked)
    for name in shares.ranked:
        text = label(name).replace("`", "")
        x, y = zip(*points(shares.shares[name]), strict=True)
        axes.step(x, y, where="post", label=text, **style[name])
    for bound in NEAR:
        axes.axvline(bound, **DOTTED)
    axes.set_xscale("log")
    axes.set_xlim(LOW, HIGH)
    ticks = (LOW, 3e-3, 1e-2, *NEAR, 0.3, HIGH)
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    lines, labels = axes.get_legend_handles_labels()
    legend = figure.legend(lines, labels, loc="outside right upper", frameon=False, fontsize=9)
    for text, name in zip(legend.get_texts(), shares.ranked, strict=True):
        text.set_fontweight("bold" if name == "auto" else "normal")
