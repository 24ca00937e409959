"""Train until nothing improves any more, with Adam and with Fast Forward that switches itself off. §5.1.

A run has converged when its best test loss has not fallen by more than ``min_delta`` over the last
``window`` optimizer steps. After ``patience`` stages in a row that found no step, Fast Forward is switched
off for good and the rest is plain Adam.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from typing import TYPE_CHECKING, Any

from ffkernels.analysis.race import APART, Watch, outcome, run
from ffkernels.analysis.show import than_adam
from ffkernels.engine.config import PAPERS_PATIENCE
from ffkernels.reporting.plots import LEGEND, STYLES, clean_axes, flop_unit
from ffkernels.training.config import TrainConfig
from ffkernels.training.trainer import RunResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["convergence", "draw", "has_converged", "switched_off_at", "what_was_seen"]

Test = tuple[int, float, int, int]  # optimizer step, test loss, FLOPs in the paper's convention and measured


def convergence(
    config: TrainConfig,
    *,
    window: int = 40,
    min_delta: float = 0.0,
    tolerance: float = 1e-4,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Final losses and FLOPs of Adam and of Fast Forward, both trained to convergence (the paper's §5.1).

    Args:
        config: both runs; ``steps`` is where they end at the latest, ``evaluate_every`` how often the test
            loss is looked at. The ``patience`` of its ``fast_forward`` switches Fast Forward off; where it
            is "auto", the paper's 3 does.
        window: optimizer steps without an improvement after which a run has converged; at least
            ``evaluate_every``.
        min_delta: what counts as an improvement of the test loss, in nats.
        tolerance: how far above Adam's lowest test loss counts as reached.

    Returns:
        ``runs``, of "adam" and "ff": ``converged``, ``best_test_loss`` (of every ``evaluate_every`` steps),
        ``tests`` (each: step, loss, FLOPs in the paper's convention, FLOPs measured; of "ff" after stages,
        too) and what ``race.outcome`` gives; ``switched_off_at``, an optimizer step or None;
        ``to_adams_best``, None or the ``optimizer_step`` (of every ``evaluate_every``) at which Fast Forward
        first had Adam's lowest test loss and what it had ``saved`` of the FLOPs that Adam spent until there.

    Raises:
        ValueError: naming the setting and what is allowed; also when Adam diverged.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window={window!r}: must be an integer of at least 1")
    if not 1 <= config.evaluate_every <= window:
        raise ValueError(
            f"evaluate_every={config.evaluate_every!r}: must be from 1 to the window of {window} steps"
        )
    if not min_delta >= 0:
        raise ValueError(f"min_delta={min_delta!r}: must be a number of at least 0")
    config = config.with_fast_forward()
    if config.fast_forward.patience == "auto":
        stages = dataclasses.replace(config.fast_forward, patience=PAPERS_PATIENCE)
        config = dataclasses.replace(config, fast_forward=stages)
    runs, tests_of = [], {}
    with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder:
        for name, stages in (("adam", None), ("ff", config.fast_forward)):
            one = dataclasses.replace(config, name=name, out=folder, fast_forward=stages, target_loss=None)
            until = _UntilFlat(config.evaluate_every, window, min_delta)
            result = run(one, watch, stop_when=until)
            runs.append(_row(name, result, until))
            tests_of[name] = until.regular
            if not math.isfinite(result.test_loss):
                raise ValueError(
                    f"lr={config.lr!r}: {name} diverged after {result.optimizer_steps} steps; take a smaller "
                    "learning rate"
                )
    return {
        "window": window,
        "min_delta": min_delta,
        "config": config.to_dict(),
        "runs": runs,
        "switched_off_at": switched_off_at(runs[1]["stages"], config.fast_forward.patience),
        "to_adams_best": _to_adams_best(tests_of["adam"], tests_of["ff"], tolerance),
    }


class _UntilFlat:
    """Collects a run's test losses; true when the run has converged."""

    def __init__(self, every: int, window: int, min_delta: float) -> None:
        self.every, self.window, self.min_delta = every, window, min_delta
        self.tests: list[Test] = []
        self.converged = False

    def __call__(self, event: dict[str, Any]) -> bool:
        if event["event"] != "test":
            return False
        step, flops = event["optimizer_step"], event["flops"]
        self.tests.append((step, event["loss"], flops["paper"], flops["measured"]))
        seen = [(s, loss) for s, loss, *_ in self.regular]
        self.converged = step % self.every == 0 and has_converged(seen, self.window, self.min_delta)
        return self.converged

    @property
    def regular(self) -> list[Test]:
        """The tests at which any run is looked at. Of more looks, after stages, the lowest would be lower."""
        return [test for test in self.tests if test[0] % self.every == 0]


def has_converged(tests: list[tuple[int, float]], window: int, min_delta: float) -> bool:
    """Whether the lowest loss of ``tests`` (step, loss) fell by at most ``min_delta`` in ``window`` steps."""
    now = tests[-1][0]
    before = [loss for step, loss in tests if step <= now - window]
    return bool(before) and min(before) - min(loss for _, loss in tests) <= min_delta


