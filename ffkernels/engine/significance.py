"""Signal before sign: whether a validation loss is really higher than the lowest one seen before.

One rule. Let S_i be the summed NLL of example i and n_i its tokens (``validation_examples``), at two places
of a search, d_i the difference of the two S_i, D = Σ d_i / Σ n_i the difference of the two losses, and
w_i = n_i / Σ n_i. D is a ratio estimate over m examples; with the jackknife's estimate of its variance

    t = Σ d_i / sqrt( (m−1)/m · Σ ((d_i − n_i·D) / (1 − w_i))² )

is its paired t statistic with m − 1 degrees of freedom: for n_i all equal, the plain paired t of the d_i. The
examples are the same at both places, so what makes them hard or easy cancels. What stays in d_i is the
rounding noise of two forwards, which is as large when nothing has changed at all, and how differently
examples react to a step. Both mean that the rise might not be there on other examples or at a neighbouring
step, so both make a rise unproven.

A search compares each new loss with the lowest of k earlier ones. Of k losses that differ by noise alone, the
lowest is low by luck. To be higher than the lowest is to be higher than some one of k, so by the union bound

    a rise is real   where   t > t_{m−1}(1 − LEVEL / k)

calls noise a rise with a probability of about LEVEL per comparison. LEVEL is small since the two errors do
not cost the same: a rise that was missed costs one more validation (the next place is twice as far and its
loss the higher), one that was none ends a search early and loses what lies beyond.

Where there are no losses by example, noise cannot be told from signal, and every rise counts. A loss that is
not finite is a rise always.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

__all__ = ["LEAST_EXAMPLES", "LEVEL", "paired_t", "really_higher", "t_quantile"]

LEVEL = 0.01
LEAST_EXAMPLES = 4  # that fewer prove nothing, whatever their losses


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t quantile, from 1/2 up, by the Cornish-Fisher expansion about the normal one.

    Within 2 % of the true value from 15 degrees of freedom on. One or two, where the expansion fails, are
    refused a verdict: inf.
    """
    if freedom < LEAST_EXAMPLES - 1:
        return math.inf
    z = NormalDist().inv_cdf(probability)
    z2 = z * z
    terms = (
        1.0,
        (z2 + 1) / 4,
        ((5 * z2 + 16) * z2 + 3) / 96,
        (((3 * z2 + 19) * z2 + 17) * z2 - 15) / 384,
        ((((79 * z2 + 776) * z2 + 1482) * z2 - 1920) * z2 - 945) / 92160,
    )
    return z * sum(term / freedom**power for power, term in enumerate(terms))


def paired_t(low: Sequence[float], high: Sequence[float], tokens: Sequence[float]) -> float:
    """t of the difference of two losses, above 0 where ``high`` is the higher; 0 where they are equal.

    Args:
        low, high: summed NLL of each example at the two places.
        tokens: labelled tokens of each; examples of none are left out.
    """
    rows = [(b - a, n) for a, b, n in zip(low, high, tokens, strict=True) if n > 0]
    total = sum(d for d, _ in rows)
    if not math.isfinite(total) or len(rows) < 2:
        return math.inf if math.isnan(total) else total * math.inf if total else 0.0
    size = sum(n for _, n in rows)
    mean = total / size
    spread = (1 - 1 / len(rows)) * sum(((d - n * mean) / (1 - n / size)) ** 2 for d, n in rows)
    if spread == 0.0:
        return math.copysign(math.inf, total) if total else 0.0
    return total / math.sqrt(spread)


def really_higher(low: Sequence[float], high: Sequence[float], tokens: Sequence[float], *, seen: int) -> bool:
    """Whether the loss of ``high`` is above that of ``low``, the lowest of ``seen`` earlier ones."""
    if not all(map(math.isfinite, high)):
        return True
    examples = sum(n > 0 for n in tokens)
    return paired_t(low, high, tokens) > t_quantile(1 - LEVEL / max(1, seen), examples - 1)
