"""How much does a step's gradient resemble the earlier ones', with and without Fast Forward? Figure 6.

    g_t     the gradient that optimizer step t uses       S[t][s] = cos(g_t, g_s), s < t
    Δ_t     the update that it makes, without the stage   U[t][s] = cos(Δ_t, Δ_s), s < t

The plain optimizer and Fast Forward train on the same batches in the same order from the same start, so what
differs is where they are. A high S says that training keeps walking the same way; a stage walks that way
until it stops paying, so S should fall where a stage lies between s and t.

Source: Rahamim et al., arXiv 2409.04206, Figure 6. Costs the two runs; memory 2 · window · 4·P bytes, window
being all steps unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffkernels.analysis.between_steps import flat, flat_gradient, inner_products, waiting_stages
from ffkernels.reporting.plots import STYLES, TEXT, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import open_session

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CosineHistory", "draw", "gradient_similarity", "what_was_seen"]

RUNS = ("adam", "fast_forward")
LABELS = {"adam": "Adam", "fast_forward": "Fast Forward"}


def gradient_similarity(config: TrainConfig, *, window: int | None = None) -> dict[str, Any]:
    """Train without and with Fast Forward, and compare each step's gradient and update with earlier ones.

    Args:
        config: the run; ``fast_forward`` is used for the second one, the default one where it is None.
        window: how many earlier steps are compared with; None means all.

    Returns:
        ``adam`` and ``fast_forward``, each with
        ``gradients``, ``updates``: row t holds the cosines with steps t − window … t − 1, oldest first, so
        the last is with the step before; None where a vector is zero.
        ``stages``: [optimizer_step, tau] each; one after step n, counted from 1, is between rows n − 1 and n.
        ``losses``: of each step's batch before its update.
        ``previous``, ``earlier``: mean cosine of a gradient with the step before's, and with all kept ones.
        ``across``, ``within``: the former over steps that follow a stage with τ* > 0, and over the others.
        Besides ``window``, ``bytes_kept`` (of one run, on the device), ``trainable``, ``config``.

    Raises:
        ValueError: for a window below 1.
    """
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window={window!r}: must be an integer of at least 1, or None for all steps")
    config = config.with_fast_forward()
    kept = {}
    data: dict[str, Any] = {}
    for name, fast_forward in (("adam", None), ("fast_forward", config.fast_forward)):
        data[name], kept = _one_run(dataclasses.replace(config, fast_forward=fast_forward), window)
    return {**data, **kept, "config": config.to_dict()}


def _one_run(config: TrainConfig, window: int | None) -> tuple[dict[str, Any], dict[str, int]]:
    with open_session(config, attach=waiting_stages) as session:
        window = min(window or session.steps, session.steps)
        size = sum(w.numel() for w in session.trainable)
        gradients = CosineHistory(window, size, session.device)
        updates = CosineHistory(window, size, session.device)
        run: dict[str, Any] = {"gradients": [], "updates": [], "stages": [], "losses": []}
        for step in range(session.steps):
            run["losses"].append(session.backward(session.load(step)))
            run["gradients"].append(gradients.add(flat_gradient(session.trainable)))
            before = flat(session.trainable)
            session.update(step)
            run["updates"].append(updates.add(flat(session.trainable) - before))
            stage = session.ff.run_due_stage() if session.ff is not None else None
            if stage is not None:
                run["stages"].append([stage.optimizer_step, stage.tau])
    run["losses"] = [float(loss) for loss in run["losses"]]
    if not all(loss == loss for loss in run["losses"]):
        raise ValueError(f"the training loss is not a number at lr={config.lr:g}: it diverged; lower the lr")
    return {**run, **summary(run["gradients"], run["stages"])}, {
        "window": window,
        "bytes_kept": gradients.nbytes + updates.nbytes,
        "trainable": size,
    }


def summary(rows: list[list[float | None]], stages: list[list[int]]) -> dict[str, float | None]:
    """Means over a run's rows of cosines: ``previous``, ``earlier``, ``across`` and ``within``."""
    moved = {step for step, tau in stages if tau > 0}
    previous = {t: row[-1] for t, row in enumerate(rows) if row and row[-1] is not None}
    return {
        "previous": _mean(previous.values()),
        "earlier": _mean(c for row in rows for c in row if c is not None),
        "across": _mean(c for t, c in previous.items() if t in moved),
        "within": _mean(c for t, c in previous.items() if t not in moved),
    }


def _mean(values: Any) -> float | None:
    values = list(values)
    return fmean(values) if values else None


