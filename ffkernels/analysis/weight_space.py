"""Weights, updates and gradients as vectors: what they are to each other, and the loss on a plane among them.

W, g, Δ     all trainable tensors, one after the other: (P,) of float32 on their device, 4·P bytes each
⟨x, y⟩      accumulated in float64, a slice at a time: no second copy of the vectors

u = (B − A) / ‖B − A‖        v = the part of C − A orthogonal to u, / ‖·‖        Gram and Schmidt, float64
W(x, y) = A + x·u + y·v      W lies at (⟨W − A, u⟩, ⟨W − A, v⟩); rounded once, to the weights' own dtype
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels.ops.notices import announce_once
from ffkernels.training.session import Batch, Session
from ffkernels.validation.restore import keep_random_state

_SLICE = 1 << 20
# A third point closer to the line than this share of its distance along it is on it: float32 rounding of
# weights is about as large.
ON_A_LINE = 1e-4
# No axis is drawn shorter than this share of the other one.
LEAST_SHARE = 0.6


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


@dataclass(frozen=True)
class Plane:
    """Origin and orthonormal axes, (P,) float64 each; ``v`` is None where there is only a line."""

    origin: Tensor
    u: Tensor
    v: Tensor | None

    def weights(self, x: float, y: float = 0.0) -> Tensor:
        """W(x, y), (P,) float64."""
        along = self.origin + x * self.u
        return along if self.v is None else along + y * self.v

    def at(self, weights: Tensor) -> tuple[float, float]:
        """Coordinates of the projection of ``weights``, (P,)."""
        moved = weights.double() - self.origin
        return float(moved @ self.u), 0.0 if self.v is None else float(moved @ self.v)


def plane_through(start: Tensor, sgd: Tensor, ff: Tensor) -> Plane:
    """The plane through three points, (P,) each: origin ``start``, first axis towards ``sgd``.

    On a line where they are collinear, or two of them coincide: its axis then points to ``sgd``, or to ``ff``
    where ``sgd`` is ``start``. It is said once.

    Raises:
        ValueError: when all three coincide.
    """
    origin = start.double()
    to_sgd, to_ff = sgd.double() - origin, ff.double() - origin
    if not bool(to_sgd.any()) and not bool(to_ff.any()):
        raise ValueError(
            "start, W_SGD and W_FF are the same weights, so there is no plane: the runs did not move; "
            "train for more steps, or with a higher lr"
        )
    if not bool(to_sgd.any()):
        u, why = to_ff / to_ff.norm(), "W_SGD is where training started"
    else:
        u, across = to_sgd / to_sgd.norm(), to_ff
        for _ in range(2):  # once more: what rounding left of u in it
            across = across - (across @ u) * u
        if float(across.norm()) > ON_A_LINE * float(to_ff.norm()):
            return Plane(origin, u, across / across.norm())
        why = "W_FF lies on the line from the start to W_SGD"
    announce_once(
        f"loss-plane-{why}",
        f"there is a line and no plane: {why}; the loss along it is shown. Another lr, or more steps, give "
        "Fast Forward something to do",
    )
    return Plane(origin, u, None)


def losses_at(vectors: Iterable[Tensor], trainable: Sequence[Tensor], loss: Callable[[], Any]) -> list[float]:
    """``loss()`` with each of ``vectors``, (P,), written into ``trainable``.

    Then they have their old weights again, bit for bit, also after an exception.
    """
    before, losses = [w.detach().clone() for w in trainable], []

    @torch.no_grad()
    def write(parts: Iterable[Tensor]) -> None:
        for weight, part in zip(trainable, parts, strict=True):
            weight.copy_(part.view_as(weight))

    try:
        for vector in vectors:
            write(vector.split([w.numel() for w in trainable]))
            losses.append(float(loss()))
    finally:
        write(before)
    return losses


def spans(points: Sequence[tuple[float, float]], grid: int, margin: float) -> list[list[float]]:
    """``grid`` coordinates along x and along y, reaching ``margin`` times the points' extent beyond them."""
    ends = [(min(values), max(values)) for values in zip(*points, strict=True)]
    halves = [(high - low) * (0.5 + margin) for low, high in ends]
    halves = [max(half, LEAST_SHARE * max(halves)) for half in halves]
    steps = [2 * i / (grid - 1) - 1 for i in range(grid)]
    middles = [(low + high) / 2 for low, high in ends]
    return [[middle + half * step for step in steps] for middle, half in zip(middles, halves, strict=True)]
