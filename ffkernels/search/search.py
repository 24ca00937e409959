"""Which τ to try next: the line search along one optimizer update, as pure state machines.

A stage asks ``propose()`` for τ, measures the validation loss of ``W + τ·Δ`` and reports it with
``observe(τ, loss)`` until ``propose()`` returns None. τ is an integer, τ = 0 (the plain optimizer's
weights) always comes first and is the baseline, and ``best_tau`` is the first τ with the lowest observed
loss: never one that is worse than τ = 0. How the two searches go on from there is in docs/algorithm.md;
whether a rise is sure is for the caller to say (``significance``).

A non-finite loss counts as +inf. All decisions are taken in float64 in a fixed order of operations, so that
the device twin of these machines (``ops.decide``) can make identical choices.

Source of the linear search: Rahamim et al., "Fast Forwarding Low-Rank Training", EMNLP 2024, arXiv
2409.04206.
"""

from __future__ import annotations

import math

# What the parabola may still promise, plus how much it was last wrong by, when refining ends: relative to
# the decrease found so far. Close to its lowest place a loss is flat, so that what is left costs little.
REFINE_TOLERANCE = 1e-2
# The share of the longer side at which a golden section cuts: (3 − √5) / 2.
GOLDEN = 0.3819660112501051
MAX_TAU_LIMIT = 1 << 16

IMPROVEMENT_ENDED = "loss stopped falling"
NO_IMPROVEMENT = "first step did not lower the loss"
REACHED_MAX_TAU = "reached max_tau"
CONVERGED = "converged"
BUDGET_SPENT = "evaluation budget spent"
BASELINE_NOT_FINITE = "loss at tau 0 is not finite"


