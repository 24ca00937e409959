"""Which multiple of an optimizer update to try next, to find the learning rate it should have had.

    W(s) = W_before + s·Δ        s = 1 + τ: s = 1 is the optimizer's own step, s = 0 the weights before it

A pure state machine, as those in ``search``, except that s is any number above 0 and that it knows noise:

    ends      s = 0, 1
    upward    4, 16, 64, … until a loss is really higher than the lowest one (``significance``)
    downward  1/2, 1/4, … where s = 1 was too far, or is the lowest place
    vertices  three parabolas through the lowest place and its neighbours

On real curves three vertices between places four times apart came as close to the minimum as two between
places twice apart, and quadrupling is there in half as many evaluations: 5 fewer from a learning rate that
is a thousand times too small. The parabola is one in s, not in log s: close to the minimum the loss is
quadratic in s, and vertices came closer than in log s.

Bounds: s from 2⁻¹⁰ to 2¹⁶, and 19 evaluations: with the one before the first step, 20 to find a learning
rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ffkernels.engine.search import BUDGET_SPENT, CONVERGED
from ffkernels.engine.significance import Rises

__all__ = ["LARGEST", "MAX_EVALUATIONS", "SMALLEST", "Place", "RateSearch"]

LARGEST = 2.0**16
SMALLEST = 2.0**-10
GROWTH = 4.0
MAX_EVALUATIONS = 19
VERTICES = 3
# A vertex this close to a place that is known, relative to s, is not worth a validation.
CLOSE = 0.01

REACHED_LARGEST = "still falling at the largest multiple"
NO_FALL = "no multiple of the update lowers the loss"
BASELINE_NOT_FINITE = "the loss before the update is not finite"


@dataclass(frozen=True)
class Place:
    """One evaluation: the multiple, the loss there (inf where it is not finite), and its sums by example."""

    scale: float
    loss: float
    sums: Sequence[float] | None = None


class RateSearch:
    """Find s ≥ 0 with the lowest validation loss of W(s).

    Args:
        tokens: labelled tokens of each validation example; None where there are no losses by example, and
            every rise counts.

    Attributes:
        places: every evaluation in order.
        best: the lowest of them; of equal ones the first.
        stopped_because: None while the search goes on, else the reason in words.
    """

    def __init__(self, tokens: Sequence[float] | None = None) -> None:
        self.tokens = tokens
        self._rises = Rises(tokens)
        self.places: list[Place] = []
        self.stopped_because: str | None = None
        self._next, self._upward, self._vertices = 0.0, True, 0

    @property
    def best(self) -> Place:
        return min(self.places, key=lambda place: place.loss)

    @property
    def scale(self) -> float:
        """The multiple that was found; 1 where none lowers the loss."""
        found = self.best.scale if self.places else 0.0
        return found or 1.0

    def propose(self) -> float | None:
        """The multiple to measure next, or None when the search has ended."""
        return None if self.stopped_because else self._next

    def observe(self, scale: float, loss: float, sums: Sequence[float] | None = None) -> None:
        """Report the loss at the proposed multiple, with its sums by example where ``tokens`` were given.

        Raises:
            RuntimeError: when the search has ended.
            ValueError: when this is not the multiple that was proposed, or the sums are missing.
        """
        if self.stopped_because:
            raise RuntimeError(f"the search has ended ({self.stopped_because}); start a new one")
        if scale != self._next:
            raise ValueError(f"observe() got scale={scale!r}, but propose() asked for {self._next!r}")
        if (sums is None) != (self.tokens is None):
            raise ValueError("sums by example go with a search that was given tokens, and only with one")
        place = Place(scale, loss if math.isfinite(loss) else math.inf, sums)
        sure = self._rises.sure(place.loss, sums)
        if not self.places:
            self.places.append(place)
            if place.loss == math.inf:
                self.stopped_because = BASELINE_NOT_FINITE
            self._next = 1.0
            return
        rose = sure and place.loss > self.best.loss
        self.places.append(place)
        self._upward = self._upward and not rose
        if self._upward and place.scale < LARGEST:
            self._next = GROWTH * place.scale
        elif self._upward and self.best is place:
            self._stop(REACHED_LARGEST)
        else:
            self._upward = False
            self._close_in()
        if len(self.places) == MAX_EVALUATIONS and not self.stopped_because:
            self._stop(BUDGET_SPENT)

    def _close_in(self) -> None:
        """Neighbours of the lowest place that a parabola can go through, the lower one not at 0; vertices."""
        lowest = self.best.scale
        below = max((place.scale for place in self.places if place.scale < lowest), default=0.0)
        above = min((p for p in self.places if p.scale > lowest), key=lambda p: p.scale, default=self.best)
        if lowest == 0 and above.scale > SMALLEST:
            self._next = above.scale / 2
        elif below == 0 and lowest > SMALLEST:
            self._next = lowest / 2
        elif above.loss == math.inf and above.scale > 2 * lowest:
            self._next = 2 * lowest
        else:
            self._refine()

    def _refine(self) -> None:
        vertex = self._vertex() if self._vertices < VERTICES else None
        if vertex is None:
            self._stop(CONVERGED)
        else:
            self._next = vertex
            self._vertices += 1

    def _vertex(self) -> float | None:
        """The lowest point of the parabola through the best place and its neighbours; None where known."""
        places = sorted(self.places, key=lambda place: place.scale)
        at = places.index(self.best)
        if at == 0 or at == len(places) - 1:
            return None
        a, b, c = places[at - 1 : at + 2]
        left = (b.loss - a.loss) / (b.scale - a.scale)
        curvature = ((c.loss - b.loss) / (c.scale - b.scale) - left) / (c.scale - a.scale)
        if not 0.0 < curvature < math.inf:
            return None
        vertex = 0.5 * (a.scale + b.scale) - 0.5 * left / curvature
        if not a.scale < vertex < c.scale or any(abs(vertex - p.scale) <= CLOSE * vertex for p in (a, b, c)):
            return None
        return vertex

    def _stop(self, reason: str) -> None:
        self.stopped_because = NO_FALL if self.best.scale == 0 else reason
