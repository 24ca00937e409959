"""A plane in weight space through three points, and the loss of a model on it.

    u = (B − A) / ‖B − A‖        v = the part of C − A orthogonal to u, / ‖·‖        Gram and Schmidt, float64
    W(x, y) = A + x·u + y·v      W lies at (⟨W − A, u⟩, ⟨W − A, v⟩)

A weight vector is all trainable tensors, one after the other, (P,). W(x, y) is rounded once, to the weights'
own dtype. Where A, B and C lie on a line, it is the loss along that line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffkernels.ops.notices import announce_once

__all__ = ["Plane", "losses_on", "plane_through", "spans", "weights_put_back"]

# A third point closer to the line than this share of its distance along it is on it: float32 rounding of
# weights is about as large.
ON_A_LINE = 1e-4
# No axis is drawn shorter than this share of the other one.
LEAST_SHARE = 0.6


@dataclass(frozen=True)
class Plane:
    """Origin and orthonormal axes, (P,) float64 each; ``v`` is None where there is only a line.

    ``weights(x, y)`` are a point's weights and ``at(W)`` its projection's coordinates.
    """

    origin: Tensor
    u: Tensor
    v: Tensor | None

    def weights(self, x: float, y: float = 0.0) -> Tensor:
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
    origin, to_sgd, to_ff = start.double(), sgd.double() - start.double(), ff.double() - start.double()
    if not bool(to_sgd.any()):
        if not bool(to_ff.any()):
            raise ValueError(
                "start, W_SGD and W_FF are the same weights, so there is no plane: the runs did not move; "
                "train for more steps, or with a higher lr"
            )
        _announce_line("W_SGD is where training started")
        return Plane(origin, to_ff / to_ff.norm(), None)
    u = to_sgd / to_sgd.norm()
    across = to_ff
    for _ in range(2):  # once more: what rounding left of u in it
        across = across - (across @ u) * u
    if float(across.norm()) <= ON_A_LINE * float(to_ff.norm()):
        _announce_line("W_FF lies on the line from the start to W_SGD")
        return Plane(origin, u, None)
    return Plane(origin, u, across / across.norm())


def _announce_line(why: str) -> None:
    announce_once(
        f"loss-plane-{why}",
        f"there is a line and no plane: {why}; the loss along it is shown. Another lr, or more steps, give "
        "Fast Forward something to do",
    )


@contextmanager
def weights_put_back(trainable: Sequence[Tensor]) -> Iterator[Callable[[Tensor], None]]:
    """Gives a function that writes one vector (P,) into ``trainable``; leaving puts the old weights back.

    Bit for bit, also after an exception.
    """
    before = [w.detach().clone() for w in trainable]

    def write(vector: Tensor) -> None:
        parts = vector.split([w.numel() for w in trainable])
        with torch.no_grad():
            for weight, part in zip(trainable, parts, strict=True):
                weight.copy_(part.view_as(weight))

    try:
        yield write
    finally:
        with torch.no_grad():
            for weight, old in zip(trainable, before, strict=True):
                weight.copy_(old)


def losses_on(
    plane: Plane,
    xs: Sequence[float],
    ys: Sequence[float],
    trainable: Sequence[Tensor],
    loss: Callable[[], Any],
) -> list[list[float]]:
    """``loss()`` with ``trainable`` at every W(x, y): row per y, column per x. The weights are put back."""
    with weights_put_back(trainable) as write:
        rows = []
        for y in ys:
            row = []
            for x in xs:
                write(plane.weights(x, y))
                row.append(float(loss()))
            rows.append(row)
    return rows


def spans(points: Sequence[tuple[float, float]], grid: int, margin: float) -> tuple[list[float], list[float]]:
    """``grid`` coordinates along x and along y, reaching ``margin`` times the points' extent beyond them."""
    middles, halves = [], []
    for values in zip(*points, strict=True):
        middles.append((min(values) + max(values)) / 2)
        halves.append((max(values) - min(values)) * (0.5 + margin))
    halves = [max(half, LEAST_SHARE * max(halves)) for half in halves]
    steps = [2 * i / (grid - 1) - 1 for i in range(grid)]
    xs, ys = ([middle + half * step for step in steps] for middle, half in zip(middles, halves, strict=True))
    return xs, ys
