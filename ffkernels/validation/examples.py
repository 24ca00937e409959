"""The validation loss of each example: tells a real rise of the mean from noise, without another forward.

    S_i = Σ NLL over the labelled tokens of example i, n_i their number        Σ S_i / Σ n_i = ValidationLoss

Two evaluations at different weights see the same examples, so their S_i come in pairs, and the pairs say how
sure the difference of the means is (``significance``).

The sums are taken by gathering: token losses of a micro-batch, one zero appended, are gathered into a matrix
of (rows, length) whose free places point at the zero, and the matrix is summed along its rows in float64.
Unlike adding into rows by index, that is the same order of additions each time. Shapes are fixed, so are the
addresses of what is read, and nothing is read back to the host: it can be captured as the loss itself is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["ExampleSums", "MicroBatch", "read_together"]


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward; `positions` index the flattened (rows · length) hidden states."""

    input_ids: torch.Tensor  # (rows, length) int64
    positions: torch.Tensor  # (scored,) int64; 0 where there is nothing more to score
    targets: torch.Tensor  # (scored,) int64; −100 there, whose loss is exactly 0

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(*(tensor.to(device) for tensor in vars(self).values()))

    def copy_(self, other: MicroBatch) -> None:
        for mine, new in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(new)


class ExampleSums:
    """Where in the token losses of some micro-batches those of each example are.

    Examples are in the order of the micro-batches' rows. A row that holds no example (after ``swap_batch``
    with fewer) has S = 0 and n = 0.

    Attributes:
        tokens: n, (rows,) float64 on ``device``.
        counts: the same numbers on the host.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], device: torch.device) -> None:
        self._places = [_places(batch).to(device) for batch in micro_batches]
        self.counts = _counts(micro_batches)
        self.tokens = torch.tensor(self.counts, dtype=torch.float64, device=device)

    def copy_(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Other examples, in micro-batches of the same shapes: nothing changes its address."""
        for mine, batch in zip(self._places, micro_batches, strict=True):
            mine.copy_(_places(batch))
        self.counts = _counts(micro_batches)
        self.tokens.copy_(torch.tensor(self.counts, dtype=torch.float64))

    def __call__(self, parts: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """S, (rows,) float64, of the token losses of each micro-batch, in order and in any parts."""
        rows = [self.tokens.new_zeros(0)]
        for losses, places in zip(parts, self._places, strict=True):
            device = places.device
            padded = torch.cat([*(part.to(device) for part in losses), losses[0].new_zeros(1).to(device)])
            rows.append(padded[places].sum(1, dtype=torch.float64))
        return torch.cat(rows)


def read_together(
    loss: torch.Tensor | float, sums: torch.Tensor | None = None
) -> tuple[float, list[float] | None]:
    """A loss and its sums by example, None where there are none, in one read from the device."""
    if sums is None:
        return float(loss), None
    loss, *sums = torch.cat([loss.reshape(1), sums]).tolist()
    return loss, sums


def _real(batch: MicroBatch) -> torch.Tensor:
    """Which of a micro-batch's positions hold something to score."""
    return batch.targets.cpu().ge(0).nonzero().flatten()


def _places(batch: MicroBatch) -> torch.Tensor:
    """(rows, length): where in the micro-batch's token losses each position's is; their number where none."""
    rows, length = batch.input_ids.shape
    places = torch.full((rows * length,), batch.positions.numel())
    real = _real(batch)
    places[batch.positions.cpu()[real]] = real
    return places.view(rows, length)


def _counts(micro_batches: Sequence[MicroBatch]) -> list[int]:
    counts: list[int] = []
    for batch in micro_batches:
        rows, length = batch.input_ids.shape
        row = batch.positions.cpu()[_real(batch)] // length
        counts += torch.bincount(row, minlength=rows).tolist()
    return counts
