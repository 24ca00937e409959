"""Draw what a learning rate search saw: validation loss over the rate that its update might have had.

    from ffkernels.reporting.lr_plot import draw_finding, plot_finding

    plot_finding(finding, "lr.png")             # a file, in the house style
    draw_finding(finding, axes)                 # or onto axes of your own, as other finders do

Unlike in a range test, where the loss is that of training at a rising rate, every point here is the held-out
loss after the same two steps, with the second one made longer or shorter.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ffkernels.engine.rate_finding import Finding
from ffkernels.reporting.plots import STYLES, TEXT, clean_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_finding", "plot_finding"]

# Losses above the start by more than the whole decrease would press the valley flat.
HEADROOM = 1.0


def plot_finding(finding: Finding, path: str | Path) -> Path:
    """Write the picture to ``path`` (PNG) and return it. Needs matplotlib.

    Raises:
        ValueError: when the finding has no curve.
    """
    path = Path(path)
    save_figure(lambda figure: _fill(figure, finding), path)
    return path


def _fill(figure: Figure, finding: Finding) -> None:
    axes = figure.add_subplot()
    clean_axes(axes)
    draw_finding(finding, axes)


def draw_finding(finding: Finding, axes: Axes) -> Axes:
    """Draw onto ``axes``: the curve by rising learning rate, the loss before the update, what was found.

    Returns the axes.

    Raises:
        ValueError: when the finding has no curve.
    """
    points = sorted((lr, loss) for lr, loss in finding.curve if lr > 0)
    if not points:
        raise ValueError(
            "this finding has no curve to draw: it holds no evaluation at a learning rate above 0; draw one "
            "that find_learning_rate returned, or FastForward.finding"
        )
    before = finding.loss_before
    lowest = min(before, *(loss for _, loss in points))
    ceiling = before + HEADROOM * max(before - lowest, 1e-3 * abs(before))
    inside = [(lr, loss) for lr, loss in points if loss <= ceiling]
    style = STYLES["parabolic"]
    axes.axhline(before, color=TEXT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
    axes.annotate(
        "before the update",
        (0.0, before),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=9,
    )
    axes.plot(
        [lr for lr, _ in inside],
        [loss for _, loss in inside],
        color=style["color"],
        marker="o",
        markersize=5,
        linewidth=1.4,
        label=f"{finding.evaluations} validation losses",
    )
    beyond = [lr for lr, loss in points if not loss <= ceiling]
    top = max([before, *(loss for _, loss in inside)])
    margin = 0.08 * (top - lowest or 1.0)
    if beyond:
        axes.plot(
            beyond,
            [top + margin / 2] * len(beyond),
            color=style["color"],
            marker="^",
            linestyle="none",
            label="off the scale",
        )
    best_lr, best = min(points, key=lambda point: point[1])
    if best < before:
        found = f"found: {finding.lr:.3g}"
        if not math.isclose(finding.lr, best_lr, rel_tol=1e-6):
            found += f" (the step's best: {best_lr:.3g})"  # 0.7 of it, or a warm-up was on
        color = STYLES["linear"]["color"]
        axes.axvline(best_lr, color=color, linewidth=1.2, zorder=1)
        axes.plot(best_lr, best, color=color, marker="D", markersize=8, label=found, zorder=3)
    else:
        axes.plot([], [], linestyle="none", label=f"none lowers the loss: left at {finding.lr:.3g}")
    axes.set_xscale("log")
    axes.set_ylim(lowest - margin, top + margin)
    axes.set_xlabel("learning rate of the searched update")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(loc="lower left", frameon=False)
    return axes
