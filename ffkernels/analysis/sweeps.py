"""What does Fast Forward save at each rank of the adapter (the paper's Fig. 7), at each interval (Fig. 14)?

Every rank has its own Adam run, at the same learning rate and number of steps; the intervals share one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ffkernels.analysis.race import APART, COLUMNS, CONVENTIONS, TOLERANCE, against_adam, cells, race
from ffkernels.analysis.show import Data, Table, Watch, than_adam
from ffkernels.reporting.plots import ABOVE, STYLES, Figure, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.rules import check, one_of

SCALINGS = ("proportional", "fixed")


def interval(
    config: TrainConfig,
    *,
    intervals: Sequence[int] = tuple(range(1, 11)),
    check_every: int = 1,
    watch: Watch | None = None,
) -> Data:
    """FLOPs and optimizer steps to Adam's test loss for each interval (the paper's Fig. 14).

    Args:
        config: the Adam run that sets the test loss; its ``fast_forward`` is how the stages search.
        intervals: optimizer steps from one stage to the next.
        check_every: optimizer steps between test losses; above 1 a run may be charged for up to so many
            steps less one that it did not need.

    Returns:
        ``adam``, the ``target_loss`` it set, and ``runs``, one per interval: ``interval`` and what
        ``race.outcome`` gives.

    Raises:
        ValueError: when an interval is given twice or is not an integer of at least 1, or Adam diverged.
    """
    _each_once(intervals=intervals)
    config = config.with_fast_forward()
    contenders = {f"interval-{k}": replace(config.fast_forward, interval=k) for k in intervals}
    outcomes = race(config, contenders, check_every=check_every, watch=watch)
    adam = outcomes.pop("adam")
    return {
        "adam": adam,
        "target_loss": adam["test_loss"] + TOLERANCE,
        "check_every": check_every,
        "config": config.to_dict(),
        "runs": [{"interval": k, **one} for k, one in zip(intervals, outcomes.values(), strict=True)],
    }


def rank(
    config: TrainConfig,
    *,
    ranks: Sequence[int] = (1, 4, 16, 64),
    scaling: str = "proportional",
    check_every: int = 1,
    watch: Watch | None = None,
) -> Data:
    """FLOPs that Fast Forward saves against Adam of the same rank and learning rate (the paper's Fig. 7).

    Args:
        config: the Adam run, with an adapter; its ``fast_forward`` is when and how the stages search.
        ranks: of the adapter.
        scaling: ``"proportional"`` keeps ``alpha / rank`` of ``config``, so that adapters of all ranks act
            with the same factor; ``"fixed"`` keeps ``alpha``, so that the factor falls as the rank rises.
        check_every: optimizer steps between test losses.

    Returns:
        ``scaling``, and ``runs``, one per rank: ``rank``, ``alpha``, ``trainable`` weights, ``adam`` and
        ``ff`` (see ``race.outcome``).

    Raises:
        ValueError: naming what was given and what is allowed; also when Adam diverged.
    """
    if config.method not in ("lora", "dora"):
        raise ValueError(f"method={config.method!r} has no rank; allowed here are 'lora' and 'dora'")
    _each_once(ranks=ranks)
    config = config.with_fast_forward()
    how = {"check_every": check_every, "watch": watch}
    configs = [rank_config(config, r, scaling) for r in ranks]  # all are checked before the first one runs
    runs = [{"rank": one.rank, "alpha": one.alpha, **against_adam(one, **how)} for one in configs]
    return {"scaling": scaling, "check_every": check_every, "config": config.to_dict(), "runs": runs}


def rank_config(config: TrainConfig, rank: int, scaling: str) -> TrainConfig:
    """``config`` with another rank, and ``alpha`` as ``scaling`` says.

    Raises:
        ValueError: when ``scaling`` is neither "proportional" nor "fixed".
    """
    check("scaling", scaling, one_of(SCALINGS))
    alpha = config.alpha * rank / config.rank if scaling == "proportional" else config.alpha
    return replace(config, rank=rank, alpha=alpha)


def _each_once(**swept: Sequence[int]) -> None:
    for name, values in swept.items():
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name}={tuple(values)!r}: must be one or more integers, each once")


def _runs(data: Data) -> tuple[str, list[int], list[Data]]:
    """What was swept, its values, and Fast Forward's outcomes there."""
    runs, swept = data["runs"], "rank" if "scaling" in data else "interval"
    return swept, [run[swept] for run in runs], [run.get("ff", run) for run in runs]


def table(data: Data) -> Table:
    swept, _, outcomes = _runs(data)
    if swept == "interval":
        rows = [["Adam", data["adam"]["optimizer_steps"], None, None, None, None]]
        return ["interval", *COLUMNS], rows + [[str(run["interval"]), *cells(run)] for run in outcomes]
    rows = [
        [str(run["rank"]), f"{run['alpha']:g}", run["trainable"], run["adam"]["test_loss"], *cells(run["ff"])]
        for run in data["runs"]
    ]
    return ["rank", "alpha", "weights", "Adam's test loss", *COLUMNS], rows


def what_was_seen(data: Data) -> list[str]:
    swept, values, outcomes = _runs(data)
    saved = {x: one["saved"]["measured"] for x, one in zip(values, outcomes, strict=True) if one["saved"]}
    if not saved:
        return ["No run reached Adam's test loss."]
    best, worst = max(saved, key=saved.get), min(saved, key=saved.get)
    words = f"Cheapest at {swept} {best}: {than_adam(saved[best])}"
    if worst != best:
        words += f"; dearest at {swept} {worst}: {than_adam(saved[worst])}"
    missed = ", ".join(str(x) for x in values if x not in saved)
    return [words + ".", *([f"Adam's test loss was not reached at {swept} {missed}."] if missed else [])]


def draw(figure: Figure, data: Data) -> None:
    """FLOPs saved, with a gap where the target was not reached, and optimizer steps; over what was swept."""
    figure.set_size_inches(9.0, 3.8)
    panels = saved, steps = figure.subplots(1, 2, gridspec_kw=APART)
    swept, xs, outcomes = _runs(data)
    clean_axes(saved, y="FLOPs saved against Adam (%)")
    saved.axhline(0, color=STYLES["adam"]["color"], linewidth=1)
    for name, style in CONVENTIONS.items():
        shares = [100 * one["saved"][name] if one["saved"] else math.nan for one in outcomes]
        saved.plot(xs, shares, **style, markersize=5, linewidth=1.6, label=f"{name} FLOPs")
    missed = [x for x, one in zip(xs, outcomes, strict=True) if not one["saved"]]
    if missed:
        saved.plot(missed, [0] * len(missed), "x", color="#B00020", markersize=7, label="target not reached")
    saved.margins(y=0.15)
    clean_axes(steps, y="optimizer steps to Adam's test loss")
    adams = [run.get("adam", data.get("adam"))["optimizer_steps"] for run in data["runs"]]
    steps.plot(xs, adams, color=STYLES["adam"]["color"], linestyle=":", linewidth=1.6, label="Adam")
    taken = [one["optimizer_steps"] for one in outcomes]
    steps.plot(xs, taken, **STYLES["parabolic"], linewidth=1.6, label="with Fast Forward")
    steps.set_ylim(0, 1.12 * max(*adams, *taken))
    for axes in panels:
        axes.legend(**ABOVE)
        axes.set_xlabel("interval: optimizer steps from stage to stage")
        if swept == "rank":
            axes.set_xlabel("rank of the adapter")
            axes.set_xscale("log", base=2)
        axes.set_xticks(xs, labels=map(str, xs))
        axes.minorticks_off()
