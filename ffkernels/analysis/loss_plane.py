"""The loss on the plane through W₀, W_SGD and W_FF, with both runs' ways drawn on it. The paper's Figure 5.

W₀ is where training starts, W_SGD where the plain optimizer is after all steps, and W_FF where Fast Forward
ends, from the same start on the same batches: as soon as its test loss is W_SGD's plus a tolerance
(``until="loss"``, the protocol of the comparison), or after as many optimizer steps (``until="steps"``). The
x axis points from W₀ to W_SGD (``weight_plane``). The two ways do not lie in the plane; their projections do.

Source: Rahamim et al., arXiv 2409.04206, Figure 5. Costs the two runs and grid² losses; memory: 4·P bytes for
each kept point of the two ways, and 7 vectors of 8·P.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffkernels.analysis.between_steps import flat
from ffkernels.analysis.weight_plane import losses_on, plane_through, spans, weights_put_back
from ffkernels.reporting.plots import STYLES, TEXT, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import Session, open_session
from ffkernels.validation.loss import ValidationLoss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "loss_plane", "what_was_seen"]

UNTIL = ("loss", "steps")
POINTS = 40
BETWEEN = 11
LEVELS = 14
POINT_STYLES = {
    "start": ("other", "$W_0$"),
    "sgd": ("adam", "$W_{SGD}$, Adam"),
    "ff": ("parabolic", "$W_{FF}$, Fast Forward"),
}
NAMES = {"start": "W₀", "sgd": "W_SGD", "ff": "W_FF"}


def loss_plane(
    config: TrainConfig,
    *,
    until: str = "loss",
    tolerance: float = 1e-4,
    check_every: int = 3,
    grid: int = 21,
    margin: float = 0.25,
    examples: int = 64,
    way: int = POINTS,
) -> dict[str, Any]:
    """The loss around the ends of a run with the plain optimizer and one with Fast Forward (Figure 5).

    Args:
        config: the run; without ``fast_forward`` its second one gets the default one.
        until: where Fast Forward ends: ``"loss"``, at W_SGD's test loss plus ``tolerance``, looked at every
            ``check_every`` optimizer steps and after each stage, or ``"steps"``, after as many steps.
        grid: points along each axis, 3 at least.
        margin: how far the grid reaches beyond everything drawn, as a share of its extent.
        examples: the loss is that of so many test examples, the first ones. Neither run has seen them, while
            Fast Forward has searched with the validation examples.
        way: about so many points of each run's way are kept, evenly by optimizer step, and all after stages.

    Returns:
        ``kind``: "plane", or "line" where the ends and the start are on one.
        ``x``, ``y``, ``loss``: coordinates of the grid, and its losses, a row per y.
        ``points``: ``start``, ``sgd`` and ``ff``, each with ``x``, ``y``, ``loss`` (on the grid's examples),
        ``test_loss`` (on all), ``distance`` (from the start) and ``optimizer_steps``.
        ``ways``: of ``sgd`` and ``ff``, lists of [optimizer_step, x, y].
        ``between``: losses evenly spread on the straight line from W_SGD to W_FF, both included.
        ``cosine`` of W_SGD − W₀ and W_FF − W₀; ``stages``, [optimizer_step, tau] each; ``reached``, whether
        W_FF has W_SGD's test loss; ``until``, ``examples``, ``bytes_kept``, ``trainable``, ``config``.

    Raises:
        ValueError: naming an argument out of range; when a run diverged; when nothing moved.
    """
    _check(until=until, grid=grid, margin=margin, examples=examples, way=way, check_every=check_every)
    config = config.with_fast_forward()
    with open_session(dataclasses.replace(config, fast_forward=None)) as session:
        start_loss = session.test_loss()
        sgd = _run(session, way)
    del session  # the second run may need its memory
    with open_session(config) as session:
        target = sgd.test_loss + tolerance
        ff = _run(session, way, target if until == "loss" else None, check_every)
        held_out = session.task.test[:examples]
        loss = ValidationLoss(
            session.model, held_out, collator=session.collator, micro_batch_tokens=config.eval_tokens
        )
        shown = _losses_around(session, sgd, ff, loss, grid, margin)
        stages = [[stage.optimizer_step, stage.tau] for stage in session.ff.stages]
    start = sgd.start.double()
    to_sgd, to_ff = sgd.end.double() - start, ff.end.double() - start
    for name, distance, test_loss, steps in (
        ("start", 0.0, start_loss, 0),
        ("sgd", float(to_sgd.norm()), sgd.test_loss, sgd.steps),
        ("ff", float(to_ff.norm()), ff.test_loss, ff.steps),
    ):
        shown["points"][name] |= {"distance": distance, "test_loss": test_loss, "optimizer_steps": steps}
    return {
        **shown,
        "cosine": float(to_sgd @ to_ff / (to_sgd.norm() * to_ff.norm())),
        "stages": stages,
        "until": until,
        "reached": ff.test_loss <= target,
        "examples": len(held_out),
        "bytes_kept": sgd.nbytes + ff.nbytes,
        "trainable": start.numel(),
        "config": config.to_dict(),
    }


class _Way:
    """Copies of a run's weights on its way, (P,) float32 each, and how it ended."""

    def __init__(self, start: Tensor) -> None:
        self.kept: list[tuple[int, Tensor]] = [(0, start)]
        self.test_loss, self.steps = math.nan, 0

    @property
    def start(self) -> Tensor:
        return self.kept[0][1]

    @property
    def end(self) -> Tensor:
        return self.kept[-1][1]

    @property
    def nbytes(self) -> int:
        return sum(weights.numel() * weights.element_size() for _, weights in self.kept)


def _run(session: Session, points: int, target: float | None = None, check_every: int = 1) -> _Way:
    """Train, until the test loss is at most ``target`` where one is given."""
    way, stride, reached = _Way(flat(session.trainable)), math.ceil(session.steps / points), False
    while way.steps < session.steps and not reached:
        before = _stages(session)
        session.step(way.steps)
        way.steps += 1
        staged = _stages(session) > before
        if target is not None and (staged or way.steps % check_every == 0):
            reached = session.test_loss() <= target
        if staged or reached or way.steps % stride == 0 or way.steps == session.steps:
            way.kept.append((way.steps, flat(session.trainable)))
    way.test_loss = session.test_loss()
    if not math.isfinite(way.test_loss):
        raise ValueError(
            f"a run diverged at lr={session.config.lr:g}: its test loss is {way.test_loss}; lower the lr"
        )
    return way


def _stages(session: Session) -> int:
    return len(session.ff.stages) if session.ff is not None else 0


def _losses_around(
    session: Session, sgd: _Way, ff: _Way, loss: ValidationLoss, grid: int, margin: float
) -> dict[str, Any]:
    ends = {"start": sgd.start, "sgd": sgd.end, "ff": ff.end}
    plane = plane_through(*ends.values())
    at = {name: plane.at(weights) for name, weights in ends.items()}
    ways = {name: [[n, *plane.at(w)] for n, w in run.kept] for name, run in (("sgd", sgd), ("ff", ff))}
    drawn = [*at.values(), *((x, y) for points in ways.values() for _, x, y in points)]
    xs, ys = spans(drawn, grid, margin)
    ys = ys if plane.v is not None else [0.0]
    values = losses_on(plane, xs, ys, session.trainable, loss)
    points: dict[str, dict[str, Any]] = {}
    between = []
    with weights_put_back(session.trainable) as write:
        for name, weights in ends.items():
            write(weights)
            points[name] = {"x": at[name][0], "y": at[name][1], "loss": float(loss())}
        for i in range(BETWEEN):
            write(torch.lerp(sgd.end.double(), ff.end.double(), i / (BETWEEN - 1)))
            between.append(float(loss()))
    kind = "plane" if plane.v is not None else "line"
    found = {"kind": kind, "x": xs, "y": ys, "loss": values, "points": points, "ways": ways}
    return {**found, "between": between}


def _check(*, until: str, margin: float, **integers: int) -> None:
    if until not in UNTIL:
        raise ValueError(f"until={until!r}: must be one of {', '.join(map(repr, UNTIL))}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin={margin!r}: must be a number of at least 0")
    for name, value in integers.items():
        low = 3 if name == "grid" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}={value!r}: must be an integer of at least {low}")


