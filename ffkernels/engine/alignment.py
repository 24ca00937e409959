"""Whether the last update still helps, at every optimizer step and without a loss.

    c = ⟨g, d⟩ / (‖g‖·‖d‖)      g: the gradient that the coming step is about to use, of a new batch, at W
                                d = W − best: what the last step did; best ← W in the same pass

−⟨g, d⟩ is to first order what repeating the last update would gain: c < 0 says that it would, c > 0 that the
step went too far. c has no scale, so neither clipping nor loss scaling shows in it. Where there is no such
pair it is not known: at the first step, after a Fast Forward stage or anything else that wrote the weights in
place (`.data =` counts as a move of their memory), for a gradient or an update that is zero, and with a
closure, whose gradients come later.

On a GPU nothing waits: the three sums go to pinned memory and are read one step later. Of weights that are
spread over ranks (FSDP2) they are added over the ranks, which takes one exchange a step. Ranks that hold the
same weights have the same gradients, and so the same c.

c is noisy where batches are small. Where it has come to by the end of an interval is told by the line of
least squares through the interval's n values, and how far off that may be by their second differences:

    possible = line − t · σ · √((4n − 2) / (n² + n))      σ² = mean of (c_i − 2 c_{i+1} + c_{i+2})² / 6

Independent noise of variance σ² leaves 6σ² in a second difference, a steady rise or fall of c leaves nothing,
and σ times the root is the standard error of the line's end. t is Student's: σ comes from few values.

The signal is the hypergradient of the learning rate (Baydin et al., arXiv 1703.04782) without its scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels import ops
from ffkernels.ops.notices import announce_once
from ffkernels.ranks.ranks import ALIGNMENT, Ranks
from ffkernels.stage.clock import read_later

__all__ = ["Alignment", "cosine"]

WRITTEN = 3  # steps in a row
# Standard errors that noise exceeds to one side in 5 of 100 cases: for n = 3, 4, 5, 6 and more values.
STUDENT = (6.31, 2.92, 2.35, 2.13)


class Alignment:
    """The cosines of a run, from before each optimizer step.

    Args:
        ranks: those that hold a shard of the weights each; None where this process holds them whole.
        heard: somebody takes the sums of every step, see ``take``.
        kept: how many values are.

    Attributes:
        values: the latest c of the steps since ``begin_interval``, as far as it is known; newest last.
        last: the newest c; None where it is not known.
        strongest: the most negative c so far; 0 before there was one below 0.
    """

    def __init__(self, ranks: Ranks | None = None, *, heard: bool = False, kept: int = 1) -> None:
        self._ranks, self._kept = ranks, kept
        self._heard: list[list[float]] | None = [] if heard else None
        self.values: list[float] = []
        self.last: float | None = None
        self.strongest = 0.0
        self._written = 0  # steps before which somebody else wrote the weights, since c was known
        self._whole = False  # best holds the weights before the last step
        self._versions: list[int] | None = None  # of the weights after the last step; None is any
        self._sums: Tensor | None = None
        self._read: Callable[[], Sequence[float]] | None = None

    def before_step(
        self, table: ops.TensorTable, weights: Sequence[nn.Parameter], *, at_once: bool = False
    ) -> None:
        """Take c of the gradients that are there, and best ← W.

        Args:
            table: what moves; its best holds W before the last step where ``after_step`` followed.
            weights: the parameters of the table's tensors, in its order.
            at_once: wait for c, also on a GPU.
        """
        self._collect()
        paired = self.paired(table)
        if paired:
            self._sums = ops.align_(table, [_gradient(weight) for weight in weights], self._sums)
            self._read = read_later(self._sums)
        else:
            self._written += self._whole
            ops.checkpoint_(table)
        if self._ranks is not None:
            paired = self._exchange(paired)
        elif paired and (at_once or _reads_at_once(table.device)):
            self._collect()
        if paired:
            self._written = 0
            return
        self.last = None
        if self._written == WRITTEN:
            announce_once(
                "alignment-written",
                "the weights are written between optimizer steps, or others take their place, so that it is "
                "not known whether the last update still helps: stages run as long as the last one paid, and "
                'a rate of learning_rate="auto" does not move',
            )

    def paired(self, table: ops.TensorTable) -> bool:
        """Whether best holds the weights before the last step, and nobody has written them since."""
        return self._whole and self._versions in (None, _versions(table))

    def after_step(self, table: ops.TensorTable) -> None:
        """The optimizer has stepped from what ``before_step`` saw."""
        self._whole, self._versions = True, _versions(table)

    def forget(self, others: bool = False) -> None:
        """The weights were written since the last step, or are ``others``: the next c is not known."""
        self._collect()
        self._written += others and self._whole
        self._whole, self.last = False, None
        self._sums = None  # the table may be on another device from now on

    def take(self) -> list[list[float]]:
        """⟨g, d⟩, ⟨g, g⟩, ⟨d, d⟩ of each step since the last call, where there is a pair and it is read."""
        heard, self._heard = self._heard, []
        return heard or []

    def begin_interval(self) -> None:
        """What was asked for and is not read yet counts for the new one."""
        self.values = []

    def mean(self, newest: int) -> float | None:
        """The mean of so many of the values; None where there is none."""
        values = self.values[-newest:]
        return math.fsum(values) / len(values) if values else None

    def possible(self) -> float:
        """The most negative that c may be by now, behind its noise; −∞ where fewer than three values tell."""
        values, n = self.values, len(self.values)
        if n < 3:
            return -math.inf
        line = math.fsum((3 * i - n + 2) * c for i, c in enumerate(values)) * 2 / (n * n + n)
        bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
        variance = math.fsum(bend**2 for bend in bends) / (6 * len(bends))
        return line - STUDENT[min(n, 6) - 3] * math.sqrt(variance * (4 * n - 2) / (n * n + n))

    def _collect(self) -> None:
        """Note the c that was asked for last, where that has not happened."""
        read, self._read = self._read, None
        if read is not None:
            self._note(read())

    def _exchange(self, paired: bool) -> bool:
        """Take the sums over all ranks, where they have a pair on each; whether they have. Collective.

        So no rank waits for sums that another one has not: of a state that it did not load, or where its
        shards, which may be empty, have not been replaced.
        """
        read, self._read = self._read, None
        sums = read() if paired else (0.0, 0.0, 0.0)
        known, *sums = self._ranks.add(ALIGNMENT, [float(paired), *sums])
        if known < self._ranks.size:
            return False
        self._note(sums)
        return True

    def _note(self, sums: Sequence[float]) -> None:
        if self._heard is not None:
            self._heard.append(list(sums))
        self.last = cosine(*sums)
        if self.last is not None:
            self.values.append(self.last)
            del self.values[: -self._kept]
            self.strongest = min(self.strongest, self.last)

    def state_dict(self, table: ops.TensorTable | None) -> dict[str, Any]:
        """Numbers, and the weights before the last step as tensors on the CPU where the next c needs them."""
        self._collect()
        known = table is not None and self.paired(table)
        return {
            "values": list(self.values),
            "last": self.last,
            "strongest": self.strongest,
            "heard": [list(sums) for sums in self._heard or ()],
            "before": [best.detach().cpu().clone() for best in table.best] if known else None,
            "part": self._part(),
        }

    def _part(self) -> list[int] | None:
        """Which of how many shards of the weights this process has."""
        return None if self._ranks is None else [self._ranks.rank, self._ranks.size]

    def load_state_dict(self, state: dict[str, Any], table: ops.TensorTable) -> None:
        """Continue; where ``before`` is missing or of other weights, the next c is not known."""
        self._read = None
        self.forget()
        if self._heard is not None:
            self._heard = [list(sums) for sums in state["heard"]]
        self.values = [float(c) for c in state["values"]][-self._kept :]
        self.last, self.strongest = state["last"], float(state["strongest"])
        before = state.get("before")  # a state that is JSON has none
        shapes = [best.shape for best in table.best]
        mine = state["part"] == self._part()  # else another rank's, whose shards may have these shapes
        if before is not None and mine and [old.shape for old in before] == shapes:
            with torch.no_grad():
                for best, old in zip(table.best, before, strict=True):
                    best.copy_(old)
            # The model's own state may be loaded after this one.
            self._whole, self._versions = True, None


def _versions(table: ops.TensorTable) -> list[int]:
    return [weight._version for weight in table.weights]


def _gradient(weight: nn.Parameter) -> Tensor | None:
    return weight.grad.to_local() if hasattr(weight.grad, "to_local") else weight.grad


def _reads_at_once(device: torch.device) -> bool:
    return device.type == "cpu"


def cosine(gd: float, gg: float, dd: float) -> float | None:
    """None where one of the two is zero, or anything is not finite."""
    length = math.sqrt(gg) * math.sqrt(dd) if gg > 0 and dd > 0 else 0.0
    return gd / length if 0.0 < length < math.inf and math.isfinite(gd) else None
