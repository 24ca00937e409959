"""Micro-batches: which examples share a forward, how they lie in it, and where the loss of each one then is.

Examples are sorted by length and cut so that little padding is computed. Rows are padded on the right.

    S_i = Σ NLL over the labelled tokens of example i, n_i their number        Σ S_i / Σ n_i = ValidationLoss

The sums by example tell a real rise of the mean from noise without another forward
(``search.significance``). They are taken by gathering: token losses of a micro-batch, one zero appended,
are gathered into a matrix of (rows, length) whose free places point at the zero, and summed along its rows
in float64. Unlike adding into rows by index, that is the same order of additions each time; it can be
captured as the loss itself is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ffkernels.validation.batches import IGNORE, Example


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward; `positions` index the flattened (rows · length) hidden states."""

    input_ids: torch.Tensor  # (rows, length) int64
    positions: torch.Tensor  # (scored,) int64; 0 where there is nothing more to score
    targets: torch.Tensor  # (scored,) int64; −100 there, whose loss is exactly 0
    places: torch.Tensor  # (rows, length) int64: where in `targets` each position's is; `scored` where none

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(*(tensor.to(device) for tensor in vars(self).values()))

    def copy_(self, other: MicroBatch) -> None:
        for mine, new in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(new)


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, forward_cost: int) -> list[list[int]]:
    """Cut the examples, sorted by length, where Σ (rows · longest + forward_cost) is smallest.

    No micro-batch exceeds `max_tokens` padded tokens unless a single example does. Dynamic programming
    over the sorted order, from short to long; the last group's start never moves back as examples are added.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first n examples, start of their last group
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        choice = (float("inf"), end - 1)
        for start in range(end - 1, best[end - 1][1] - 1, -1):
            padded = (end - start) * longest
            if padded > max_tokens and start < end - 1:
                break
            cost = best[start][0] + padded + forward_cost
            if cost < choice[0]:
                choice = (cost, start)
        best.append(choice)
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def lay_out(
    examples: Sequence[Example], pad: int, *, rows: int = 0, length: int = 0, scored: int = 0
) -> MicroBatch:
    """`examples` as one micro-batch on the CPU, of at least the given sizes."""
    rows, length = max(rows, len(examples)), max(length, *(example.computed for example in examples), 1)
    ids, targets = torch.full((rows, length), pad), torch.full((rows, length), IGNORE)
    for i, example in enumerate(examples):
        ids[i, : example.computed] = example.input_ids[: example.computed]
        targets[i, : example.computed] = example.labels[1 : example.computed + 1]
    positions = targets.flatten().ne(IGNORE).nonzero().flatten()
    targets = targets.flatten()[positions]
    found = positions.numel()
    missing = max(0, scored - found)
    places = torch.full((rows * length,), found + missing)
    places[positions] = torch.arange(found)
    positions, targets = F.pad(positions, (0, missing)), F.pad(targets, (0, missing), value=IGNORE)
    return MicroBatch(ids, positions, targets, places.view(rows, length))


def assign(examples: Sequence[Example], rooms: Sequence[tuple[int, int, int]]) -> list[list[Example]] | None:
    """Examples for micro-batches of (rows, length, labels), or None where they were not found to fit.

    From long to short: a room that is long enough for an example is so for all later ones, so any free row
    will do. The one with most labels to spare is taken or, where that leads nowhere, the longest: examples,
    in this order each no larger than one of those that the rooms were made for, then fit for certain.
    """
    ordered = sorted(examples, key=lambda example: (-example.computed, -example.scored))
    for longest in (False, True):
        placed: list[list[Example]] = [[] for _ in rooms]
        spare = [labels for _, _, labels in rooms]
        for example in ordered:
            fitting = [
                i
                for i, (rows, length, _) in enumerate(rooms)
                if length >= example.computed and rows > len(placed[i]) and spare[i] >= example.scored
            ]
            if not fitting:
                break
            chosen = max(fitting, key=lambda i: (rooms[i][1], i) if longest else (spare[i], -i))
            placed[chosen].append(example)
            spare[chosen] -= example.scored
        else:
            return placed
    return None


def counts_by_example(micro_batches: Sequence[MicroBatch]) -> list[int]:
    """n in the order of the micro-batches' rows; 0 for a row without an example."""
    return [n for batch in micro_batches for n in batch.places.lt(batch.targets.numel()).sum(1).tolist()]


def sums_by_example(
    micro_batches: Sequence[MicroBatch], losses: Sequence[Sequence[torch.Tensor]], device: torch.device
) -> torch.Tensor:
    """S in the same order, (rows,) float64 on ``device``.

    Args:
        losses: the token losses of each micro-batch, in order and in any parts.
    """
    rows = [torch.zeros(0, dtype=torch.float64, device=device)]
    for parts, batch in zip(losses, micro_batches, strict=True):
        padded = torch.cat([*(part.to(device) for part in parts), parts[0].new_zeros(1).to(device)])
        rows.append(padded[batch.places].sum(1, dtype=torch.float64))
    return torch.cat(rows)


def read_together(
    loss: torch.Tensor | float, sums: torch.Tensor | None = None
) -> tuple[float, list[float] | None]:
    """A loss and its sums by example, None where there are none, in one read from the device."""
    if sums is None:
        return float(loss), None
    loss, *sums = torch.cat([loss.reshape(1), sums]).tolist()
    return loss, sums