def what_was_seen(data: dict[str, Any]) -> list[str]:
    """The data in sentences."""
    sgd, ff = data["points"]["sgd"], data["points"]["ff"]
    taken = sum(tau for _, tau in data["stages"])
    ended = f"Fast Forward ends after {ff['optimizer_steps']} optimizer steps and {taken} Fast Forward steps"
    if data["until"] == "loss":
        reached = (
            "having reached Adam's test loss"
            if data["reached"]
            else "without having reached Adam's test loss"
        )
    else:
        reached = f"{abs(ff['test_loss'] - sgd['test_loss']):.4f} nats "
        reached += ("above" if ff["test_loss"] > sgd["test_loss"] else "below") + " Adam's test loss"
    sentences = [
        f"{ended}, {reached}, {ff['distance']:.3g} from W₀ (Adam: {sgd['distance']:.3g} after "
        f"{sgd['optimizer_steps']} steps); the directions have cosine {data['cosine']:.2f}."
    ]
    ends = max(data["between"][0], data["between"][-1])
    rise = max(data["between"]) - ends
    sentences.append(
        f"On the straight line from W_SGD to W_FF the loss rises {rise:.2g} nats above the higher end."
        if rise > 0
        else f"At {len(data['between']) - 2} places on the straight line from W_SGD to W_FF the loss is "
        "nowhere above the higher end's: no barrier was seen."
    )
    lowest = min(value for row in data["loss"] for value in row)
    sentences.append(
        f"The lowest loss on the grid is {lowest:.3f}; W_SGD has {sgd['loss']:.3f} and W_FF {ff['loss']:.3f} "
        f"on the same {data['examples']} test examples."
    )
    return [sentence.replace(" -", " −") for sentence in sentences]


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """Contours of the loss with the three points and both ways; on a line, the loss along it."""
    axes = figure.add_subplot()
    if data["kind"] == "plane":
        width, height = (data[axis][-1] - data[axis][0] for axis in "xy")
        figure.set_size_inches(7.2, 1.1 + 5.4 * height / width)
        _contours(figure, axes, data)
        axes.set_ylabel("distance across, towards $W_{FF}$")
        axes.set_aspect("equal")
    else:
        clean_axes(axes)
        axes.plot(data["x"], data["loss"][0], color=TEXT, linewidth=1.4)
        axes.set_ylabel(_loss_label(data))
    axes.set_xlabel("distance from $W_0$ towards $W_{SGD}$")
    flat_picture = data["kind"] == "line"
    for name, (style, label) in POINT_STYLES.items():
        marks, point = STYLES[style], data["points"][name]
        way = data["ways"].get(name, [])
        if not flat_picture and way:
            xs, ys = [x for _, x, _ in way], [y for _, _, y in way]
            axes.plot(xs, ys, color="white", linewidth=3.0, zorder=2)
            axes.plot(xs, ys, color=marks["color"], linewidth=1.6, marker=".", markersize=4, zorder=3)
        axes.plot(
            point["x"],
            point["loss"] if flat_picture else point["y"],
            color=marks["color"],
            marker="*" if name == "start" else marks["marker"],
            markersize=13 if name == "start" else 9,
            markeredgecolor="white",
            linestyle="none",
            label=f"{label}: {point['loss']:.3f}",
            zorder=4,
            clip_on=False,
        )
    tight = {"borderaxespad": 0.3, "columnspacing": 1.4, "handletextpad": 0.2}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, **tight)


def _contours(figure: Figure, axes: Axes, data: dict[str, Any]) -> None:
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


def _loss_label(data: dict[str, Any]) -> str:
    return f"loss of {data['examples']} test examples (nats per token)"