class Search:
    """What both searches share: the record of losses and the best of them.

    Args:
        max_tau: the largest τ that may be proposed, 1 … 65,536.
        start: the τ that is proposed after 0, at most ``max_tau``.

    Attributes:
        losses: every observation ``(τ, loss)`` in order.
        best_tau, best_loss: the first lowest observation; ``(0, inf)`` before the first.
        accepted: whether the last observation, at τ > 0, became the best.
        stopped_because: None while the search goes on, else the reason in words.
    """

    name = "search"

    def __init__(self, max_tau: int = 1024, start: int = 1) -> None:
        for name, tau in (("max_tau", max_tau), ("start", start)):
            if not isinstance(tau, int) or isinstance(tau, bool) or not 1 <= tau <= MAX_TAU_LIMIT:
                raise ValueError(f"{name} must be an integer from 1 to {MAX_TAU_LIMIT}, got {tau!r}")
        self.max_tau = max_tau
        self.start = min(start, max_tau)
        self.losses: list[tuple[int, float]] = []
        self.best_tau = 0
        self.best_loss = math.inf
        self.accepted = False
        self.stopped_because: str | None = None
        self._next = 0

    def propose(self) -> int | None:
        """The τ to measure next, or None when the search has ended. Asking twice changes nothing."""
        return None if self.stopped_because else self._next

    def observe(self, tau: int, loss: float, sure: bool = True, computed: bool = True) -> None:
        """Report the validation loss at the proposed τ.

        Args:
            sure: where ``loss`` is not below ``best_loss``, whether that is a real rise, not noise. A loss
                that is not finite is one always. Not looked at otherwise, nor by ``LinearSearch``.
            computed: whether there was a loss at all, else ``loss`` is NaN.

        Raises:
            RuntimeError: when the search has ended.
            ValueError: when ``tau`` is not the τ that was proposed.
        """
        if self.stopped_because:
            raise RuntimeError(
                f"the search has ended ({self.stopped_because}); start a new one for the next stage"
            )
        if tau != self._next:
            raise ValueError(f"observe() got tau={tau!r}, but propose() asked for tau={self._next}")
        loss = float(loss)
        self.losses.append((tau, loss))
        if not math.isfinite(loss):
            loss, sure = math.inf, True
        if len(self.losses) == 1:
            self.best_loss = loss
            if loss == math.inf:
                self._stop(BASELINE_NOT_FINITE)
            else:
                self._next = self.start
            return
        self.accepted = loss < self.best_loss
        if self.accepted:
            self.best_tau, self.best_loss = tau, loss
        if not computed and tau > self.best_tau:
            tau = max(self.best_tau, tau // 2) + 1
        self._advance(tau, loss, sure)

    def _advance(self, tau: int, loss: float, sure: bool) -> None:
        raise NotImplementedError

    def _stop(self, reason: str) -> None:
        self.stopped_because = reason


class LinearSearch(Search):
    """The paper's search: one step after the other until the loss does not fall. ``start`` is 1 always."""

    name = "linear"

    def __init__(self, max_tau: int = 1024, start: int = 1) -> None:
        super().__init__(max_tau, start)
        self.start = 1

    def _advance(self, tau: int, loss: float, sure: bool) -> None:
        if not self.accepted:
            self._stop(IMPROVEMENT_ENDED if tau > 1 else NO_IMPROVEMENT)
        elif tau == self.max_tau:
            self._stop(REACHED_MAX_TAU)
        else:
            self._next = tau + 1


class ParabolicSearch(Search):
    """Doubling bracket, then parabola vertices with golden sections as the safeguard.

    At most ``2·log2(max_tau) + 6`` evaluations, whatever the losses and the start: doubling from there and
    halving to 1 take no more than doubling from 1. On a smooth loss with one minimum, where all rises are
    sure, the result is the argmin, or within ±2 of it, or within 1 % of the decrease: from 1, and from any
    start within a factor of two of the argmin. Kinks may deceive a parabola: a loss that has them, or several
    minima, is promised nothing but that the result is the lowest loss measured.
    """

    name = "parabolic"

    def __init__(self, max_tau: int = 1024, start: int = 1) -> None:
        super().__init__(max_tau, start)
        self.max_evaluations = int(2 * math.log2(max_tau)) + 6
        # The bracket a < b < c: b is the best τ, a and c are the measured ones next to it.
        self._a, self._fa = 0, math.inf
        self._b, self._fb = 0, math.inf
        self._c, self._fc = 0, math.inf  # 0: nothing above b was measured
        self._before, self._before_loss = 0, math.inf  # while doubling: what was measured last
        self._doubling, self._halving = True, False
        self._vertices = 0
        self._predicted = math.inf  # what the parabola promised for the τ that is being measured
        self._last_miss = math.inf
        self._unproven = False  # whether the last loss in the bracket was a rise that is not sure

    def _advance(self, tau: int, loss: float, sure: bool) -> None:
        if self._doubling:
            self._double(tau, loss, sure)
        elif self._halving:
            self._halve(tau, loss)
        else:
            self._narrow(tau, loss, sure)

    def _double(self, tau: int, loss: float, sure: bool) -> None:
        if len(self.losses) == 2:
            self._before_loss = self.losses[0][1]
        if self.accepted:
            self._a, self._fa, self._c, self._fc = self._before, self._before_loss, 0, math.inf
        elif self._c == 0:
            self._c, self._fc = tau, loss
        self._before, self._before_loss = tau, loss
        if tau < self.max_tau and (self.accepted or not sure):
            self._next = min(2 * tau, self.max_tau)
            return None
        self._doubling = False
        self._b, self._fb = self.best_tau, self.best_loss
        return self._close(self.start if self.best_tau in (0, self.start) else 1)

    def _halve(self, tau: int, loss: float) -> None:
        self._tighten(tau, loss)
        return self._close(1 if self.best_tau else tau)

    def _close(self, tau: int) -> None:
        """Go on to half of ``tau`` where there is one; else the bracket is closed, and is refined."""
        self._halving = tau > 1
        if self._halving:
            self._next = tau // 2
            return None
        if self.best_tau == 0:
            return self._stop(NO_IMPROVEMENT)
        if self._c:
            return self._refine()
        # Still falling at the limit: the loss beyond counts as inf, and one point before the limit tells
        # whether the minimum has been passed.
        self._c = self.best_tau + 1
        self._b, self._fb = self.best_tau, self.best_loss
        if self._c - self._a == 2:
            return self._stop(REACHED_MAX_TAU)
        self._next = self.best_tau - 1
        return None

    def _narrow(self, tau: int, loss: float, sure: bool) -> None:
        miss = abs(loss - self._predicted)  # loss may be inf too: a miss is then nan, which counts as inf
        miss = miss if math.isfinite(miss) else math.inf
        again, self._unproven = self._unproven, not (self.accepted or sure)
        self._tighten(tau, loss)
        if again and self._unproven and self._last_miss <= miss < math.inf:
            return self._stop(REACHED_MAX_TAU if self._b == self.max_tau else CONVERGED)
        return self._refine(miss)

    def _tighten(self, tau: int, loss: float) -> None:
        if self.accepted:  # the former best becomes the end on its side
            if tau > self._b:
                self._a, self._fa = self._b, self._fb
            else:
                self._c, self._fc = self._b, self._fb
        elif tau > self._b:
            self._c, self._fc = tau, loss
        else:
            self._a, self._fa = tau, loss

    def _refine(self, miss: float = math.inf) -> None:
        """Choose the next τ inside the bracket, or end. ``miss``: the error of the last prediction."""
        wrong, self._last_miss = max(miss, self._last_miss), miss
        a, fa, b, fb, c, fc = self._a, self._fa, self.best_tau, self.best_loss, self._c, self._fc
        self._b, self._fb = b, fb
        if c - a <= 2:
            return self._stop(REACHED_MAX_TAU if b == self.max_tau else CONVERGED)
        if len(self.losses) >= self.max_evaluations:
            return self._stop(BUDGET_SPENT)
        left = (fb - fa) / (b - a)
        right = (fc - fb) / (c - b)
        curvature = (right - left) / (c - a)
        if not 0.0 < curvature < math.inf:  # c is not finite, or the differences over- or underflow
            self._predicted = math.inf
            self._next = self._golden(a, b, c)
            return None
        vertex = 0.5 * (a + b) - 0.5 * left / curvature
        tau = min(max(math.floor(vertex + 0.5), a + 1), c - 1)
        promise = fb - self._parabola(tau, a, b, fb, left, curvature)
        if promise + wrong <= REFINE_TOLERANCE * (self.losses[0][1] - fb):
            return self._stop(CONVERGED)
        if self._vertices < 2:
            self._vertices += 1
            if tau == b:  # the parabola is content: a point on the longer side tells whether it is right
                tau = b + max(1, (c - b) // 4) if c - b >= b - a else b - max(1, (b - a) // 4)
        else:
            tau = self._golden(a, b, c)
        self._predicted = self._parabola(tau, a, b, fb, left, curvature)
        self._next = tau
        return None

    @staticmethod
    def _parabola(tau: int, a: int, b: int, fb: float, left: float, curvature: float) -> float:
        return fb + (tau - b) * (left + curvature * (tau - a))

    @staticmethod
    def _golden(a: int, b: int, c: int) -> int:
        if c - b >= b - a:
            return b + max(1, math.floor(GOLDEN * (c - b) + 0.5))
        return b - max(1, math.floor(GOLDEN * (b - a) + 0.5))


SEARCHES: dict[str, type[Search]] = {search.name: search for search in (ParabolicSearch, LinearSearch)}


def make_search(name: str, max_tau: int = 1024, start: int = 1) -> Search:
    """A fresh search by its name, ``"parabolic"`` or ``"linear"``, which has no other start than 1."""
    if name not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(map(repr, SEARCHES))}, got {name!r}")
    return SEARCHES[name](max_tau, start)
