"""The shape of a loss over τ = 0, 1, 2, …: is it convex, has it one minimum, where would a search stop?

    first differences    f(τ + 1) − f(τ)                    their signs say falling or rising
    second differences   f(τ − 1) − 2·f(τ) + f(τ + 1)       above 0 where the curve is convex

Everything is computed in float64 from the losses as given; a loss that is not finite counts as +inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ffkernels.search.search import make_search

__all__ = ["convex_share", "replay", "shape", "turning_points"]


def shape(losses: Sequence[float]) -> dict[str, Any]:
    """What can be said about ``losses`` at τ = 0, 1, …, of which there must be three or more.

    Returns:
        ``argmin``: the first τ with the lowest loss; ``decrease``: f(0) minus that loss;
        ``convex_share``: the fraction of second differences above 0;
        ``convex_until``: the largest τ up to which all of them are (0 when the first is not);
        ``turning_points``: how often the curve turns from falling to rising or back;
        ``unimodal``: whether it never falls again once it has risen;
        ``linear``, ``parabolic``: where that search would stop with ``max_tau`` at the end of the curve, see
        ``replay``.

    Raises:
        ValueError: for fewer than three losses, or when the one at τ = 0 is not finite.
    """
    losses = [loss if math.isfinite(loss) else math.inf for loss in map(float, losses)]
    if len(losses) < 3:
        raise ValueError(f"{len(losses)} losses: the shape of a curve needs at least 3")
    if losses[0] == math.inf:
        raise ValueError("the loss at tau 0 is not finite: the model had diverged before the sweep")
    seconds = _second_differences(losses)
    lowest = min(losses)
    signs = _signs(losses)
    return {
        "argmin": losses.index(lowest),
        "decrease": losses[0] - lowest,
        "convex_share": convex_share(losses),
        "convex_until": next((i for i, d in enumerate(seconds) if not d > 0), len(seconds)),
        "turning_points": turning_points(losses),
        "unimodal": signs == sorted(signs),
        "linear": replay("linear", losses),
        "parabolic": replay("parabolic", losses),
    }


def convex_share(losses: Sequence[float]) -> float:
    """The fraction of second differences above 0; those with a loss that is not finite do not count."""
    seconds = [d for d in _second_differences(losses) if math.isfinite(d)]
    return sum(d > 0 for d in seconds) / len(seconds) if seconds else math.nan


def turning_points(losses: Sequence[float]) -> int:
    """How often the curve turns from falling to rising or back; a flat piece in between is no turn itself."""
    return sum(a != b for a, b in pairwise(_signs(losses)))


def replay(search: str, losses: Sequence[float]) -> dict[str, Any]:
    """Run a search of the library over known losses, which need not be trained for again.

    Returns:
        ``tau``: where it stops; ``evaluations``: losses it asked for; ``stopped_because``; ``found``: the
        share of the curve's whole decrease that it gets, NaN where the curve never falls.
    """
    machine = make_search(search, max_tau=len(losses) - 1)
    while (tau := machine.propose()) is not None:
        machine.observe(tau, losses[tau])
    whole = losses[0] - min(losses)
    return {
        "tau": machine.best_tau,
        "evaluations": len(machine.losses),
        "stopped_because": machine.stopped_because,
        "found": (losses[0] - machine.best_loss) / whole if whole > 0 else math.nan,
    }


def _second_differences(losses: Sequence[float]) -> list[float]:
    return [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]


def _signs(losses: Sequence[float]) -> list[int]:
    """−1 for every step down, +1 for every step up; steps that change nothing are left out."""
    return [1 if b > a else -1 for a, b in pairwise(losses) if b != a]
