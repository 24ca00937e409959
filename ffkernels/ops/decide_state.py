"""A search that lives on a device: what its memory holds, and what the host writes there and reads back.

One allocation holds the search (`begin` sets the first 16 words):

    flags     int32[3]             accept, go, stopped (an index into REASONS)
    k         float32[1]
    integers  int64[8]             next τ, evaluations, best τ, a, c (0: none yet), vertices (-1: doubling,
                                   -2: halving; 4 more: the last loss was a rise that is not sure), max τ,
                                   capacity
    numbers   float64[6]           best loss, loss at τ = 0, f(a), f(c), predicted loss, its last error
    taus      int64[capacity]      what was measured, in order
    losses    float64[capacity]
    sure      int64[capacity]      whether it was a real rise over the lowest loss before it

and two more that `begin` leaves alone: the sums of losses by example at the best τ, float64[rows], and what
the host says between stages of the examples (`know`) and of where to start (`start_at`):

    rows      int64[1]             how many examples there are; 0 where every rise counts
    start     int64[1]             the τ after 0
    critical  float64[capacity]    what the test is held against, by how many losses came before
    tokens    float64[rows]        labelled tokens
    weights   float64[rows]        of the jackknife
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# Repeated from engine, which stands above this room; a test holds them together.
REASONS = (
    None,
    "loss stopped falling",
    "first step did not lower the loss",
    "reached max_tau",
    "converged",
    "evaluation budget spent",
    "loss at tau 0 is not finite",
    "the optimizer did not change the weights",
    "the optimizer's update is not finite",
)
MAX_TAU_LIMIT = 1 << 16


@dataclass(frozen=True)
class Decided:
    """A state read back: what the search of `search.search` would say."""

    losses: list[tuple[int, float]]
    best_tau: int
    best_loss: float
    accepted: bool
    stopped_because: str | None
    sure: list[bool] = field(default_factory=list)  # of each loss, whether it was a real rise


class DecideState:
    """One search on the device, ready for its first loss, which is that of τ = 0.

    `accept` (int32[1]) and `k` (float32[1]) are the arguments of the step that follows a decision; `go`
    (int32[1]) says whether another measurement does.

    Args:
        search: "parabolic" or "linear".
        max_tau: the largest τ that may be proposed.
        rows: losses by example that come with each loss. Until `know` was told of them every rise counts. A
            linear search, for which every rise counts, has no use for them.
    """

    def __init__(self, search: str, max_tau: int, device: torch.device | str, rows: int = 0) -> None:
        if search not in ("parabolic", "linear"):
            raise ValueError(f"search must be one of 'parabolic', 'linear', got {search!r}")
        if not isinstance(max_tau, int) or isinstance(max_tau, bool) or not 1 <= max_tau <= MAX_TAU_LIMIT:
            raise ValueError(f"max_tau must be an integer from 1 to {MAX_TAU_LIMIT}, got {max_tau!r}")
        self.search = search
        self.max_tau = max_tau
        self.rows = rows
        self.capacity = int(2 * math.log2(max_tau)) + 6 if search == "parabolic" else max_tau + 1
        # A state made under inference mode could not be reset outside of it.
        with torch.inference_mode(False):
            begin = torch.zeros(16, dtype=torch.int64)
            begin.view(torch.int32)[1] = 1  # go
            begin[7] = -1  # doubling
            begin[8], begin[9] = max_tau, self.capacity
            begin[10:16].view(torch.float64).fill_(math.inf)
            self._begin = begin.to(device)
            self._memory = torch.zeros(16 + 3 * self.capacity, dtype=torch.int64, device=device)
            self._best = torch.zeros(max(rows, 1), dtype=torch.float64, device=device)
            self._examples = torch.zeros(2 + self.capacity + 2 * rows, dtype=torch.float64, device=device)
        self.device = self._memory.device  # "cuda" has become the one that was current
        self.accept = self._memory.view(torch.int32)[0:1]
        self.go = self._memory.view(torch.int32)[1:2]
        self.k = self._memory.view(torch.float32)[3:4]
        self.start_at(1)
        self.reset()

    def start_at(self, start: int) -> None:
        """The τ after 0, or `max_tau`, of a search that begins after this; not part of a graph.

        A linear search starts at 1 whatever is said.
        """
        if not isinstance(start, int) or isinstance(start, bool) or not 1 <= start <= MAX_TAU_LIMIT:
            raise ValueError(f"start must be an integer from 1 to {MAX_TAU_LIMIT}, got {start!r}")
        self.start = min(start, self.max_tau)
        self._examples.view(torch.int64)[1:2].fill_(self.start)

    def know(
        self, critical: Sequence[float], tokens: Sequence[float] = (), weights: Sequence[float] = ()
    ) -> None:
        """What is to be known of the examples for a search that begins after this; not part of a graph.

        Args:
            critical: `critical_values` of search.significance, for `capacity` losses.
            tokens, weights: labelled tokens of each example and its `jackknife_weights`, `rows` of each; none
                where every rise is to count.
        """
        told = len(critical), len(tokens), len(weights)
        if told != (self.capacity, self.rows, self.rows) and told != (self.capacity, 0, 0):
            raise ValueError(
                f"{told[0]} critical values, {told[1]} tokens and {told[2]} weights were given; this state "
                f"needs {self.capacity} and, of the others, {self.rows} each or none"
            )
        known = torch.tensor([0.0, 0.0, *critical, *tokens, *weights], dtype=torch.float64)
        known.view(torch.int64)[:2] = torch.tensor([len(tokens), self.start])
        self._examples[: len(known)].copy_(known)

    def reset(self) -> None:
        """Begin again. A copy on the device: it can be part of a captured graph."""
        self._memory[:16].copy_(self._begin)

    def read(self) -> Decided:
        """The search so far, in one read from the device, which waits for it."""
        memory = self._memory.cpu()
        accept, _, stopped = memory.view(torch.int32)[:3].tolist()
        _, count, best_tau = memory[2:5].tolist()
        taus, losses, sure = memory[16:].view(3, self.capacity)[:, :count]
        return Decided(
            losses=list(zip(taus.tolist(), losses.view(torch.float64).tolist(), strict=True)),
            best_tau=best_tau,
            best_loss=memory[10:11].view(torch.float64).item(),
            accepted=bool(accept),
            stopped_because=REASONS[stopped],
            sure=[bool(verdict) for verdict in sure.tolist()],
        )
