"""Draw how a learning rate was found: the rate after each step, and the alignment that moved it.

plot_finding(finding, "lr.png")             # of find_learning_rate, to a file in the house style
draw_finding(finding, axes)                 # or onto axes of your own
"""

from __future__ import annotations

from pathlib import Path

from ffkernels.engine.learning_rate import Finding
from ffkernels.reporting.plots import DOTTED, STYLES, Axes, Figure, clean_axes, save_figure


def plot_finding(finding: Finding, path: str | Path) -> Path:
    """Write the picture to ``path`` (PNG) and return it. Needs matplotlib."""

    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        clean_axes(axes)
        draw_finding(finding, axes)

    save_figure(fill, Path(path))
    return Path(path)


def draw_finding(finding: Finding, axes: Axes) -> tuple[Axes, Axes]:
    """Draw onto ``axes`` the learning rate over the steps, on a log axis; onto their twin the alignments.

    Returns both.
    """
    steps = range(1, len(finding.rates) + 1)
    known = [(step, c) for step, c in zip(steps, finding.alignments, strict=True) if c is not None]
    rate, cosine = STYLES["parabolic"]["color"], STYLES["linear"]["color"]
    still = ", still rising" if finding.rising else ""
    (line,) = axes.plot(steps, finding.rates, color=rate, label=f"learning rate: {finding.lr:.3g}{still}")
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("learning rate after it")
    twin = axes.twinx()
    twin.axhline(0.0, **DOTTED)
    label = "alignment: below 0 the last step was too short"
    marks = {"color": cosine, "marker": "o", "markersize": 4, "linestyle": "none", "label": label}
    (points,) = twin.plot([step for step, _ in known], [c for _, c in known], **marks)
    twin.set_ylim(-1.05, 1.05)
    twin.set_ylabel("cosine of gradient and last update")
    axes.legend(handles=[line, points], loc="lower right", frameon=False)
    return axes, twin
