"""What does Fast Forward save at each rank of the adapter, all else equal? The paper's Fig. 7.

Every rank has its own Adam run, at the same learning rate and number of steps, and its own target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ffkernels.analysis.race import APART, Watch, draw_saved, draw_steps, outcome, race
from ffkernels.training.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCALINGS", "draw", "rank", "rank_config"]

SCALINGS = ("proportional", "fixed")


def rank(
    config: TrainConfig,
    *,
    ranks: Sequence[int] = (1, 4, 16, 64),
    scaling: str = "proportional",
    check_every: int = 1,
    tolerance: float = 1e-4,
    watch: Watch | None = None,
) -> dict[str, Any]:
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
    if not ranks or len(set(ranks)) != len(ranks):
        raise ValueError(f"ranks={tuple(ranks)!r}: must be one or more integers, each once")
    config = config.with_fast_forward()
    configs = [rank_config(config, r, scaling) for r in ranks]  # all are checked before the first one runs
    runs = []
    for one in configs:
        trainable: list[int] = []
        adam, results = race(
            one,
            {f"rank-{one.rank}": config.fast_forward},
            check_every=check_every,
            tolerance=tolerance,
            watch=watch,
            on_session=lambda session, numbers=trainable: numbers.append(session.meter.trainable_numel),
        )
        (forwarded,) = results.values()
        runs.append(
            {
                "rank": one.rank,
                "alpha": one.alpha,
                "trainable": trainable[0],
                "adam": outcome(adam),
                "ff": outcome(forwarded, adam),
            }
        )
    return {"scaling": scaling, "check_every": check_every, "config": config.to_dict(), "runs": runs}


def rank_config(config: TrainConfig, rank: int, scaling: str) -> TrainConfig:
    """``config`` with another rank, and ``alpha`` as ``scaling`` says.

    Raises:
        ValueError: when ``scaling`` is neither "proportional" nor "fixed".
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r}: must be one of {', '.join(map(repr, SCALINGS))}")
    alpha = config.alpha * rank / config.rank if scaling == "proportional" else config.alpha
    return dataclasses.replace(config, rank=rank, alpha=alpha)


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """FLOPs saved and optimizer steps over the rank."""
    figure.set_size_inches(9.0, 3.8)
    saved, steps = figure.subplots(1, 2, gridspec_kw=APART)
    ranks = [run["rank"] for run in data["runs"]]
    forwarded = [run["ff"] for run in data["runs"]]
    draw_saved(saved, ranks, forwarded)
    draw_steps(steps, ranks, [run["adam"]["optimizer_steps"] for run in data["runs"]], forwarded)
    for axes in (saved, steps):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, labels=map(str, ranks))
        axes.minorticks_off()
        axes.set_xlabel("rank of the adapter")
