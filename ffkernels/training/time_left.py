"""How long several runs will still take, from how long they have taken so far.

    left = what the present run needs at its steps' pace + runs that have not begun · the longest so far

An estimate: a run may reach its target before its last step, and one with long stages outlast those before.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

__all__ = ["TimeLeft"]


class TimeLeft:
    """To be told when each of ``runs`` runs, one after the other, begins. ``clock`` gives seconds.

    Attributes:
        begun: how many have begun.
    """

    def __init__(self, runs: int, clock: Callable[[], float] = perf_counter) -> None:
        self.runs, self.begun = runs, 0
        self._clock, self._since, self._longest, self._prepared = clock, 0.0, 0.0, 0.0

    def begin(self) -> None:
        now = self._clock()
        if self.begun:
            self._longest = max(self._longest, now - self._since)
        self.begun, self._since, self._prepared = self.begun + 1, now, 0.0

    def prepared(self) -> None:
        """The present run has its model and data: its steps begin."""
        self._prepared = self._clock() - self._since

    def seconds(self, done: float) -> float | None:
        """Left when a share ``done`` of the present run's steps is done; None where nothing tells yet."""
        if not done:
            return (self.runs - self.begun + 1) * self._longest or None
        steps = (self._clock() - self._since - self._prepared) / done
        return steps * (1 - done) + (self.runs - self.begun) * max(self._longest, self._prepared + steps)
