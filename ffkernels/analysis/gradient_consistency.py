"""Do the gradients of different batches agree, and does τ* follow how much they do? The paper's Figure 13.

    g_1 … g_B     gradients of B disjoint training batches at one point of training, all trainable tensors
                  as one vector
    consistency   mean of cos(g_i, g_j) over the B·(B−1)/2 pairs
    descent       cos(−ḡ, Δ), ḡ their mean, Δ the optimizer's last update: how far going on along Δ is
                  going downhill

Measured before the first step, and around every Fast Forward stage: before it, at the weights the optimizer's
step led to, and after it, at the weights the stage chose. It is the same B batches at every point. A stage
searches the lowest loss along Δ, and there descent would be zero if its 32 validation examples were all of
the data.

Source: Rahamim et al., arXiv 2409.04206, Figure 13. Costs B gradients per point; memory (B + 6) · 4·P bytes.
"""

from __future__ import annotations

import random
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffkernels.analysis.between_steps import cosine, cosines, flat, gradients_of, waiting_stages
from ffkernels.analysis.rank_correlation import partial_spearman, spearman
from ffkernels.reporting.plots import STYLES, TEXT, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import Batch, Session, open_session

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["agreement", "draw", "gradient_consistency", "what_was_seen"]

BATCHES = 8
SAME = 0.02  # cosines closer than this are called the same


