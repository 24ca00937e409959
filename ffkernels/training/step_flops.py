"""FLOPs of the training batches that somebody else's loop runs, counted while they train.

The first batches of different shapes run once under PyTorch's FLOP counter: the real forward and backward,
whatever loss they compute, and no pass more than training makes. A shape seen before costs what it did.
After ``SHAPES`` different ones the cost is read off a fit instead, so that a run whose every batch has
another length is not slowed down by the counter:

    FLOPs(rows B, length T) = a·B + b·B·T + c·B·T²

which is what a transformer costs exactly (head of a classifier, matrix products, attention).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ffkernels.engine.flop_counter import counter
from ffkernels.reporting.flops import Flops

__all__ = ["SHAPES", "StepFlops"]

# Enough to determine three coefficients, few enough to cost nothing in a run of hundreds of steps.
SHAPES = 8


class StepFlops:
    """Costs of training batches by their shape.

    Attributes:
        counted: the shapes that ran under the counter, and what they cost.
    """

    def __init__(self) -> None:
        self.counted: dict[tuple[int, int], Flops] = {}

    @contextmanager
    def batch(self, model: nn.Module, inputs: Any) -> Iterator[list[Flops]]:
        """Around one micro-batch's forward and backward; the list holds its cost when that has ended."""
        shape, cost = _shape(inputs), []
        if shape in self.counted or len(self.counted) >= SHAPES:
            yield cost
            cost.append(self.cost(shape))
            return
        forward = 0
        with counter() as counted:

            def after_forward(*_: Any) -> None:
                nonlocal forward
                forward = int(counted.get_total_flops())

            hook = model.register_forward_hook(after_forward)
            try:
                yield cost
            finally:
                hook.remove()
        # The paper charges a backward pass as two forwards.
        cost.append(Flops(3 * forward, int(counted.get_total_flops())))
        self.counted[shape] = cost[0]

    def cost(self, shape: tuple[int, int]) -> Flops:
        """Of a batch of (rows, length): as counted, or off the fit through what was counted."""
        if shape in self.counted:
            return self.counted[shape]
        features = torch.tensor([_features(*s) for s in self.counted], dtype=torch.float64)
        costs = torch.tensor([list(c) for c in self.counted.values()], dtype=torch.float64)
        scale = features.amax(0)
        fit = torch.linalg.lstsq(features / scale, costs, driver="gelsd").solution
        paper, measured = (torch.tensor(_features(*shape), dtype=torch.float64) / scale) @ fit
        return Flops(max(0, round(float(paper))), max(0, round(float(measured))))


def _features(rows: int, length: int) -> tuple[int, int, int]:
    return rows, rows * length, rows * length * length


def _shape(inputs: Any) -> tuple[int, int]:
    """Rows and length of a batch: of ``input_ids``, else of its first tensor of two or more dimensions."""
    tensors = [inputs]
    if isinstance(inputs, Mapping):
        tensors = [inputs["input_ids"]] if "input_ids" in inputs else list(inputs.values())
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2:
            return tensor.shape[0], tensor.numel() // max(1, tensor.shape[0])
    return next((len(t), 1) for t in [*tensors, ()] if hasattr(t, "__len__"))
