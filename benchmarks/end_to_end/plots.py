"""Plots of the end-to-end results, small enough to be committed, each knowing which data it shows.

    end_to_end_…_saved.png    FLOPs and time saved per task and learning rate, the paper's ranges behind them
    end_to_end_…_curves.png   test loss over training compute, a panel per task and learning rate

A picture depends on fonts and on the version of matplotlib, so two machines rarely draw the same bytes: the
digest of the results it was drawn from stands in its metadata, and that is what is compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.end_to_end.figures import KINDS, PAPER, cell_label, in_order, of_smallest_batch
from benchmarks.end_to_end.table import spread
from benchmarks.tables import LABELS as LABELS_OF
from benchmarks.tables import named, rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BYTES = 60_000
DRAWING = "1"  # to be raised with every change here, so that committed pictures count as old
DIGEST = "results"
LABELS = {kind: LABELS_OF[kind].replace("`", "") for kind in ("adam", *KINDS)}


def stem(name: str) -> str:
    """A picture is named after its result file, without the date: a newer result replaces it."""
    return "_".join(part for part in name.removesuffix(".json").split("_") if not part[:4].isdigit())


def pictures(name: str, data: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[Figure], None]]]:
    """File name: what it shows in words, and what draws it."""
    model = named(data["config"]["model"])
    found = {
        f"{stem(name)}_saved.png": (
            f"FLOPs and time saved by Fast Forward and by a tuned learning rate, per task, on {model}",
            lambda figure: draw_saved(figure, data),
        )
    }
    if any(not cell["tuned"] for cell in data["cells"]):  # Adam beside Adam at the same rate shows nothing
        found[f"{stem(name)}_curves.png"] = (
            f"Test loss over training compute per task and learning rate, on {model}",
            lambda figure: draw_curves(figure, data),
        )
    return found


def digest(data: Mapping[str, Any]) -> str:
    shown = {key: data[key] for key in ("cells", "config", "tuned", "runs") if key in data}
    return hashlib.sha256((DRAWING + json.dumps(shown, sort_keys=True)).encode()).hexdigest()


def shown_digest(path: Path) -> str | None:
    """The digest in a committed picture; None where there is no picture of ours."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(DIGEST)


