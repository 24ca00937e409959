"""Do the gradients of different batches agree, and does τ* follow how much they do? The paper's Figure 13.

    g_1 … g_B     gradients of B disjoint training batches at one point of training, (P,) each
    consistency   mean of cos(g_i, g_j) over the B·(B−1)/2 pairs
    descent       cos(−ḡ, Δ), ḡ their mean, Δ the optimizer's last update: how far going on along Δ is
                  going downhill

Costs B gradients per point; memory (B + 6) · 4·P bytes.
"""

from __future__ import annotations

import random
from statistics import median

import torch
from torch import Tensor

from ffkernels.analysis.rank_correlation import partial_spearman, spearman
from ffkernels.analysis.show import Data, Table
from ffkernels.analysis.weight_space import cosines, flat, gradients_of
from ffkernels.reporting.plots import ABOVE, DOTTED, STYLES, TEXT, Axes, Figure, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.rules import check, whole
from ffkernels.training.session import Batch, Session, open_session, waiting_stages

SAME = 0.02  # cosines closer than this are called the same


def gradient_consistency(config: TrainConfig, *, batches: int = 8) -> Data:
    """Train with Fast Forward and measure gradients around every stage (Figure 13).

    Args:
        config: the run; without ``fast_forward`` it gets the default one.
        batches: B, how many batches of ``config.batch_size`` training examples are compared, at least 2.

    Returns:
        ``start``: the ``agreement`` there; ``stages``: of each ``optimizer_step``, ``tau``, ``loss_before``,
        ``loss_after`` (validation), and the agreements ``before`` and ``after``; ``tau_and_consistency``,
        ``tau_and_stage``: ``spearman`` of τ* with the consistency before the stage and with the stage's
        number. Both drift during training, so the former has ``partial`` too: what is left of its ρ with the
        number held fixed. ``batches``, ``batch_size``, ``trainable``, ``config``.

    Raises:
        ValueError: for fewer than 2 batches, or more than there are disjoint ones.
    """
    check("batches", batches, whole(2))  # pairs are compared
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
            around = {"before": _point(session, compared, update)}
            stage = session.ff.run_due_stage()
            around["after"] = _point(session, compared, update)
            kept = ("optimizer_step", "tau", "loss_before", "loss_after")
            stages.append({**{key: getattr(stage, key) for key in kept}, **around})
        trainable = sum(w.numel() for w in session.trainable)
    taus = [stage["tau"] for stage in stages]
    before = [stage["before"]["consistency"] for stage in stages]
    numbers = list(range(len(stages)))
    partial_rho = partial_spearman(before, taus, numbers)
    return {
        "start": start,
        "stages": stages,
        "tau_and_consistency": {**spearman(before, taus), "partial": partial_rho},
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
    moved = update is not None and bool(update.any())
    return {
        "consistency": float(pairs.mean()),
        "lowest": float(pairs.min()),
        "highest": float(pairs.max()),
        "norm": float(mean.norm()),
        "descent": float(cosines(torch.stack([-mean, update]))[0, 1]) if moved else None,
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


def table(data: Data) -> Table:
    measured = [f"{of} {when}" for of in ("consistency", "descent") for when in ("before", "after")]
    rows = [["start", None, data["start"]["consistency"], None, None, None]]
    for stage in data["stages"]:
        points = [stage[when][of] for of, when in map(str.split, measured)]
        rows.append([stage["optimizer_step"], stage["tau"], *points])
    return ["after step", "τ*", *measured], rows


def what_was_seen(data: Data) -> list[str]:
    stages = data["stages"]
    if not stages:
        return ["No Fast Forward stage was due in so few optimizer steps: raise --steps or lower --interval."]
    first, last = (stages[i]["before"]["consistency"] for i in (0, -1))
    change = "less than" if last < first - SAME else "more than" if last > first + SAME else "as much as"
    seen = [
        f"Gradients of different batches agree {change} at first: their mean cosine is {first:.2f} before "
        f"the first stage and {last:.2f} before the last."
    ]
    found = data["tau_and_consistency"]
    if found["rho"] is None:
        seen.append(f"{found['n']} stages are too few, or too alike, to tell whether τ* follows that.")
    else:
        claim = f"τ* {'rises' if found['rho'] > 0 else 'falls'} with that consistency"
        if found["p"] >= 0.05:
            claim = "No relation of τ* with that consistency is seen"
        left = "nothing to tell it by" if found["partial"] is None else f"{found['partial']:.2f}"
        seen.append(
            f"{claim}: {_correlation(found)}; with the stage's number, which drifts too, held fixed: {left}."
        )
    descents = [[stage[when]["descent"] for when in ("before", "after")] for stage in stages]
    known = [pair for pair in descents if None not in pair]
    if known:
        before, after = (median(values) for values in zip(*known, strict=True))
        seen.append(
            f"The cosine of −gradient and last update goes from {before:.2f} before a stage to {after:.2f} "
            "after it (medians)."
        )
    return seen


def _correlation(found: dict[str, float | None]) -> str:
    return f"Spearman's ρ = {found['rho']:.2f} over {found['n']} stages, p = {found['p']:.2g}"


def draw(figure: Figure, data: Data) -> None:
    """Top: consistency and descent over training, before and after each stage. Below: τ* over consistency."""
    stages, found = data["stages"], data["tau_and_consistency"]
    figure.set_size_inches(7.2, 7.0)
    over_training, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    upper, lower = over_training.subplots(2, 1, sharex=True)
    clean_axes(upper, y="cosine of two\nbatches' gradients")
    clean_axes(lower, "optimizer step", "cosine of −gradient\nand last update Δ", integer="x")
    for axes, of in ((upper, "consistency"), (lower, "descent")):
        _around_stages(axes, data, of)
    lower.axhline(0, **DOTTED)
    if not stages:
        return
    upper.legend(**ABOVE)

    axes = below.subplots()
    title = f"{found['n']} stages: no rank correlation can be told"
    if found["rho"] is not None:
        title = _correlation(found).replace("-", "−")
    label = "consistency: mean cosine of two batches' gradients before the stage"
    clean_axes(axes, label, "τ*: times the update\nwas repeated", title=title)
    steps, taus = ([stage[key] for stage in stages] for key in ("optimizer_step", "tau"))
    before = [stage["before"]["consistency"] for stage in stages]
    points = axes.scatter(before, taus, c=steps, cmap="viridis_r", s=45, zorder=3)
    axes.set_ylim(bottom=0)
    bar = below.colorbar(points, ax=axes, label="optimizer step", pad=0.02)
    bar.outline.set_visible(False)


def _around_stages(axes: Axes, data: Data, of: str) -> None:
    points = {
        when: [(stage["optimizer_step"], stage[when][of]) for stage in data["stages"]]
        for when in ("before", "after")
    }
    for (step, low), (_, high) in zip(*points.values(), strict=True):
        if low is not None and high is not None:
            axes.plot([step, step], [low, high], color="#bbbbbb", linewidth=1.2, zorder=1)
    marks = {"linestyle": "none", "markersize": 6, "zorder": 2}
    if data["start"][of] is not None:
        star = {"color": TEXT, "marker": "*", "linestyle": "none", "markersize": 9}
        axes.plot(0, data["start"][of], **star, label="start")
    labels = {"before": "before the stage (after the optimizer's step)", "after": "after it"}
    for (when, label), style in zip(labels.items(), (STYLES["adam"], STYLES["parabolic"]), strict=True):
        known = [point for point in points[when] if point[1] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), **{**style, **marks}, label=label)
