"""What an analysis looks at between the parts of a training step: gradient and weights as one vector each.

    W, g, Δ    all trainable tensors, one after the other: (P,) of float32 on their device, 4·P bytes each
    ⟨x, y⟩     accumulated in float64, a slice at a time: no second copy of the vectors

An adapter is small, so a few hundred such vectors are: 98 kB each for the embedded model at rank 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels.engine.fast_forward import FastForward
from ffkernels.training.session import Batch, Session
from ffkernels.validation.restore import keep_random_state

__all__ = [
    "cosine",
    "cosines",
    "flat",
    "flat_gradient",
    "gradients_of",
    "inner_products",
    "waiting_stages",
]

_SLICE = 1 << 20


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """A float32 copy of all tensors as one vector (P,); it shares no memory with them."""
    return torch.cat([t.detach().to(torch.float32, copy=True).reshape(-1) for t in tensors])


def flat_gradient(weights: Iterable[nn.Parameter]) -> Tensor:
    """The gradients in ``.grad`` as one vector (P,); zeros where a weight has none."""
    return flat(w.grad if w.grad is not None else torch.zeros_like(w) for w in weights)


def gradients_of(session: Session, batches: Sequence[Batch]) -> Tensor:
    """The gradient of each batch's loss at the present weights, (batches, P).

    They leave no trace in the run: ``.grad`` is empty before and after, and what dropout draws, anew for
    each batch, is put back.
    """
    size = sum(w.numel() for w in session.trainable)
    gradients = torch.empty(len(batches), size, device=session.device)
    with keep_random_state(session.device):
        for row, batch in zip(gradients, batches, strict=True):
            session.backward(batch)
            row.copy_(flat_gradient(session.trainable))
            session.optimizer.zero_grad(set_to_none=True)
    return gradients


def inner_products(rows: Tensor, vectors: Tensor) -> Tensor:
    """⟨row, vector⟩ of every row with every vector, in float64: (n, P) and (m, P) give (n, m)."""
    products = torch.zeros(len(rows), len(vectors), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], _SLICE):
        part = slice(start, start + _SLICE)
        products += rows[:, part].double() @ vectors[:, part].double().T
    return products


def cosines(rows: Tensor) -> Tensor:
    """The cosine of every row with every other, (n, P) to (n, n) in float64; NaN where a row is zero."""
    products = inner_products(rows, rows)
    norms = products.diagonal().sqrt()
    return (products / (norms[:, None] * norms[None, :])).clamp(-1.0, 1.0)


def cosine(x: Tensor, y: Tensor) -> float:
    """The cosine of two vectors, (P,) each; NaN where one is zero."""
    return float(cosines(torch.stack([x, y]))[0, 1])


def waiting_stages(session: Session) -> Any:
    """For ``open_session(…, attach=waiting_stages)``: a stage waits for ``session.ff.run_due_stage()``.

    In between the weights are those of the optimizer's step alone. The run is the same, bit for bit, as with
    stages inside ``session.update``, as long as nothing else moves the weights.
    """
    config = session.config.fast_forward
    if config is None:
        return None
    return FastForward(session.model, session.optimizer, session.validation, config, defer=True)