class CosineHistory:
    """The last ``window`` vectors of length ``size``, in float32, and the cosines of a new one with them."""

    def __init__(self, window: int, size: int, device: torch.device | str = "cpu") -> None:
        self._rows = torch.empty(window, size, device=device)
        self._norms: list[float] = []
        self._seen = 0

    @property
    def nbytes(self) -> int:
        return self._rows.numel() * self._rows.element_size()

    def add(self, vector: Tensor) -> list[float | None]:
        """Cosines of ``vector``, (size,), with those kept, oldest first; then it takes the oldest's place.

        None where either is zero. Products are accumulated in float64.
        """
        window, kept = len(self._rows), min(self._seen, len(self._rows))
        norm = float(inner_products(vector[None], vector[None]).sqrt())
        oldest = self._seen % window if kept == window else 0
        order = [(oldest + i) % window for i in range(kept)]
        products = inner_products(self._rows[:kept], vector[None])[:, 0].tolist() if kept else []
        scales = [norm * self._norms[i] for i in order]
        cosines = [products[i] / scale if scale else None for i, scale in zip(order, scales, strict=True)]
        place = self._seen % window
        self._rows[place] = vector
        self._norms[place : place + 1] = [norm]
        self._seen += 1
        return cosines


def what_was_seen(data: dict[str, Any]) -> list[str]:
    """The data in sentences."""
    adam, ff = data["adam"], data["fast_forward"]
    sentences = []
    for of, key in (("the step before's", "previous"), ("all earlier ones", "earlier")):
        if adam[key] is not None and ff[key] is not None:
            sentences.append(
                f"A gradient's mean cosine with {of} is {ff[key]:.2f} with Fast Forward and {adam[key]:.2f} "
                "with Adam alone."
            )
    if ff["across"] is None:
        sentences.append("No stage moved the weights and was followed by a step.")
    elif ff["within"] is not None:
        lower = ff["across"] < ff["within"]
        sentences.append(
            f"From one step to the next it is {ff['across']:.2f} where a stage lies between, "
            f"{'lower' if lower else 'not lower'} than the {ff['within']:.2f} where none does."
        )
    sentences.append(
        f"Kept for that: {data['window']} gradients and as many updates of {data['trainable']:,} numbers, "
        f"{data['bytes_kept'] / 1e6:.1f} MB at a time."
    )
    return [sentence.replace(" -", " −") for sentence in sentences]


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """Top: cosines of gradients, a matrix per run. Below: gradient and update against the step before's."""
    figure.set_size_inches(7.2, 7.4)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    panels = above.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, RUNS, strict=True):
        image = _matrix(axes, data[name])
        axes.set_title(LABELS[name], loc="left")
        axes.set_xlabel("earlier optimizer step")
    panels[0].set_ylabel("optimizer step")
    bar = above.colorbar(image, ax=panels, label="cosine of the two gradients", shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)

    upper, lower = below.subplots(2, 1, sharex=True)
    for axes, of, label in ((upper, "gradients", "of the gradients"), (lower, "updates", "of the updates Δ")):
        clean_axes(axes)
        for step, tau in data["fast_forward"]["stages"]:
            if tau and step < len(data["fast_forward"][of]):  # the first step from where the stage went
                axes.axvline(step + 1, color="#dddddd", linewidth=1.2, zorder=0)
        for name in RUNS:
            rows = data[name][of]
            known = [(t + 1, row[-1]) for t, row in enumerate(rows) if row and row[-1] is not None]
            style = STYLES["adam" if name == "adam" else "parabolic"]
            axes.plot(
                *zip(*known, strict=True) if known else ([], []),
                color=style["color"],
                marker=style["marker"],
                markersize=3.5,
                linewidth=1.2,
                label=LABELS[name],
            )
        axes.set_ylabel(f"cosine\n{label}")
    lower.set_xlabel(
        "optimizer step, compared with the one before it (vertical line: a stage lies between them)"
    )
    lower.xaxis.get_major_locator().set_params(integer=True)
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, frameon=False)


def _matrix(axes: Axes, run: dict[str, Any]) -> Any:
    rows, steps = run["gradients"], len(run["gradients"])
    square = [[math.nan] * steps for _ in range(steps)]
    for t, row in enumerate(rows):
        for s, value in zip(range(t - len(row), t), row, strict=True):
            square[t][s] = math.nan if value is None else value
    edge = (0.5, steps + 0.5)
    image = axes.imshow(square, cmap="RdBu_r", vmin=-1, vmax=1, extent=(*edge, *edge[::-1]))
    for step, tau in run["stages"]:
        if tau:
            axes.plot([0.5, step + 0.5], [step + 0.5] * 2, color=TEXT, linewidth=0.6, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return image