def switched_off_at(stages: list[dict[str, Any]], patience: int | None) -> int | None:
    """The optimizer step after whose stage Fast Forward was switched off; None when it never was."""
    failures = 0
    for stage in stages:
        if len(stage["losses"]) > 1 or stage["tau"]:  # a stage that could not search says nothing
            failures = 0 if stage["tau"] else failures + 1
        if patience is not None and failures >= patience:
            return stage["optimizer_step"]
    return None


def _row(name: str, result: RunResult, until: _UntilFlat) -> dict[str, Any]:
    return {
        "name": name,
        "converged": until.converged,
        "best_test_loss": min(loss for _, loss, *_ in until.regular),
        **outcome(result),
        "tests": [list(test) for test in until.tests],
    }


def _to_adams_best(adam: list[Test], ff: list[Test], tolerance: float) -> dict[str, Any] | None:
    target = min(loss for _, loss, *_ in adam) + tolerance
    whole = next(test for test in adam if test[1] <= target)
    reached = next((test for test in ff if test[1] <= target), None)
    if reached is None or not whole[3]:
        return None
    return {
        "optimizer_step": reached[0],
        "saved": {"paper": 1.0 - reached[2] / whole[2], "measured": 1.0 - reached[3] / whole[3]},
    }


def what_was_seen(data: dict[str, Any]) -> list[str]:
    """The data in sentences."""
    adam, ff = data["runs"]
    off, reached = data["switched_off_at"], data["to_adams_best"]
    patience = data["config"]["fast_forward"]["patience"]
    switched = (
        f"Fast Forward switched itself off after optimizer step {off}, having found no step {patience} times "
        "in a row"
        if off is not None
        else f"Fast Forward stayed on through all {len(ff['stages'])} stages"
    )
    higher = ff["best_test_loss"] - adam["best_test_loss"]
    ends = f"its lowest test loss is {abs(higher):.4f} nats {'above' if higher > 0 else 'below'} Adam's"
    seen = [f"{switched}; {ends}."]
    if reached is None:
        seen.append("It did not reach Adam's lowest test loss.")
    else:
        cost = than_adam(reached["saved"]["measured"])
        seen.append(
            f"It reached Adam's lowest test loss at optimizer step {reached['optimizer_step']}, for {cost}."
        )
    flat = [name for name, run in (("Adam", adam), ("Fast Forward", ff)) if not run["converged"]]
    if flat:
        seen.append(f"{' and '.join(flat)} had not converged at the last step: raise --steps.")
    return seen


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """Test losses over measured FLOPs, and τ* of the stages up to the switch-off."""
    figure.set_size_inches(9.6, 3.8)
    losses, taus = figure.subplots(1, 2, gridspec_kw=APART)
    runs = {run["name"]: run for run in data["runs"]}
    size, unit = flop_unit(max(run["flops"]["measured"] for run in runs.values()))
    off = data["switched_off_at"]
    labels = {"adam": "Adam", "ff": "with Fast Forward"}
    styles = {"adam": STYLES["adam"], "ff": STYLES["parabolic"]}
    clean_axes(losses)
    for name, one in runs.items():
        xs, ys = zip(*((test[3] / size, test[1]) for test in one["tests"]), strict=True)
        color, line = styles[name]["color"], styles[name]["linestyle"]
        losses.plot(xs, ys, color=color, linestyle=line, linewidth=1.6, label=labels[name])
    at = next((test for test in runs["ff"]["tests"] if test[0] == off), None)
    if at is not None:
        where = (at[3] / size, at[1])
        losses.plot(*where, "X", color=styles["ff"]["color"], markersize=9, label="switched off")
    losses.set_xlabel(f"training compute ({unit}, measured)")
    losses.set_ylabel("test loss (nats per token)")
    losses.legend(loc="upper right", **LEGEND)
    clean_axes(taus)
    stages = runs["ff"]["stages"]
    taus.plot(
        [stage["optimizer_step"] for stage in stages],
        [stage["tau"] for stage in stages],
        color=styles["ff"]["color"],
        marker=styles["ff"]["marker"],
        linewidth=1.4,
    )
    if off is not None:
        taus.axvline(off, color=STYLES["adam"]["color"], linewidth=1, linestyle=":")
        failures = f"switched off after step {off}"
        taus.annotate(
            failures, (off, 1), xycoords=("data", "axes fraction"), ha="right", va="top", rotation=90
        )
    taus.set_xlim(left=0)
    taus.set_ylim(bottom=-0.02 * max([stage["tau"] for stage in stages], default=1))
    taus.yaxis.get_major_locator().set_params(integer=True)
    taus.set_xlabel("optimizer step at which the stage ran")
    taus.set_ylabel("τ*: Fast Forward steps of the stage")
