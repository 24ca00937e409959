"""How often should Fast Forward run? Intervals 1 to 10, each until Adam's test loss. The paper's Fig. 14.

Short intervals spend validations on directions that have hardly changed, long ones leave gains lying about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ffkernels.analysis.race import APART, Watch, draw_saved, draw_steps, outcome, race
from ffkernels.training.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "interval"]


def interval(
    config: TrainConfig,
    *,
    intervals: Sequence[int] = tuple(range(1, 11)),
    check_every: int = 1,
    tolerance: float = 1e-4,
    watch: Watch | None = None,
) -> dict[str, Any]:
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
    if not intervals or len(set(intervals)) != len(intervals):
        raise ValueError(f"intervals={tuple(intervals)!r}: must be one or more integers, each once")
    config = config.with_fast_forward()
    stages = config.fast_forward
    contenders = {f"interval-{k}": dataclasses.replace(stages, interval=k) for k in intervals}
    adam, results = race(config, contenders, check_every=check_every, tolerance=tolerance, watch=watch)
    return {
        "adam": outcome(adam),
        "target_loss": adam.test_loss + tolerance,
        "check_every": check_every,
        "config": config.to_dict(),
        "runs": [
            {"interval": k, **outcome(result, adam)}
            for k, result in zip(intervals, results.values(), strict=True)
        ],
    }


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """FLOPs saved and optimizer steps over the interval."""
    figure.set_size_inches(9.0, 3.8)
    saved, steps = figure.subplots(1, 2, gridspec_kw=APART)
    intervals = [run["interval"] for run in data["runs"]]
    draw_saved(saved, intervals, data["runs"])
    draw_steps(steps, intervals, [data["adam"]["optimizer_steps"]] * len(intervals), data["runs"])
    for axes in (saved, steps):
        axes.set_xticks(intervals)
        axes.set_xlabel("interval: optimizer steps from stage to stage")
