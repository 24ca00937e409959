"""How much does a step's gradient resemble the earlier ones', with and without Fast Forward? Figure 6.

    g_t     the gradient that optimizer step t uses       S[t][s] = cos(g_t, g_s), s < t
    Δ_t     the update that it makes, without the stage   U[t][s] = cos(Δ_t, Δ_s), s < t

Costs two runs; memory 2 · window · 4·P bytes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor

from ffkernels.analysis.show import Data, Table
from ffkernels.analysis.weight_space import flat, flat_gradient, inner_products
from ffkernels.reporting.plots import ABOVE, STYLES, TEXT, Axes, Figure, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.rules import check, whole
from ffkernels.training.session import open_session, waiting_stages

LABELS = {"adam": "Adam", "fast_forward": "Fast Forward"}


def gradient_similarity(config: TrainConfig, *, window: int | None = None) -> Data:
    """Train without and with Fast Forward, and compare each step's gradient and update with earlier ones.

    Args:
        config: the run; ``fast_forward`` is used for the second one, the default one where it is None.
        window: how many earlier steps are compared with; None means all.

    Returns:
        ``adam`` and ``fast_forward``, each with ``gradients``, ``updates``: row t holds the cosines with
        steps t − window … t − 1, None where a vector is zero; ``stages``: [optimizer_step, tau] each, one
        after step n, counted from 1, between rows n − 1 and n; ``losses`` of each step's batch before its
        update; and the ``summary``. Besides ``window``, ``bytes_kept`` (of one run, on the device),
        ``trainable``, ``config``.

    Raises:
        ValueError: for a window below 1.
    """
    check("window", window, whole(1).or_none)
    config = config.with_fast_forward()
    adam, kept = _one_run(replace(config, fast_forward=None), window)
    return {"adam": adam, "fast_forward": _one_run(config, window)[0], **kept, "config": config.to_dict()}


def _one_run(config: TrainConfig, window: int | None) -> tuple[Data, dict[str, int]]:
    with open_session(config, attach=waiting_stages) as session:
        window = min(window or session.steps, session.steps)
        gradients, updates = CosineHistory(window), CosineHistory(window)
        run: Data = {"gradients": [], "updates": [], "stages": [], "losses": []}
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
    if any(map(math.isnan, run["losses"])):
        raise ValueError(f"the training loss is not a number at lr={config.lr:g}: it diverged; lower the lr")
    kept = {"window": window, "bytes_kept": gradients.nbytes + updates.nbytes}
    kept["trainable"] = sum(w.numel() for w in session.trainable)
    return {**run, **summary(run["gradients"], run["stages"])}, kept


def summary(rows: list[list[float | None]], stages: list[list[int]]) -> dict[str, float | None]:
    """Mean cosines of a gradient with the step before's (``previous``) and with all kept ones (``earlier``);
    and the former over steps that follow a stage with τ* > 0 (``across``), and over the others (``within``).
    """
    moved = {step for step, tau in stages if tau > 0}
    previous = dict(_previous(rows))
    cosines = {
        "previous": list(previous.values()),
        "earlier": [c for row in rows for c in row if c is not None],
        "across": [c for t, c in previous.items() if t in moved],
        "within": [c for t, c in previous.items() if t not in moved],
    }
    return {name: fmean(values) if values else None for name, values in cosines.items()}


def _previous(rows: list[list[float | None]]) -> list[tuple[int, float]]:
    """(row, its cosine with the row before), where there is one."""
    return [(t, row[-1]) for t, row in enumerate(rows) if row and row[-1] is not None]


class CosineHistory:
    """The last ``window`` vectors, in float32, and the cosines of a new one with them."""

    def __init__(self, window: int) -> None:
        self._kept: deque[tuple[Tensor, float]] = deque(maxlen=window)  # with their norms

    @property
    def nbytes(self) -> int:
        return sum(vector.nbytes for vector, _ in self._kept)

    def add(self, vector: Tensor) -> list[float | None]:
        """Cosines of ``vector``, (P,), with those kept, oldest first; then it is kept itself, not copied.

        None where either is zero. Products are accumulated in float64.
        """
        norm = _product(vector, vector) ** 0.5
        cosines = [_product(kept, vector) / (norm * n) if norm * n else None for kept, n in self._kept]
        self._kept.append((vector, norm))
        return cosines


def _product(x: Tensor, y: Tensor) -> float:
    return float(inner_products(x[None], y[None]))


def table(data: Data) -> Table:
    header = ["cosine with gradients of", "the step before", "across a stage", "within", "all earlier steps"]
    means = ("previous", "across", "within", "earlier")
    return header, [[label, *(data[name][mean] for mean in means)] for name, label in LABELS.items()]


def what_was_seen(data: Data) -> list[str]:
    adam, ff = data["adam"], data["fast_forward"]
    seen = [
        f"A gradient's mean cosine with {of} is {ff[key]:.2f} with Fast Forward and {adam[key]:.2f} "
        "with Adam alone."
        for of, key in (("the step before's", "previous"), ("all earlier ones", "earlier"))
        if None not in (adam[key], ff[key])
    ]
    across, within = ff["across"], ff["within"]
    if across is None:
        seen.append("No stage moved the weights and was followed by a step.")
    elif within is not None:
        seen.append(
            f"From one step to the next it is {across:.2f} where a stage lies between, "
            f"{'lower' if across < within else 'not lower'} than the {within:.2f} where none does."
        )
    seen.append(
        f"Kept for that: {data['window']} gradients and as many updates of {data['trainable']:,} numbers, "
        f"{data['bytes_kept'] / 1e6:.1f} MB at a time."
    )
    return seen


def draw(figure: Figure, data: Data) -> None:
    """Top: cosines of gradients, a matrix per run. Below: gradient and update against the step before's."""
    figure.set_size_inches(7.2, 7.4)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    panels = above.subplots(1, 2, sharey=True)
    for axes, (name, label) in zip(panels, LABELS.items(), strict=True):
        image = _matrix(axes, data[name])
        axes.set_title(label, loc="left")
        axes.set_xlabel("earlier optimizer step")
    panels[0].set_ylabel("optimizer step")
    bar = above.colorbar(image, ax=panels, label="cosine of the two gradients", shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)

    upper, lower = below.subplots(2, 1, sharex=True)
    clean_axes(upper, y="cosine\nof the gradients")
    compared = "optimizer step, compared with the one before it (vertical line: a stage lies between them)"
    clean_axes(lower, compared, "cosine\nof the updates Δ", integer="x")
    for axes, of in ((upper, "gradients"), (lower, "updates")):
        for step, tau in data["fast_forward"]["stages"]:
            if tau and step < len(data["fast_forward"][of]):  # the first step from where the stage went
                axes.axvline(step + 1, color="#dddddd", linewidth=1.2, zorder=0)
        for (name, label), kind in zip(LABELS.items(), ("adam", "parabolic"), strict=True):
            known = _previous(data[name][of])
            steps, cosines = [t + 1 for t, _ in known], [value for _, value in known]
            axes.plot(steps, cosines, **STYLES[kind], markersize=3.5, linewidth=1.2, label=label)
    upper.legend(**{**ABOVE, "ncols": 2})


def _matrix(axes: Axes, run: Data) -> Any:
    rows, steps = run["gradients"], len(run["gradients"])
    square = [[math.nan] * steps for _ in range(steps)]
    for t, row in enumerate(rows):
        square[t][t - len(row) : t] = [math.nan if value is None else value for value in row]
    edge = (0.5, steps + 0.5)
    image = axes.imshow(square, cmap="RdBu_r", vmin=-1, vmax=1, extent=(*edge, *edge[::-1]))
    for step, tau in run["stages"]:
        if tau:
            axes.plot([0.5, step + 0.5], [step + 0.5] * 2, color=TEXT, linewidth=0.6, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return image
