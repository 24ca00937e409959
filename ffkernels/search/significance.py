"""Signal before sign: whether a validation loss is really higher than the lowest one seen before.

Let S_i be the summed NLL of example i and n_i its tokens (``validation.micro_batches``), at two places of a
search, d_i the difference of the two S_i, D = Σ d_i / Σ n_i the difference of the two losses, and w_i = n_i
/ Σ n_i. D is a ratio estimate over m examples; with the jackknife's estimate of its variance

    t = Σ d_i / sqrt( (m−1)/m · Σ ((d_i − n_i·D) / (1 − w_i))² )

is its paired t statistic with m − 1 degrees of freedom: for n_i all equal, the plain paired t of the d_i.
What makes examples hard or easy cancels; rounding noise, and how differently examples react to a step,
stay. A search compares with the lowest of k earlier losses, which is low by luck, so by the union bound

    a rise is real   where   D > 0 and t² > q_k²,   q_k = t_{m−1}(1 − LEVEL / k),

calls noise a rise with a probability of about LEVEL per comparison, where noise is independent between
examples. On measured rounding noise it was 2 to 5 times that (docs/results.md, on searches under noise).
LEVEL is small since a rise that was missed costs one more validation, and one that was none ends a search
early.

Where there are no losses by example every rise counts. A loss that is not finite is a rise always.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.01
LEAST_EXAMPLES = 4  # that fewer prove nothing, whatever their losses


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t quantile, from 1/2 up, by the Cornish-Fisher expansion about the normal one.

    At the levels of ``critical_values``, up to the 38 losses of the longest search, it is below the true
    value by 6 % at most at 3 degrees of freedom, by 0.2 % from 7 on. One or two, where the expansion fails,
    are refused a verdict: inf.
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


def critical_values(examples: int, count: int) -> list[float]:
    """[k]: q² (m−1)/m, what t² of a rise over the lowest of k losses must exceed, k = 0 … ``count`` − 1.

    For ``examples`` = m, those with labelled tokens. The factor is that of the jackknife, so that ``higher``
    needs none. Entry 0, where nothing was seen, is inf.
    """
    return [_critical_value(examples, seen) for seen in range(count)]


def _critical_value(examples: int, seen: int) -> float:
    if not examples or not seen:
        return math.inf
    quantile = t_quantile(1 - LEVEL / seen, examples - 1)
    return quantile * quantile * (1 - 1 / examples)


def jackknife_weights(tokens: Sequence[float]) -> list[float]:
    """1 / (1 − w_i) of each example; 0 for one that has all the tokens."""
    size = _sum(tokens)
    return [1 / (1 - n / size) if n < size else 0.0 for n in tokens]


def higher(
    low: Sequence[float],
    high: Sequence[float],
    tokens: Sequence[float],
    weights: Sequence[float],
    critical: float,
) -> bool:
    """The rule, for sums that are finite. One order of additions and no root, so that a device can follow.

    Args:
        low, high: summed NLL of each example at the two places.
        tokens, weights: labelled tokens of each, and its ``jackknife_weights``; one of no tokens counts for
            nothing.
        critical: of ``critical_values``.
    """
    total = 0.0
    for a, b in zip(low, high, strict=True):
        total += b - a
    if not total > 0.0:
        return False
    mean = total / _sum(tokens)
    spread = 0.0
    for a, b, n, weight in zip(low, high, tokens, weights, strict=True):
        rest = ((b - a) - n * mean) * weight
        spread += rest * rest
    return total * total > critical * spread


def _sum(values: Sequence[float]) -> float:
    """One after the other; the built-in ``sum`` compensates since Python 3.12."""
    total = 0.0
    for value in values:
        total += value
    return total


def really_higher(low: Sequence[float], high: Sequence[float], tokens: Sequence[float], *, seen: int) -> bool:
    """Whether the loss of ``high`` is above that of ``low``, the lowest of ``seen`` earlier ones."""
    if not all(map(math.isfinite, high)):
        return True
    examples = sum(n > 0 for n in tokens)
    critical = _critical_value(examples, max(1, seen))
    return higher(low, high, tokens, jackknife_weights(tokens), critical)


class Rises:
    """The rule along one search: each loss against the lowest before it.

    Args:
        tokens: labelled tokens of each example; None where there are no losses by example. So few that they
            prove nothing, below ``LEAST_EXAMPLES``, are as none.

    Attributes:
        examples: how many have tokens.
        tokens: as given, None where every rise counts.
        weights: their ``jackknife_weights``, none where every rise counts.
        seen: how many losses so far.
    """

    def __init__(self, tokens: Sequence[float] | None = None) -> None:
        self.examples = 0 if tokens is None else sum(n > 0 for n in tokens)
        self.tokens = tokens if self.examples >= LEAST_EXAMPLES else None
        self.seen = 0
        self.weights = [] if self.tokens is None else jackknife_weights(self.tokens)
        self._loss = math.inf
        self._sums: Sequence[float] | None = None

    def sure(self, loss: float, sums: Sequence[float] | None = None) -> bool:
        """Whether this loss, the next of the search, is a real rise over the lowest one before it.

        False for the first, for a new lowest one, and for equal ones where there are losses by example.

        Args:
            loss: the mean loss, Σ S_i / Σ n_i.
            sums: S_i, as many as ``tokens``; not looked at where those are None or the loss is not finite.

        Raises:
            ValueError: when there are ``tokens`` and no sums.
        """
        if self.tokens is not None and sums is None and math.isfinite(loss):
            raise ValueError("a loss without its sums by example, in a search that was given their tokens")
        self.seen += 1
        loss = loss if math.isfinite(loss) else math.inf
        if self.seen == 1 or loss < self._loss:
            self._loss, self._sums = loss, sums
            return False
        if self.tokens is None or loss == math.inf:
            return True
        critical = _critical_value(self.examples, self.seen - 1)
        return higher(self._sums, sums, self.tokens, self.weights, critical)