def gradient_consistency(config: TrainConfig, *, batches: int = BATCHES) -> dict[str, Any]:
    """Train with Fast Forward and measure gradients around every stage (Figure 13).

    Args:
        config: the run; without ``fast_forward`` it gets the default one.
        batches: B, how many batches of ``config.batch_size`` training examples are compared, at least 2.

    Returns:
        ``start``: a point, that is ``consistency``, ``lowest`` and ``highest`` of the pairs, ``norm`` of ḡ,
        and ``descent``, None at the start.
        ``stages``: of each ``optimizer_step``, ``tau``, ``loss_before``, ``loss_after`` (validation), and the
        points ``before`` and ``after``.
        ``tau_and_consistency``, ``tau_and_stage``: ``rho``, ``p`` and ``n`` (``rank_correlation``) of τ* with
        the consistency before the stage, and with the stage's number. Both drift during training, so the
        former has ``partial`` too: what is left of its ρ with the stage's number held fixed.
        ``batches``, ``batch_size``, ``trainable``, ``config``.

    Raises:
        ValueError: for fewer than 2 batches, or more than there are disjoint ones.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 2:
        raise ValueError(f"batches={batches!r}: must be an integer of at least 2, since pairs are compared")
    config = config.with_fast_forward()
    with open_session(config, attach=waiting_stages) as session:
        compared = _disjoint_batches(session, batches)
        start = _point(session, compared, None)
        stages = []
        for step in range(session.steps):
            before = flat(session.trainable)
            session.backward(session.load(step))
            session.update(step)
            if not session.ff.stage_due:
                continue
            update = flat(session.trainable) - before
            point_before = _point(session, compared, update)
            stage = session.ff.run_due_stage()
            stages.append(
                {
                    "optimizer_step": stage.optimizer_step,
                    "tau": stage.tau,
                    "loss_before": stage.loss_before,
                    "loss_after": stage.loss_after,
                    "before": point_before,
                    "after": _point(session, compared, update),
                }
            )
        trainable = sum(w.numel() for w in session.trainable)
    taus = [stage["tau"] for stage in stages]
    consistencies = [stage["before"]["consistency"] for stage in stages]
    numbers = list(range(len(stages)))
    return {
        "start": start,
        "stages": stages,
        "tau_and_consistency": {
            **spearman(consistencies, taus),
            "partial": partial_spearman(consistencies, taus, numbers),
        },
        "tau_and_stage": spearman(numbers, taus),
        "batches": batches,
        "batch_size": config.batch_size,
        "trainable": trainable,
        "config": config.to_dict(),
    }


def agreement(gradients: Tensor, update: Tensor | None = None) -> dict[str, float | None]:
    """How far B gradients agree, (B, P), and whether ``update``, (P,), goes down their mean.

    Returns ``consistency``, ``lowest`` and ``highest`` cosine over pairs, ``norm`` of the mean gradient, and
    ``descent``, None without an update or where it is zero.
    """
    count = len(gradients)
    pairs = cosines(gradients)[tuple(torch.triu_indices(count, count, offset=1))]
    mean = sum(gradient.double() for gradient in gradients) / count
    descent = None
    if update is not None and bool(update.any()):
        descent = cosine(-mean, update)
    return {
        "consistency": float(pairs.mean()),
        "lowest": float(pairs.min()),
        "highest": float(pairs.max()),
        "norm": float(mean.norm()),
        "descent": descent,
    }


def _point(session: Session, batches: list[Batch], update: Tensor | None) -> dict[str, float | None]:
    point = agreement(gradients_of(session, batches), update)
    if point["norm"] != point["norm"]:
        raise ValueError(
            f"the gradient is not a number at lr={session.config.lr:g}: the run has diverged; lower the lr"
        )
    return point


def _disjoint_batches(session: Session, count: int) -> list[Batch]:
    """Batches of training examples that no two of them share, the same for the same seed."""
    size, there = session.config.batch_size, len(session.task.train)
    if count * size > there:
        raise ValueError(
            f"{count} disjoint batches of {size} need {count * size} training examples, and task "
            f"{session.task.name!r} has {there}: compare fewer batches, or make them smaller"
        )
    chosen = random.Random(session.config.seed).sample(range(there), count * size)
    return [session.batch([session.task.train[i] for i in chosen[k::count]]) for k in range(count)]


def what_was_seen(data: dict[str, Any]) -> list[str]:
    """The data in sentences."""
    stages = data["stages"]
    if not stages:
        return ["No Fast Forward stage was due in so few optimizer steps: raise --steps or lower --interval."]
    first, last = (stages[i]["before"]["consistency"] for i in (0, -1))
    change = "less" if last < first - SAME else "more" if last > first + SAME else "as much"
    sentences = [
        f"Gradients of different batches agree {change} {'than' if change != 'as much' else 'as'} at first: "
        f"their mean cosine is {first:.2f} before the first stage and {last:.2f} before the last."
    ]
    found = data["tau_and_consistency"]
    if found["rho"] is None:
        sentences.append(f"{found['n']} stages are too few, or too alike, to tell whether τ* follows that.")
    else:
        follows = f"τ* {'rises' if found['rho'] > 0 else 'falls'} with that consistency"
        claim = follows if found["p"] < 0.05 else "No relation of τ* with that consistency is seen"
        partial = found["partial"]
        left = "nothing to tell it by" if partial is None else f"{partial:.2f}"
        sentences.append(
            f"{claim}: Spearman's ρ = {found['rho']:.2f} over {found['n']} stages, p = {found['p']:.2g}; "
            f"with the stage's number, which drifts too, held fixed: {left}."
        )
    pairs = [(s["before"]["descent"], s["after"]["descent"]) for s in stages]
    known = [pair for pair in pairs if None not in pair]
    if known:
        before, after = (median(values) for values in zip(*known, strict=True))
        sentences.append(
            f"The cosine of −gradient and last update goes from {before:.2f} before a stage to {after:.2f} "
            "after it (medians)."
        )
    return [sentence.replace(" -", " −") for sentence in sentences]


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """Top: consistency and descent over training, before and after each stage. Below: τ* over consistency."""
    stages = data["stages"]
    figure.set_size_inches(7.2, 7.0)
    over_training, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    upper, lower = over_training.subplots(2, 1, sharex=True)
    for axes, of, label in (
        (upper, "consistency", "cosine of two\nbatches' gradients"),
        (lower, "descent", "cosine of −gradient\nand last update Δ"),
    ):
        _around_stages(axes, data, of)
        axes.set_ylabel(label)
    lower.axhline(0, color=TEXT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
    lower.set_xlabel("optimizer step")
    lower.xaxis.get_major_locator().set_params(integer=True)
    if not stages:
        return
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, frameon=False)

    axes = below.subplots()
    clean_axes(axes)
    points = axes.scatter(
        [stage["before"]["consistency"] for stage in stages],
        [stage["tau"] for stage in stages],
        c=[stage["optimizer_step"] for stage in stages],
        cmap="viridis_r",
        s=45,
        zorder=3,
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("consistency: mean cosine of two batches' gradients before the stage")
    axes.set_ylabel("τ*: times the update\nwas repeated")
    axes.set_title(_correlation(data["tau_and_consistency"]), loc="left")
    bar = below.colorbar(points, ax=axes, label="optimizer step", pad=0.02)
    bar.outline.set_visible(False)


def _around_stages(axes: Axes, data: dict[str, Any], of: str) -> None:
    clean_axes(axes)
    stages = data["stages"]
    steps = [stage["optimizer_step"] for stage in stages]
    before = [stage["before"][of] for stage in stages]
    after = [stage["after"][of] for stage in stages]
    for step, low, high in zip(steps, before, after, strict=True):
        if low is not None and high is not None:
            axes.plot([step, step], [low, high], color="#bbbbbb", linewidth=1.2, zorder=1)
    if data["start"][of] is not None:
        axes.plot(0, data["start"][of], color=TEXT, marker="*", markersize=9, linestyle="none", label="start")
    for values, style, label in (
        (before, "adam", "before the stage (after the optimizer's step)"),
        (after, "parabolic", "after it"),
    ):
        drawn = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        if drawn:
            marks = {"color": STYLES[style]["color"], "marker": STYLES[style]["marker"], "zorder": 2}
            axes.plot(*zip(*drawn, strict=True), **marks, markersize=6, linestyle="none", label=label)


def _correlation(found: dict[str, float | None]) -> str:
    if found["rho"] is None:
        return f"{found['n']} stages: no rank correlation can be told"
    return f"Spearman's ρ = {found['rho']:.2f} over {found['n']} stages, p = {found['p']:.2g}".replace(
        "-", "−"
    )
