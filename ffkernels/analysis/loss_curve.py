"""The loss during training, optimizer steps and Fast Forward steps told apart (the paper's Figs. 4 and 9).

On a run's path an optimizer step is 1 long and a stage τ*. Beside it runs the plain optimizer from the same
start, with the same data order and learning rate.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ffkernels.analysis.show import Data, Table
from ffkernels.engine.fast_forward import FastForward
from ffkernels.reporting import plots
from ffkernels.reporting.plots import STYLES, Figure, Points, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.rules import check, whole
from ffkernels.training.session import Session, open_session
from ffkernels.validation.loss import ValidationLoss


def loss_curve(config: TrainConfig, *, evaluate_every: int = 1) -> Data:
    """Losses of a run with Fast Forward and of the plain optimizer's (the paper's Figs. 4 and 9).

    Args:
        config: the run, with Fast Forward.
        evaluate_every: optimizer steps between test losses; besides, one is taken at every τ of a stage, and
            before the first and after the last step.

    Returns:
        ``fast_forward``: ``start`` (test loss before the first step), ``steps``, each with
        ``optimizer_step``, ``train_loss`` (of its batch, before the update) and ``test_loss`` (after step and
        stage; or None), and ``stages``, each with ``optimizer_step``, ``tau``, ``losses`` and
        ``test_losses``, both as ``[τ, loss]`` in the order of the search; ``optimizer``: ``start`` and
        ``steps`` of the plain run; ``reached``: the first measured optimizer step at which Fast Forward has
        the plain run's final test loss, or None; ``config``. Losses are nats per token.

    Raises:
        ValueError: when ``config`` has no Fast Forward or ``evaluate_every`` is below 1.
    """
    if config.fast_forward is None:
        raise ValueError("config.fast_forward is None: give a FastForwardConfig")
    check("evaluate_every", evaluate_every, whole(1))
    tests: dict[float, float] = {}  # by the validation loss of the same weights

    def attach(session: Session) -> FastForward:
        def both(model: Any) -> Any:
            loss = session.validation()
            tests[float(loss)] = session.test_loss()
            return loss

        watched = ValidationLoss(session.model, both)
        return FastForward(session.model, session.optimizer, watched, config.fast_forward)

    with open_session(config, attach=attach) as session:
        forward = _run(session, evaluate_every)
        forward["stages"] = [
            {
                "optimizer_step": stage.optimizer_step,
                "tau": stage.tau,
                "losses": [[tau, loss] for tau, loss in stage.losses],
                "test_losses": [[tau, tests.get(loss, math.nan)] for tau, loss in stage.losses],
            }
            for stage in session.ff.stages
        ]
    with open_session(replace(config, fast_forward=None)) as session:
        plain = _run(session, evaluate_every)
    final = plain["steps"][-1]["test_loss"]
    return {
        "config": config.to_dict(),
        "fast_forward": forward,
        "optimizer": plain,
        "reached": next((step for step, loss in _tested(forward)[1:] if loss <= final), None),
    }


def _run(session: Session, evaluate_every: int) -> Data:
    """Train all steps; the test loss also after each step that a stage followed."""
    start, steps = session.test_loss(), []
    stages = session.ff.stages if session.ff is not None else []
    for step in range(session.steps):
        before = len(stages)
        train_loss = session.step(step)
        due = len(stages) > before or (step + 1) % evaluate_every == 0 or step + 1 == session.steps
        test_loss = session.test_loss() if due else None
        steps.append({"optimizer_step": step + 1, "train_loss": train_loss, "test_loss": test_loss})
    return {"start": start, "steps": steps}


def _tested(run: Data) -> Points:
    """(optimizer step, test loss) wherever it was measured, the start first."""
    tests = [(step["optimizer_step"], step["test_loss"]) for step in run["steps"]]
    return [(0, run["start"]), *((step, loss) for step, loss in tests if loss is not None)]


def along_the_path(run: Data) -> tuple[Points, list[Points]]:
    """The test loss along the path: a point per optimizer step, and per stage its points up to τ*.

    Of a stage the τ are those at which the validation loss fell; whether the test loss fell too is seen.
    """
    points, stages = [(0.0, run["start"])], []
    for x, step, stage in plots.along(run["steps"], run["stages"]):
        tests = dict(stage["test_losses"]) if stage else {0: step["test_loss"]}
        if tests[0] is not None:
            points.append((x, tests[0]))  # of the optimizer step alone
        if stage:
            stages.append([(x + tau, tests[tau]) for tau, _ in plots.accepted(stage)])
    return points, stages


def table(data: Data) -> Table:
    rows = []
    for stage in _searched(data):
        tau = stage["tau"]
        losses = [dict(stage[of])[at] for of in ("losses", "test_losses") for at in (0, tau)]
        rows.append([stage["optimizer_step"], tau, *losses])
    return ["step", "τ*", "validation τ=0", "at τ*", "test τ=0", "at τ*"], rows


def what_was_seen(data: Data) -> list[str]:
    walked = [stage for stage in _searched(data) if stage["tau"] > 0]
    tests = [dict(stage["test_losses"]) for stage in walked]
    fell = sum(test[stage["tau"]] < test[0] for stage, test in zip(walked, tests, strict=True))
    (steps, alone), (_, forwarded) = (_tested(data[run])[-1] for run in ("optimizer", "fast_forward"))
    reached = data["reached"]
    there = "never had the former" if reached is None else f"had the former after {reached}"
    took = f"In {fell} of the {len(walked)} stages that took steps the test loss fell too."
    return [
        took if walked else "No stage took a step.",
        f"Test loss after {steps} optimizer steps: {alone:.4f} without, {forwarded:.4f} with Fast Forward, "
        f"which {there}.",
    ]


def _searched(data: Data) -> list[Data]:
    return [stage for stage in data["fast_forward"]["stages"] if stage["losses"]]


def draw(figure: Figure, data: Data) -> None:
    """Left along the path: training and validation loss, then test loss; right both runs over steps."""
    figure.set_size_inches(11.5, 6.4)
    panels = figure.subplot_mosaic([["walk", "both"], ["path", "both"]], width_ratios=(3, 2))
    forward, plain = data["fast_forward"], data["optimizer"]
    style = STYLES[data["config"]["fast_forward"]["search"]]
    plots.draw_walk(panels["walk"], style, forward["steps"], forward["stages"])
    panels["walk"].set_title("training and validation loss", loc="left")

    axes = panels["path"]
    clean_axes(axes, plots.PATH, "loss (nats per token)", title="test loss")
    points, stages = along_the_path(forward)
    axes.plot(*zip(*points, strict=True), **plots.SGD, zorder=3, label="after an optimizer step")
    plots.draw_stages(axes, style, stages, "after a Fast Forward step")
    axes.sharex(panels["walk"])

    axes = panels["both"]
    clean_axes(axes, "optimizer steps", title="test loss, the same learning rate")
    for run, look, label in ((plain, STYLES["adam"], "optimizer alone"), (forward, style, "Fast Forward")):
        axes.plot(*zip(*_tested(run), strict=True), **look, markersize=3, linewidth=1.4, label=label)
    axes.axhline(plain["steps"][-1]["test_loss"], **plots.DOTTED)
    for axes in (panels["path"], panels["both"]):
        axes.set_xlim(left=0)
        axes.legend(loc="upper right", fontsize=9, **plots.LEGEND)
