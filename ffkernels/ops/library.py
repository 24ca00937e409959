"""The weight moves as operators that torch.compile, export and opcheck know.

Calling through the dispatcher costs more than a small set takes to move, so eager code never comes here:
`ffkernels.ops.step_` and its siblings turn to these operators only while something traces them. The schemas
say which lists are written; only an alignment returns something.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffkernels.ops import moves

_CHECKPOINT = '(Tensor[] weights, Tensor(b!)[] best, str impl="auto") -> ()'
_DELTA = '(Tensor[] weights, Tensor(a!)[] deltas, Tensor(b!)[] best, str impl="auto") -> ()'
_STEP = (
    "(Tensor(a!)[] weights, Tensor[] deltas, Tensor(b!)[] best, Tensor accept, Tensor k,"
    ' str impl="auto") -> ()'
)

_ALIGN = '(Tensor[] weights, Tensor?[] grads, Tensor(b!)[] best, str impl="auto") -> Tensor'


@torch.library.custom_op("ffkernels::checkpoint_", mutates_args=("best",), schema=_CHECKPOINT)
def checkpoint_(weights: Sequence[Tensor], best: Sequence[Tensor], impl: str = "auto") -> None:
    moves.checkpoint_lists(weights, best, impl=impl)


@torch.library.custom_op("ffkernels::delta_", mutates_args=("deltas", "best"), schema=_DELTA)
def delta_(
    weights: Sequence[Tensor], deltas: Sequence[Tensor], best: Sequence[Tensor], impl: str = "auto"
) -> None:
    moves.delta_lists(weights, deltas, best, impl=impl)


@torch.library.custom_op("ffkernels::step_", mutates_args=("weights", "best"), schema=_STEP)
def step_(
    weights: Sequence[Tensor],
    deltas: Sequence[Tensor],
    best: Sequence[Tensor],
    accept: Tensor,
    k: Tensor,
    impl: str = "auto",
) -> None:
    moves.step_lists(weights, deltas, best, accept, k, impl=impl)


@torch.library.custom_op("ffkernels::align_", mutates_args=("best",), schema=_ALIGN)
def align_(
    weights: Sequence[Tensor], grads: Sequence[Tensor | None], best: Sequence[Tensor], impl: str = "auto"
) -> Tensor:
    return moves.align_lists(weights, grads, best, impl=impl)


@checkpoint_.register_fake
def _(weights, best, impl="auto") -> None:
    _same_length(weights, best=best)


@delta_.register_fake
def _(weights, deltas, best, impl="auto") -> None:
    _same_length(weights, deltas=deltas, best=best)


@step_.register_fake
def _(weights, deltas, best, accept, k, impl="auto") -> None:
    _same_length(weights, deltas=deltas, best=best)
    for name, scalar in (("accept", accept), ("k", k)):
        if scalar.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(scalar.shape)}; give a tensor of one element")


@align_.register_fake
def _(weights, grads, best, impl="auto") -> Tensor:
    _same_length(weights, grads=grads, best=best)
    return torch.empty(3, dtype=torch.float64, device=weights[0].device if len(weights) else "cpu")


def _same_length(weights: Sequence[Tensor], **twins: Sequence[Tensor]) -> None:
    for label, tensors in twins.items():
        if len(tensors) != len(weights):
            raise ValueError(
                f"{label} has {len(tensors)} tensors for {len(weights)} weights; give one for each"
            )


def traced_scalar(
    value: bool | int | float | Tensor, dtype: torch.dtype, weights: Sequence[Tensor]
) -> Tensor:
    """A scalar of a traced call as a tensor beside the weights, where a compiled graph can keep it."""
    if isinstance(value, Tensor):
        return value
    return torch.full((1,), value, dtype=dtype, device=weights[0].device if len(weights) else "cpu")
