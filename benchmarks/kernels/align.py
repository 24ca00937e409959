"""Alignment of a whole adapter set: ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W.

Four ways to do it, each in the precision that comes naturally to it:

    ours           ops.align_(table, grads, out), the C++ ops: one pass, sums in float64
    foreach        torch._foreach_sub, _foreach_mul and a sum of each, _foreach_norm twice, _foreach_copy_
    flat           what one would write: weights and gradients put together by torch.cat, torch.dot three
                   times, and a copy into a flat best
    loop           subtraction, three times torch.dot and a copy, tensor by tensor

on the LoRA tensors of Pythia-1.4B (r = 8, query_key_value) and Llama-3-8B (r = 64, q, k, v, o), float32, one
thread, warm and cold: see rounds.py. The first call sees a difference, and there all must agree; in
the timed calls d is zero, which takes as long.

    python -m benchmarks.kernels.align --out benchmarks/results     measures, and writes align_cpu_<date>.json

Ends with 1 where ours takes more of foreach's time than its target.
Bytes moved by `ours`: read W, g and best, write best, 16 bytes per element. The JSON also has, under
"look_at_gradients_us", how long the host looks at the gradients, where they lie as in the call before ("old")
and where all have other addresses ("new").
"""

from __future__ import annotations

import math
import sys
from statistics import median
from typing import Any

import torch

from benchmarks.kernels.rounds import Ways, main, shares_of_time
from benchmarks.kernels.sets import LLAMA, PYTHIA, Shapes, random_tensors
from benchmarks.timing import seconds_of
from ffkernels import ops

# Time of ours over time of foreach, warm, one thread.
TARGETS = {PYTHIA: 0.60, LLAMA: 0.60}


class Way:
    """Weights, gradients, and best a little behind the weights; `sums` are those of the first call."""

    def __init__(self, shapes: Shapes) -> None:
        self.weights, self.grads, changes = (random_tensors(shapes, seed) for seed in range(3))
        self.best = torch._foreach_sub(self.weights, torch._foreach_mul(changes, 1e-2))
        self.sums: torch.Tensor | None = None

    def align(self) -> torch.Tensor:
        raise NotImplementedError

    def __call__(self) -> None:
        sums = self.align()
        if self.sums is None:
            self.sums = sums.double()


class Ours(Way):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.table = ops.TensorTable(self.weights, impl="cpp")
        torch._foreach_copy_(self.table.best, self.best)
        self.best = self.table.best

    def align(self) -> torch.Tensor:
        return ops.align_(self.table, self.grads)


class Foreach(Way):
    def align(self) -> torch.Tensor:
        d = torch._foreach_sub(self.weights, self.best)
        dot = torch.stack([product.sum() for product in torch._foreach_mul(d, self.grads)]).sum()
        squares = [torch.stack(torch._foreach_norm(side)).square().sum() for side in (self.grads, d)]
        torch._foreach_copy_(self.best, self.weights)
        return torch.stack([dot, *squares])


class Flat(Way):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.flat = torch.cat([best.reshape(-1) for best in self.best])
        views = self.flat.split([best.numel() for best in self.best])
        self.best = [view.view(shape) for view, shape in zip(views, shapes, strict=True)]

    def align(self) -> torch.Tensor:
        weights = torch.cat([weight.reshape(-1) for weight in self.weights])
        g = torch.cat([grad.reshape(-1) for grad in self.grads])
        d = weights - self.flat
        self.flat.copy_(weights)
        return torch.stack([torch.dot(g, d), torch.dot(g, g), torch.dot(d, d)])


class Loop(Way):
    def align(self) -> torch.Tensor:
        sums = torch.zeros(3)
        for weight, grad, best in zip(self.weights, self.grads, self.best, strict=True):
            d, g = (weight - best).reshape(-1), grad.reshape(-1)
            sums += torch.stack([torch.dot(g, d), torch.dot(g, g), torch.dot(d, d)])
            best.copy_(weight)
        return sums


WAYS: Ways = {"ours": Ours, "foreach": Foreach, "flat": Flat, "loop": Loop}


def check_agreement(ways: dict) -> None:
    """The same sums, up to what is left of 54 million float32 in `flat`: 0.3 %; and best is W."""
    ours = ways["ours"].sums
    gg, dd = ours[1].item(), ours[2].item()
    bounds = 5e-3 * torch.tensor([math.sqrt(gg * dd), gg, dd], dtype=torch.float64)
    for name, way in ways.items():
        right = bool(((way.sums - ours).abs() <= bounds).all())
        if not right or not all(torch.equal(b, w) for b, w in zip(way.best, way.weights, strict=True)):
            raise RuntimeError(f"{name} and ours do not agree, so there is nothing to compare")


def look_at_gradients(shapes: Shapes) -> dict:
    """Median microseconds of looking at the gradients: at their old addresses, and at new ones."""
    way = Ours(shapes)
    way()
    find, others = way.table.plan.gradients.find, [grad.clone() for grad in way.grads]
    found: dict[str, list[float]] = {"old": [], "new": []}
    for _ in range(51):
        for grads in (way.grads, others):
            for name in ("new", "old"):
                found[name].append(seconds_of(lambda grads=grads: find(None, way.weights, grads)))
    return {"look_at_gradients_us": {name: median(times) * 1e6 for name, times in found.items()}}


def table(results: dict[str, Any]) -> str:
    """For the documentation."""
    head = ["adapter set", "warm: `_foreach_*`", "flattened, `torch.dot`", "per-tensor loop"]
    head += ["cold: `_foreach_*`", "flattened", "loop"]
    return shares_of_time(results, "align_cpu", head, ["foreach", "flat", "loop"])


if __name__ == "__main__":
    sys.exit(main("kernels.align", __doc__, WAYS, check_agreement, TARGETS, look_at_gradients))
