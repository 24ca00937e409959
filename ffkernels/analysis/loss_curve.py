"""The loss during training, optimizer steps and Fast Forward steps told apart (the paper's Figs. 4 and 9).

A run with Fast Forward is followed along its path, on which an optimizer step is 1 long and a stage τ*. The
test loss is measured after optimizer steps, and during a stage at every τ that the search tries, right after
its validation loss: the search does not see it. Beside it runs the plain optimizer from the same start, with
the same data order and learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ffkernels.engine.fast_forward import FastForward
from ffkernels.reporting.plots import LEGEND, PATH, SGD, STYLES, TEXT, accepted, clean_axes, draw_walk
from ffkernels.training.session import Session, open_session
from ffkernels.validation.loss import ValidationLoss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ffkernels.training.config import TrainConfig

__all__ = ["along_the_path", "draw", "loss_curve"]

Points = list[tuple[float, float]]


def loss_curve(config: TrainConfig, *, evaluate_every: int = 1) -> dict[str, Any]:
    """Losses of a run with Fast Forward and of the plain optimizer's (the paper's Figs. 4 and 9).

    Args:
        config: the run, with Fast Forward.
        evaluate_every: optimizer steps between test losses; besides, one is taken at every τ of a stage, and
            before the first and after the last step.

    Returns:
        ``config``; ``fast_forward``: ``start`` (test loss before the first step), ``steps``, each with
        ``optimizer_step``, ``train_loss`` (of its batch, before the update) and ``test_loss`` (after step and
        stage; None where none was measured), and ``stages``, each with ``optimizer_step``, ``tau``,
        ``losses`` and ``test_losses``, both as ``[τ, loss]`` in the order of the search; ``optimizer``:
        ``start`` and ``steps`` of the plain run; ``reached``: the first measured optimizer step at which
        the run with Fast Forward has the plain run's final test loss, None where it never has. Losses are
        nats per token.

    Raises:
        ValueError: when ``config`` has no Fast Forward or ``evaluate_every`` is below 1.
    """
    if config.fast_forward is None:
        raise ValueError("config.fast_forward is None: give a FastForwardConfig")
    if evaluate_every < 1:
        raise ValueError(f"evaluate_every={evaluate_every}: must be at least 1")
    measured: list[tuple[float, float]] = []  # validation and test loss of each call, in order

    def attach(session: Session) -> FastForward:
        def both(model: Any) -> Any:
            loss = session.validation()
            measured.append((float(loss), session.test_loss()))
            return loss

        watched = ValidationLoss(session.model, both)
        return FastForward(session.model, session.optimizer, watched, session.config.fast_forward)

    with open_session(config, attach=attach) as session:
        forward = _run(session, evaluate_every)
        calls = iter(measured)
        forward["stages"] = [
            {
                "optimizer_step": stage.optimizer_step,
                "tau": stage.tau,
                "losses": [[tau, loss] for tau, loss in stage.losses],
                "test_losses": [[tau, _test_loss(calls, loss)] for tau, loss in stage.losses],
            }
            for stage in session.ff.stages
        ]
    with open_session(replace(config, fast_forward=None)) as session:
        plain = _run(session, evaluate_every)
    final = plain["steps"][-1]["test_loss"]
    tested = ((s["optimizer_step"], s["test_loss"]) for s in forward["steps"] if s["test_loss"] is not None)
    return {
        "config": config.to_dict(),
        "fast_forward": forward,
        "optimizer": plain,
        "reached": next((step for step, loss in tested if loss <= final), None),
    }


def _test_loss(calls: Iterator[tuple[float, float]], validation_loss: float) -> float:
    """The test loss measured with this validation loss; calls that only counted FLOPs are skipped."""
    for validation, test in calls:
        if validation == validation_loss or (math.isnan(validation) and math.isnan(validation_loss)):
            return test
    raise RuntimeError(f"no test loss was measured with the validation loss {validation_loss}")


def _run(session: Session, evaluate_every: int) -> dict[str, Any]:
    """Train all steps; the test loss also after each step that a stage followed."""
    start, steps = session.test_loss(), []
    for step in range(session.steps):
        stages = len(session.ff.stages) if session.ff is not None else 0
        train_loss = session.step(step)
        staged = session.ff is not None and len(session.ff.stages) > stages
        due = staged or (step + 1) % evaluate_every == 0 or step + 1 == session.steps
        test_loss = session.test_loss() if due else None
        steps.append({"optimizer_step": step + 1, "train_loss": train_loss, "test_loss": test_loss})
    return {"start": start, "steps": steps}


def along_the_path(run: dict[str, Any]) -> tuple[Points, list[Points]]:
    """The test loss along the path: a point per optimizer step, and per stage its points up to τ*.

    Of a stage the τ are those at which the validation loss fell; whether the test loss fell too is seen.
    """
    stage_of = {stage["optimizer_step"]: stage for stage in run["stages"]}
    points, stages, forwarded = [(0.0, run["start"])], [], 0
    for step in run["steps"]:
        x = step["optimizer_step"] + forwarded
        stage = stage_of.get(step["optimizer_step"])
        if stage is None or not stage["losses"]:
            if step["test_loss"] is not None:
                points.append((x, step["test_loss"]))
            continue
        tests = dict(map(tuple, stage["test_losses"]))
        points.append((x, tests[0]))  # of the optimizer step alone
        stages.append([(x + tau, tests[tau]) for tau, _ in accepted(stage)])
        forwarded += stage["tau"]
    return points, stages


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """Left along the path: training and validation loss, then test loss; right both runs over steps."""
    figure.set_size_inches(11.5, 6.4)
    panels = figure.subplot_mosaic([["walk", "both"], ["path", "both"]], width_ratios=(3, 2))
    forward, plain = data["fast_forward"], data["optimizer"]
    style = STYLES[data["config"]["fast_forward"]["search"]]
    draw_walk(panels["walk"], style, forward["steps"], forward["stages"])
    panels["walk"].set_title("training and validation loss", loc="left")

    axes = panels["path"]
    clean_axes(axes)
    points, stages = along_the_path(forward)
    axes.plot(*zip(*points, strict=True), **SGD, zorder=3, label="after an optimizer step")
    for number, stage in enumerate(stages):
        label = "after a Fast Forward step" if number == 0 else None
        size = 2.0 if len(stage) > 30 else 4.0
        axes.plot(*zip(*stage, strict=True), **_line(style), markersize=size, linewidth=1.2, label=label)
    axes.sharex(panels["walk"])
    axes.set_xlim(left=0)
    axes.set_xlabel(PATH)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("test loss", loc="left")
    axes.legend(loc="upper right", fontsize=9, **LEGEND)

    axes = panels["both"]
    clean_axes(axes)
    for run, look, label in ((plain, STYLES["adam"], "optimizer alone"), (forward, style, "Fast Forward")):
        tested = [(s["optimizer_step"], s["test_loss"]) for s in run["steps"] if s["test_loss"] is not None]
        tested = [(0, run["start"]), *tested]
        axes.plot(*zip(*tested, strict=True), **_line(look), markersize=3, linewidth=1.4, label=label)
    final = plain["steps"][-1]["test_loss"]
    axes.axhline(final, color=TEXT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")
    axes.set_title("test loss, the same learning rate", loc="left")
    axes.legend(loc="upper right", fontsize=9, **LEGEND)


def _line(style: dict[str, Any]) -> dict[str, Any]:
    return {"color": style["color"], "marker": style["marker"], "linestyle": "-"}
