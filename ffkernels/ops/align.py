"""Does the last update still help? The sums that say so, and the checkpoint of the weights, in one pass.

    align_(table, grads)        ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W

With best = W before the last optimizer step and g = the gradient that the next one is about to use, −⟨g,d⟩
is, to first order, by how much repeating the last update would lower the loss, and ⟨g,d⟩ / √(⟨g,g⟩·⟨d,d⟩) the
cosine between the two. Of weights that are spread over ranks the sums add up.

Arithmetic: d is rounded to float32 (to float64 for float64 weights); products and sums are float64. The
product of two float32 is exact there: gradients of any scale can be squared, and only the additions round.
Their order is fixed, so the same call gives the same bits again, on the CPU with any number of threads. The
C++ ops and the torch ops agree bit for bit on the CPU; CUDA and Triton have orders of their own. All are
within 2⁻⁴⁶·Σ|terms| of the exact sum of the same terms, for up to 2³¹ elements.

Where a gradient is None, g is zero; NaN and infinities come out as arithmetic has them.
Bytes moved, N being those of the weights: reads 2N and the gradients, writes N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ffkernels.ops import moves
from ffkernels.ops.table import TensorTable

Grads = Sequence[Tensor | None]


@torch.no_grad()
def _traced(weights, grads, best, out: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    sums = moves.align_(weights, grads, best, impl)
    return sums if out is None else out.copy_(sums)


@overload
def align_(table: TensorTable, grads: Grads, out: Tensor | None = None) -> Tensor: ...
@overload
def align_(
    weights: Sequence[Tensor],
    grads: Grads,
    best: Sequence[Tensor],
    out: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor: ...
def align_(weights, grads, *args, **kwargs):
    """⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W

    `grads` has one dense gradient for each weight, of its shape and on its device, in float32, bfloat16,
    float16 or float64 whatever the weight's dtype, or None. They may lie elsewhere in every call. One that
    does not have its weight's strides costs a copy.

    Returns float64 (3,) on the weights' device, `out` where that is given; nothing waits for a GPU.

    Raises:
        ValueError, TypeError: for a gradient that is sparse, of another shape, on another device, or no
            gradient, with the weight's name, before anything is written.
    """
    if torch.compiler.is_compiling():
        if isinstance(weights, TensorTable):
            table = weights
            return _traced(table.weights, grads, table.best, *args, impl=table.impl, **kwargs)
        return _traced(weights, grads, *args, **kwargs)
    form = moves.align_table if isinstance(weights, TensorTable) else moves.align_lists
    return form(weights, grads, *args, **kwargs)
