"""Train until nothing improves any more, with Adam and with Fast Forward that switches itself off. §5.1.

A run has converged when its best test loss has not fallen by more than ``min_delta`` over the last
``window`` optimizer steps.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace

from ffkernels.analysis.race import APART, TOLERANCE, draw_taus, outcome, run
from ffkernels.analysis.show import Data, Table, Watch, than_adam
from ffkernels.engine.config import PAPERS_PATIENCE
from ffkernels.reporting.numbers import flop_unit
from ffkernels.reporting.plots import LEGEND, STYLES, Figure, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.rules import at_least, check, whole

LABELS = {"adam": "Adam", "ff": "with Fast Forward"}
Test = tuple[int, float, int, int]  # optimizer step, test loss, FLOPs in the paper's convention and measured


def convergence(
    config: TrainConfig, *, window: int = 40, min_delta: float = 0.0, watch: Watch | None = None
) -> Data:
    """Final losses and FLOPs of Adam and of Fast Forward, both trained to convergence (the paper's §5.1).

    Args:
        config: both runs; ``steps`` is where they end at the latest, ``evaluate_every`` how often the test
            loss is looked at. The ``patience`` of its ``fast_forward`` switches Fast Forward off; where it
            is "auto", the paper's 3 does.
        window: optimizer steps without an improvement after which a run has converged; at least
            ``evaluate_every``.
        min_delta: what counts as an improvement of the test loss, in nats.

    Returns:
        ``runs``, of "adam" and "ff": ``converged``, ``best_test_loss`` (of every ``evaluate_every`` steps),
        ``tests`` (each: step, loss, FLOPs in the paper's convention, FLOPs measured; of "ff" after stages,
        too) and what ``race.outcome`` gives; ``switched_off_at``, an optimizer step or None;
        ``to_adams_best``, None or the ``optimizer_step`` (of every ``evaluate_every``) at which Fast Forward
        first had Adam's lowest test loss and what it had ``saved`` of the FLOPs that Adam spent until there.

    Raises:
        ValueError: naming the setting and what is allowed; also when a run diverged.
    """
    check("window", window, whole(1))
    check("min_delta", min_delta, at_least(0))
    every = config.evaluate_every
    if not 1 <= every <= window:
        raise ValueError(f"evaluate_every={every!r}: must be from 1 to the window of {window} steps")
    config = config.with_fast_forward()
    if config.fast_forward.patience == "auto":
        config = replace(config, fast_forward=replace(config.fast_forward, patience=PAPERS_PATIENCE))
    runs, looks = [], {}
    with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder:
        for name, stages in (("adam", None), ("ff", config.fast_forward)):
            one = replace(config, name=name, out=folder, fast_forward=stages, target_loss=None)
            tests: list[Test] = []

            def flat(event: Data, tests: list[Test] = tests) -> bool:
                if event["event"] != "test":
                    return False
                flops = event["flops"]
                tests.append((event["optimizer_step"], event["loss"], flops["paper"], flops["measured"]))
                return has_converged(tests, window, min_delta, every)

            result = run(one, watch, stop_when=flat)
            if not math.isfinite(result.test_loss):
                raise ValueError(
                    f"lr={config.lr!r}: {name} diverged after {result.optimizer_steps} steps; take a smaller "
                    "learning rate"
                )
            looks[name] = _regular(tests, every)
            runs.append(
                {
                    "name": name,
                    "converged": has_converged(tests, window, min_delta, every),
                    "best_test_loss": min(loss for _, loss, *_ in looks[name]),
                    **outcome(result),
                    "tests": [list(test) for test in tests],
                }
            )
    return {
        "window": window,
        "min_delta": min_delta,
        "config": config.to_dict(),
        "runs": runs,
        "switched_off_at": switched_off_at(runs[1]["stages"], config.fast_forward.patience),
        "to_adams_best": _to_adams_best(looks["adam"], looks["ff"]),
    }


def _regular(tests: list[Test], every: int) -> list[Test]:
    """The tests at which any run is looked at. Of more looks, after stages, the lowest would be lower."""
    return [test for test in tests if test[0] % every == 0]


def has_converged(tests: list[Test], window: int, min_delta: float, every: int = 1) -> bool:
    """Whether the lowest loss of ``tests`` fell by at most ``min_delta`` in ``window`` steps.

    It is asked, and looked at, every ``every`` steps alone.
    """
    now, losses = tests[-1][0], {step: loss for step, loss, *_ in _regular(tests, every)}
    before = [loss for step, loss in losses.items() if step <= now - window]
    return now in losses and bool(before) and min(before) - min(losses.values()) <= min_delta


def switched_off_at(stages: list[Data], patience: int | None) -> int | None:
    """The optimizer step after whose stage Fast Forward was switched off; None when it never was."""
    failures = 0
    for stage in stages:
        if len(stage["losses"]) > 1 or stage["tau"]:  # a stage that could not search says nothing
            failures = 0 if stage["tau"] else failures + 1
        if patience is not None and failures >= patience:
            return stage["optimizer_step"]
    return None


def _to_adams_best(adam: list[Test], ff: list[Test]) -> Data | None:
    target = min(loss for _, loss, *_ in adam) + TOLERANCE
    whole = next(test for test in adam if test[1] <= target)
    reached = next((test for test in ff if test[1] <= target), None)
    if reached is None or not whole[3]:
        return None
    saved = {"paper": 1.0 - reached[2] / whole[2], "measured": 1.0 - reached[3] / whole[3]}
    return {"optimizer_step": reached[0], "saved": saved}


def table(data: Data) -> Table:
    header = ["run", "converged", "optimizer steps", "test loss", "lowest", "FLOPs (paper)", "(measured)"]
    rows = []
    for one in data["runs"]:
        flops = [float(one["flops"][convention]) for convention in ("paper", "measured")]
        losses = [one["test_loss"], one["best_test_loss"]]
        converged = "yes" if one["converged"] else "no"
        rows.append([LABELS[one["name"]], converged, one["optimizer_steps"], *losses, *flops])
    return header, rows


def what_was_seen(data: Data) -> list[str]:
    adam, ff = data["runs"]
    off, reached = data["switched_off_at"], data["to_adams_best"]
    switched = f"Fast Forward stayed on through all {len(ff['stages'])} stages"
    if off is not None:
        patience = data["config"]["fast_forward"]["patience"]
        switched = f"Fast Forward switched itself off after optimizer step {off}, having found no step "
        switched += f"{patience} times in a row"
    higher = ff["best_test_loss"] - adam["best_test_loss"]
    ends = f"its lowest test loss is {abs(higher):.4f} nats {'above' if higher > 0 else 'below'} Adam's"
    best = "It did not reach Adam's lowest test loss."
    if reached is not None:
        at, cost = reached["optimizer_step"], than_adam(reached["saved"]["measured"])
        best = f"It reached Adam's lowest test loss at optimizer step {at}, for {cost}."
    falling = [name for name, run in (("Adam", adam), ("Fast Forward", ff)) if not run["converged"]]
    rest = [f"{' and '.join(falling)} had not converged at the last step: raise --steps."] if falling else []
    return [f"{switched}; {ends}.", best, *rest]


def draw(figure: Figure, data: Data) -> None:
    """Test losses over measured FLOPs, and τ* of the stages up to the switch-off."""
    figure.set_size_inches(9.6, 3.8)
    losses, taus = figure.subplots(1, 2, gridspec_kw=APART)
    size, unit = flop_unit(max(run["flops"]["measured"] for run in data["runs"]))
    style, off = STYLES["parabolic"], data["switched_off_at"]
    clean_axes(losses, f"training compute ({unit}, measured)", "test loss (nats per token)")
    for one, look in zip(data["runs"], (STYLES["adam"], style), strict=True):
        xs, ys = zip(*((test[3] / size, test[1]) for test in one["tests"]), strict=True)
        look = {"color": look["color"], "linestyle": look["linestyle"], "label": LABELS[one["name"]]}
        losses.plot(xs, ys, **look, linewidth=1.6)
    ff = data["runs"][1]
    at = next((test for test in ff["tests"] if test[0] == off), None)
    if at is not None:
        losses.plot(at[3] / size, at[1], "X", color=style["color"], markersize=9, label="switched off")
    losses.legend(loc="upper right", **LEGEND)
    draw_taus(taus, ff["stages"], **style)
    if off is not None:
        taus.axvline(off, color=STYLES["adam"]["color"], linewidth=1, linestyle=":")
        place = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "top", "rotation": 90}
        taus.annotate(f"switched off after step {off}", (off, 1), **place)
    taus.set_xlim(left=0)
    taus.set_ylim(bottom=-0.02 * max((stage["tau"] for stage in ff["stages"]), default=1))
