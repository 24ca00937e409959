"""Does one quantity rise with another? Spearman's ρ, and how often chance alone would show as much.

ρ = Pearson's correlation of the ranks
p = (1 + #{|ρ| of a shuffled pairing ≥ |ρ|}) / (1 + shuffles)        for pairs independent of each other
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from operator import mul

SHUFFLES = 4999


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value, the smallest 1; equal ones share the mean of theirs."""
    ascending, counts = sorted(values), Counter(values)
    return [bisect_left(ascending, value) + (counts[value] + 1) / 2 for value in values]


def spearman(x: Sequence[float], y: Sequence[float], *, shuffles: int = SHUFFLES) -> dict[str, float | None]:
    """``{"rho", "p", "n"}`` of the pairs (x[i], y[i]); rho and p are None with fewer than three pairs, or
    where all x or all y are equal. ValueError when x and y differ in length.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values of x and {len(y)} of y: one of each makes a pair")
    n = len(x)
    a, b = ([rank - (n + 1) / 2 for rank in ranks(values)] for values in (x, y))
    scale = math.sqrt(_dot(a, a) * _dot(b, b))
    if n < 3 or scale == 0.0:
        return {"rho": None, "p": None, "n": n}
    rho = _dot(a, b) / scale
    generator, shuffled, as_large = random.Random(0), list(b), 0
    for _ in range(shuffles):
        generator.shuffle(shuffled)
        as_large += abs(_dot(a, shuffled) / scale) >= abs(rho) - 1e-12
    return {"rho": rho, "p": (1 + as_large) / (1 + shuffles), "n": n}


def partial_spearman(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float | None:
    """Spearman's ρ of x and y with the ranks of ``given`` held fixed; None where it is not defined.

    (ρ_xy − ρ_xz·ρ_yz) / √((1 − ρ_xz²)(1 − ρ_yz²))
    """
    xy, xz, yz = (spearman(a, b, shuffles=0)["rho"] for a, b in ((x, y), (x, given), (y, given)))
    if xy is None or xz is None or yz is None:
        return None
    rest = (1 - xz * xz) * (1 - yz * yz)
    return (xy - xz * yz) / math.sqrt(rest) if rest > 1e-12 else None


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(map(mul, a, b))