def write(path: Path, draw: Callable[[Figure], None], data: Mapping[str, Any]) -> None:
    """Draw, reduce to as many colours as fit the size, and put the digest in.

    Raises:
        ValueError: when the file is larger than a repository should carry.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ffkernels.reporting.plots import save_figure

    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw, path)
    info = PngInfo()
    info.add_text(DIGEST, digest(data))
    with Image.open(path) as image:
        drawn = image.convert("RGB")
    for colours in (64, 32, 16):
        drawn.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=info)
        if (size := path.stat().st_size) <= MOST_BYTES:
            return
    raise ValueError(f"{path} has {size} bytes; a committed picture has at most {MOST_BYTES}")


def draw_saved(figure: Figure, data: Mapping[str, Any]) -> None:
    """Two panels of bars with the range over the seeds; the paper's range as a band."""
    from matplotlib.ticker import MultipleLocator

    from ffkernels.reporting.plots import STYLES, clean_axes

    cells = of_smallest_batch(in_order(data))
    figure.set_size_inches(7.6, 1.5 + 0.52 * len(cells))
    panels = figure.subplots(1, 2, sharey=True)
    figure.get_layout_engine().set(wspace=0.08)
    heights = {kind: 0.26 * (1 - number) for number, kind in enumerate(KINDS)}
    titles = {"flops_paper": "FLOPs saved (%),\nthe paper's count", "seconds": "time saved (%)\n"}
    for axes, (cost, title) in zip(panels, titles.items(), strict=True):
        clean_axes(axes)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color="#e6e6e6", linewidth=0.8)
        low, high = PAPER[cost]
        axes.axvspan(low, high, color="#f2ead3", zorder=0, label="the paper's range")
        for kind, offset in heights.items():
            label: str | None = LABELS[kind]  # of the first bar that there is
            for place, cell in enumerate(cells):
                found = spread(cell, kind)
                if found is None or found["median"] is None:
                    continue
                middle = found["median"][cost]
                error = [[middle - found["low"][cost]], [found["high"][cost] - middle]]
                bars = {"height": 0.24, "color": STYLES[kind]["color"], "label": label, "zorder": 2}
                whiskers = {"elinewidth": 1, "ecolor": "#333333"}
                axes.barh(place - offset, middle, xerr=error, error_kw=whiskers, **bars)
                label = None
                if middle < -1:  # beyond the frame: a number instead of a scale on which nothing else is seen
                    number = f"← {100 * middle:.0f}".replace("-", "−")
                    axes.text(-0.98, place - offset, number, color="white", fontsize=7, va="center")
        least = min([0.0, *(s["low"][cost] for c in cells for s in c["spreads"] if s["median"] is not None)])
        axes.set_xlim(max(-1.0, 1.05 * least), 1.0)
        axes.axvline(0, color="#666666", linewidth=0.9)
        axes.xaxis.set_major_locator(MultipleLocator(0.5 if least < -0.2 else 0.2))
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}".replace("-", "−"))
        axes.set_title(title, loc="left")
    panels[0].set_yticks(range(len(cells)), [", lr ".join(cell_label(cell, cells)) for cell in cells])
    panels[0].set_ylim(len(cells) - 0.45, -0.55)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def draw_curves(figure: Figure, data: Mapping[str, Any]) -> None:
    """A row per learning rate (of the first method), a column per task; the first seed of each."""
    from ffkernels.reporting.plots import clean_axes, flop_unit

    cells = of_smallest_batch(in_order(data))
    cells = [cell for cell in cells if cell["method"] == cells[0]["method"] and not cell["tuned"]]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    rows = sorted({cell["lr"] for cell in cells})
    figure.set_size_inches(2.7 * max(2, len(tasks)) + 0.4, 0.7 + 2.2 * len(rows))
    panels = figure.subplots(len(rows), len(tasks), squeeze=False)
    largest = max(p[1] for c in cells for r in c["rounds"] for run in r["runs"] for p in run["curve"])
    size, unit = flop_unit(largest)
    legend: dict[str, Any] = {}
    for row, lr in enumerate(rows):
        for column, task in enumerate(tasks):
            axes = panels[row, column]
            clean_axes(axes)
            cell = next((c for c in cells if c["task"] == task and c["lr"] == lr), None)
            if cell is None:
                axes.set_axis_off()
                continue
            legend |= _curves(axes, cell["rounds"][0]["runs"], size)
            axes.set_title(f"{task}, lr {rate(lr)}", loc="left", fontsize=9)
            axes.tick_params(labelsize=8)
    figure.supxlabel(f"training compute ({unit}, measured)", fontsize=9)
    figure.supylabel("test loss (nats per token)", fontsize=9)
    figure.legend(
        legend.values(), legend.keys(), loc="outside upper center", ncols=2, frameon=False, fontsize=9
    )


def _curves(axes: Axes, runs: list[Mapping[str, Any]], size: float) -> dict[str, Any]:
    from ffkernels.reporting.plots import STYLES, TEXT

    drawn = {}
    for run in runs:
        points = [(flops / size, loss) for _, flops, _, loss in run["curve"] if loss is not None]
        if run["kind"] not in LABELS or not points:
            continue
        style = {name: STYLES[run["kind"]][name] for name in ("color", "linestyle", "marker")}
        (line,) = axes.plot(*zip(*points, strict=True), **style, markevery=[-1], markersize=5, linewidth=1.4)
        drawn[LABELS[run["kind"]]] = line
        if run["kind"] == "adam":
            axes.axhline(run["target"], color=TEXT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    axes.set_xlim(left=0)
    return drawn
