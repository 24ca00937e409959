"""Adam sets a test loss, Fast Forward runs to it, from the same start on the same batches; no files stay."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ffkernels.analysis.show import Data, Watch
from ffkernels.engine.config import FastForwardConfig
from ffkernels.reporting.numbers import percent
from ffkernels.reporting.plots import STYLES, Axes, clean_axes
from ffkernels.training.compare import Comparison, uninterrupted
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import Session, stages_of
from ffkernels.training.trainer import RunResult

# How far above Adam's test loss, in nats, counts as reached.
TOLERANCE = 1e-4
# FLOPs are counted in two conventions (see reporting.flops), drawn always in these styles.
CONVENTIONS = {
    "measured": {"color": STYLES["parabolic"]["color"], "marker": "o", "linestyle": "-"},
    "paper": {"color": STYLES["linear"]["color"], "marker": "s", "linestyle": "--"},
}
# Room between two panels.
APART = {"wspace": 0.08}
# The columns that ``cells`` fills.
COLUMNS = ["optimizer steps", "stages", "Σ τ*", "saved, paper", "saved, measured"]


def race(
    config: TrainConfig,
    contenders: Mapping[str, FastForwardConfig],
    *,
    check_every: int = 3,
    watch: Watch | None = None,
    on_session: Callable[[Session], Any] | None = None,
    on_end: Callable[[str], Any] = lambda name: None,
) -> dict[str, Data]:
    """Adam for all of ``config``'s steps, then each contender until its test loss is Adam's + ``TOLERANCE``.

    Args:
        config: the Adam run; its ``name``, ``out``, ``fast_forward`` and ``target_loss`` are set here.
        contenders: Fast Forward's settings by a name for the run.
        check_every: optimizer steps between test losses of the contenders; each stage is followed by one.
        on_session, on_end: get each run's session before its first step, and its name when it has ended.

    Returns:
        The ``outcome`` of "adam", and by their names those of the contenders.

    Raises:
        ValueError: when Adam diverged.
    """
    with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder:
        # Of Adam's test losses the last alone counts.
        base = replace(config, out=folder, evaluate_every=0)
        comparison = Comparison(base, check_every=check_every, tolerance=TOLERANCE)
        adam = run(comparison.adam(config.seed), watch, on_session)
        if not math.isfinite(adam.test_loss):
            raise ValueError(
                f"lr={config.lr!r}: Adam diverged after {adam.optimizer_steps} steps, so there is no test "
                "loss to reach; take a smaller learning rate"
            )
        on_end("adam")
        outcomes = {"adam": outcome(adam)}
        for name, fast_forward in contenders.items():
            contender = comparison.until(adam, config.seed, name, fast_forward=fast_forward)
            outcomes[name] = outcome(run(contender, watch, on_session), adam)
            on_end(name)
    return outcomes


def run(
    config: TrainConfig,
    watch: Watch | None = None,
    on_session: Callable[[Session], Any] | None = None,
    stop_when: Callable[[Data], bool] = lambda event: False,
) -> RunResult:
    """One run that keeps nothing but what it returns.

    Args:
        on_session: gets the session before its first step.
        stop_when: sees every log event; the run ends after the step for which it is true.

    Raises:
        compare.Interrupted: after Ctrl-C.
    """
    watch = watch or Watch()
    watch.run(config)

    def attach(session: Session) -> Any:
        on_session(session)
        return stages_of(session)

    def on_event(event: Data) -> bool:
        watch.event(event)
        return stop_when(event)

    return uninterrupted(config, on_event, attach if on_session else None)


def against_adam(
    config: TrainConfig, on_session: Callable[[Session], Any] = lambda session: None, **how: Any
) -> Data:
    """A ``race`` with ``config``'s stages: the ``trainable`` weights, and the outcomes "adam" and "ff"."""
    weights = []

    def look(session: Session) -> None:
        weights.append(session.meter.trainable_numel)
        on_session(session)

    outcomes = race(config, {"ff": config.fast_forward}, on_session=look, **how)
    return {"trainable": weights[0], **outcomes}


def outcome(result: RunResult, adam: RunResult | None = None) -> Data:
    """A run as plain data: cost, stages and, against ``adam``, what it saved.

    ``saved`` are fractions of Adam's FLOPs in both conventions, None where the target was not reached; a
    negative one is a loss. Time is left to ``ffkernels compare``, which warms up before it looks at a clock.
    """
    kept = ("optimizer_step", "tau", "losses", "stopped_because")
    data = {
        "optimizer_steps": result.optimizer_steps,
        "test_loss": result.test_loss,
        "flops": dict(result.flops),
        "validation_forwards": result.validation_forwards,
        "stages": [{key: stage[key] for key in kept} for stage in (s.to_dict() for s in result.stages)],
    }
    if adam is not None:
        data["reached"] = bool(result.reached_target)
        saved = {name: 1.0 - result.flops[name] / adam.flops[name] for name in adam.flops}
        data["saved"] = saved if data["reached"] else None
    return data


def cells(run: Data) -> list[Any]:
    """An ``outcome`` in the ``COLUMNS`` of a table."""
    saved, taus = run["saved"], [stage["tau"] for stage in run["stages"]]
    shares = [percent(saved["paper"]), percent(saved["measured"])] if saved else ["not reached"] * 2
    return [run["optimizer_steps"], len(taus), sum(taus), *shares]


def draw_taus(axes: Axes, stages: Sequence[Data], **style: Any) -> None:
    """A panel, or one more line of it: τ* of each stage over the optimizer steps."""
    label = "optimizer step at which the stage ran"
    clean_axes(axes, label, "τ*: Fast Forward steps of the stage", integer="xy")
    steps, taus = ([stage[key] for stage in stages] for key in ("optimizer_step", "tau"))
    axes.plot(steps, taus, **{**style, "linewidth": 1.4})
