"""The loss on the plane through W₀, W_SGD and W_FF, with both runs' ways drawn on it. The paper's Figure 5.

W₀ is where training starts, W_SGD where the plain optimizer ends, and W_FF where Fast Forward does. The x
axis points from W₀ to W_SGD (``weight_space``); of the two ways, which leave the plane, the projections
are drawn.

Costs two runs and grid² losses; memory 4·P bytes for each kept point of the ways, and 7 vectors of 8·P.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ffkernels.analysis.race import TOLERANCE
from ffkernels.analysis.show import Data, Table
from ffkernels.analysis.weight_space import flat, losses_at, plane_through, spans
from ffkernels.reporting.plots import ABOVE, STYLES, TEXT, Axes, Figure, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.rules import at_least, check, one_of, whole
from ffkernels.training.session import Session, open_session
from ffkernels.validation.loss import ValidationLoss

# A run's weights on its way, (P,) float32 each, with their optimizer step.
Way = list[tuple[int, Tensor]]

CHECK_EVERY = 3  # optimizer steps between test losses of a run that has a target
POINTS = 40  # of a way, about so many are kept, evenly by optimizer step; and all after stages
BETWEEN = 11  # losses on the straight line from W_SGD to W_FF
LEVELS = 14
# Of each end: what it is called in words and in the picture, and its style there.
ENDS = {
    "start": ("W₀", "$W_0$", {**STYLES["other"], "marker": "*", "markersize": 13}),
    "sgd": ("W_SGD", "$W_{SGD}$, Adam", {**STYLES["adam"], "markersize": 9}),
    "ff": ("W_FF", "$W_{FF}$, Fast Forward", {**STYLES["parabolic"], "markersize": 9}),
}


def loss_plane(
    config: TrainConfig,
    *,
    until: str = "loss",
    grid: int = 21,
    margin: float = 0.25,
    examples: int = 64,
) -> Data:
    """The loss around the ends of a run with the plain optimizer and one with Fast Forward (Figure 5).

    Args:
        config: the run; without ``fast_forward`` its second one gets the default one.
        until: where Fast Forward ends: ``"loss"``, at W_SGD's test loss plus 1e-4, looked at every 3
            optimizer steps and after each stage, or ``"steps"``, after as many steps.
        grid: points along each axis, 3 at least.
        margin: how far the grid reaches beyond everything drawn, as a share of its extent.
        examples: the loss is that of so many test examples, the first ones. Neither run has seen them, while
            Fast Forward has searched with the validation examples.

    Returns:
        ``kind``: "plane", or "line" where the ends and the start are on one; ``x``, ``y``, ``loss``:
        coordinates of the grid, and its losses, a row per y; ``points``: ``start``, ``sgd`` and ``ff``, each
        with ``x``, ``y``, ``loss`` (on the grid's examples), ``test_loss`` (on all), ``distance`` (from the
        start) and ``optimizer_steps``; ``ways`` of ``sgd`` and ``ff``: [optimizer_step, x, y] each;
        ``between``: losses evenly spread on the straight line from W_SGD to W_FF, both included; ``cosine``
        of W_SGD − W₀ and W_FF − W₀; ``stages``: [optimizer_step, tau] each; ``reached``: whether W_FF has
        W_SGD's test loss; ``until``, ``examples``, ``bytes_kept``, ``trainable``, ``config``.

    Raises:
        ValueError: naming an argument out of range; when a run diverged; when nothing moved.
    """
    check("until", until, one_of(("loss", "steps")))
    check("margin", margin, at_least(0))
    check("grid", grid, whole(3))
    check("examples", examples, whole(1))
    config = config.with_fast_forward()
    with open_session(replace(config, fast_forward=None)) as session:
        start_loss = session.test_loss()
        sgd, sgd_loss = _run(session)
    del session  # the second run may need its memory
    with open_session(config) as session:
        target = sgd_loss + TOLERANCE
        ff, ff_loss = _run(session, target if until == "loss" else None)
        held_out, tokens = session.task.test[:examples], config.eval_tokens
        loss = ValidationLoss(session.model, held_out, collator=session.collator, micro_batch_tokens=tokens)
        shown = _losses_around(session, sgd, ff, loss, grid, margin)
        stages = [[stage.optimizer_step, stage.tau] for stage in session.ff.stages]
    start, moved = sgd[0][1].double(), []
    reached = (*sgd[0], start_loss), (*sgd[-1], sgd_loss), (*ff[-1], ff_loss)
    for point, (step, weights, test_loss) in zip(shown["points"].values(), reached, strict=True):
        moved.append(weights.double() - start)
        point |= {"distance": float(moved[-1].norm()), "test_loss": test_loss, "optimizer_steps": step}
    _, to_sgd, to_ff = moved
    return {
        **shown,
        "cosine": float(to_sgd @ to_ff / (to_sgd.norm() * to_ff.norm())),
        "stages": stages,
        "until": until,
        "reached": ff_loss <= target,
        "examples": len(held_out),
        "bytes_kept": sum(weights.nbytes for _, weights in sgd + ff),
        "trainable": start.numel(),
        "config": config.to_dict(),
    }


def _run(session: Session, target: float | None = None) -> tuple[Way, float]:
    """Train, until the test loss is at most ``target`` where one is given; the way and the last loss."""
    way, stride = [(0, flat(session.trainable))], math.ceil(session.steps / POINTS)
    stages = session.ff.stages if session.ff is not None else []
    for step in range(1, session.steps + 1):
        before = len(stages)
        session.step(step - 1)
        staged, reached = len(stages) > before, False
        if target is not None and (staged or step % CHECK_EVERY == 0):
            reached = session.test_loss() <= target
        if staged or reached or step % stride == 0 or step == session.steps:
            way.append((step, flat(session.trainable)))
        if reached:
            break
    loss = session.test_loss()
    if not math.isfinite(loss):
        raise ValueError(f"a run diverged at lr={session.config.lr:g}: its test loss is {loss}; lower the lr")
    return way, loss


def _losses_around(
    session: Session, sgd: Way, ff: Way, loss: ValidationLoss, grid: int, margin: float
) -> Data:
    ends = {"start": sgd[0][1], "sgd": sgd[-1][1], "ff": ff[-1][1]}
    plane = plane_through(*ends.values())
    at = {name: plane.at(weights) for name, weights in ends.items()}
    ways = {name: [[step, *plane.at(w)] for step, w in way] for name, way in (("sgd", sgd), ("ff", ff))}
    xs, ys = spans([*at.values(), *((x, y) for way in ways.values() for _, x, y in way)], grid, margin)
    ys = ys if plane.v is not None else [0.0]

    def losses(vectors: Iterable[Tensor]) -> list[float]:
        return losses_at(vectors, session.trainable, loss)

    rows = [losses(plane.weights(x, y) for x in xs) for y in ys]
    at_ends = losses(ends.values())
    places = zip(at.items(), at_ends, strict=True)
    shares = (i / (BETWEEN - 1) for i in range(BETWEEN))
    return {
        "kind": "plane" if plane.v is not None else "line",
        "x": xs,
        "y": ys,
        "loss": rows,
        "points": {name: {"x": x, "y": y, "loss": value} for (name, (x, y)), value in places},
        "ways": ways,
        "between": losses(torch.lerp(ends["sgd"].double(), ends["ff"].double(), share) for share in shares),
    }


def table(data: Data) -> Table:
    header = ["weights", "optimizer steps", "x", "y", "distance from W₀", "test loss", "loss in the picture"]
    rows = []
    for name, (label, *_) in ENDS.items():
        at = data["points"][name]
        place = [round(at["x"], 6) + 0.0, round(at["y"], 6) + 0.0]  # 1e-17 is a zero that was rounded
        rows.append([label, at["optimizer_steps"], *place, at["distance"], at["test_loss"], at["loss"]])
    return header, rows


def what_was_seen(data: Data) -> list[str]:
    sgd, ff = data["points"]["sgd"], data["points"]["ff"]
    taken = sum(tau for _, tau in data["stages"])
    if data["until"] == "loss":
        reached = f"{'having' if data['reached'] else 'without having'} reached Adam's test loss"
    else:
        higher = ff["test_loss"] - sgd["test_loss"]
        reached = f"{abs(higher):.4f} nats {'above' if higher > 0 else 'below'} Adam's test loss"
    rise = max(data["between"]) - max(data["between"][0], data["between"][-1])
    barrier = (
        f"On the straight line from W_SGD to W_FF the loss rises {rise:.2g} nats above the higher end."
        if rise > 0
        else f"At {len(data['between']) - 2} places on the straight line from W_SGD to W_FF the loss is "
        "nowhere above the higher end's: no barrier was seen."
    )
    lowest = min(value for row in data["loss"] for value in row)
    return [
        f"Fast Forward ends after {ff['optimizer_steps']} optimizer steps and {taken} Fast Forward steps, "
        f"{reached}, {ff['distance']:.3g} from W₀ (Adam: {sgd['distance']:.3g} after "
        f"{sgd['optimizer_steps']} steps); the directions have cosine {data['cosine']:.2f}.",
        barrier,
        f"The lowest loss on the grid is {lowest:.3f}; W_SGD has {sgd['loss']:.3f} and W_FF {ff['loss']:.3f} "
        f"on the same {data['examples']} test examples.",
    ]


def draw(figure: Figure, data: Data) -> None:
    """Contours of the loss with the three points and both ways; on a line, the loss along it."""
    axes, plane = figure.add_subplot(), data["kind"] == "plane"
    if plane:
        width, height = (data[axis][-1] - data[axis][0] for axis in "xy")
        figure.set_size_inches(7.2, 1.1 + 5.4 * height / width)
        _contours(figure, axes, data)
        axes.set_ylabel("distance across, towards $W_{FF}$")
        axes.set_aspect("equal")
    else:
        clean_axes(axes, y=_loss_label(data))
        axes.plot(data["x"], data["loss"][0], color=TEXT, linewidth=1.4)
    axes.set_xlabel("distance from $W_0$ towards $W_{SGD}$")
    for name, (_, label, style) in ENDS.items():
        point, way = data["points"][name], data["ways"].get(name, [])
        if plane and way:
            _, xs, ys = zip(*way, strict=True)
            axes.plot(xs, ys, color="white", linewidth=3.0, zorder=2)
            axes.plot(xs, ys, color=style["color"], linewidth=1.6, marker=".", markersize=4, zorder=3)
        marks = {**style, "markeredgecolor": "white", "linestyle": "none", "zorder": 4, "clip_on": False}
        place = point["x"], point["y" if plane else "loss"]
        axes.plot(*place, **marks, label=f"{label}: {point['loss']:.3f}")
    tight = {"borderaxespad": 0.3, "columnspacing": 1.4, "handletextpad": 0.2}
    axes.legend(**{**ABOVE, **tight})


def _contours(figure: Figure, axes: Axes, data: Data) -> None:
    losses = sorted(value for row in data["loss"] for value in row if math.isfinite(value))
    # Quantiles, so that the lines show the valley also where the walls are a hundred times as high.
    levels = sorted({losses[round(i * (len(losses) - 1) / LEVELS)] for i in range(LEVELS + 1)})
    if len(levels) < 3:
        levels = [losses[0] - 1e-6, losses[0], losses[-1] + 1e-6]
    filled = axes.contourf(data["x"], data["y"], data["loss"], levels=levels, cmap="YlOrBr")
    axes.contour(
        data["x"], data["y"], data["loss"], levels=levels[1:-1], colors="#7a5230", linewidths=0.5, alpha=0.4
    )
    bar = figure.colorbar(filled, ax=axes, label=_loss_label(data), pad=0.02, format="%.2f")
    bar.outline.set_visible(False)


def _loss_label(data: Data) -> str:
    return f"loss of {data['examples']} test examples (nats per token)"
