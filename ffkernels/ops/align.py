"""Does the last update still help? The sums that say so, and the checkpoint of the weights, in one pass.

    align_(table, grads)        ⟨g,d⟩, ⟨g,g⟩, ⟨d,d⟩ with d = W − best ; best ← W

Arithmetic: d is rounded to float32 (to float64 for float64 weights); products and sums are float64, in a
fixed order: the same call gives the same bits again, on the CPU with any number of threads. The C++ ops and
the torch ops agree bit for bit on the CPU; CUDA and Triton have orders of their own. All are within
2⁻⁴⁶·Σ|terms| of the exact sum of the same terms, for up to 2³¹ elements. Of weights that are spread over
ranks the sums add up.

Gradients move: after `zero_grad(set_to_none=True)` the next ones may lie elsewhere, or be missing. Kernels
find them through a small table of (address, dtype), one row per weight, which is written anew only when an
address has changed; on a GPU it goes there from pinned memory, and nothing waits for the device.

Where a gradient is None, g is zero; NaN and infinities come out as arithmetic has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ffkernels.ops import reference
from ffkernels.ops.moves import Lists, kernels, plan_for
from ffkernels.ops.plan import (
    DTYPE_CODES,
    SEGMENT,
    SUM_BLOCK,
    Group,
    Plan,
    check_dense,
    empty_alike,
    lie_alike,
    names_of,
    same_length,
)
from ffkernels.ops.table import TensorTable

Grads = Sequence[Tensor | None]

_SCHEMA = '(Tensor[] weights, Tensor?[] grads, Tensor(b!)[] best, str impl="auto") -> Tensor'


def _check_gradient(name: str, weight: Tensor, gradient: Tensor) -> None:
    name = f"the gradient of {name}"
    if isinstance(gradient, Tensor) and gradient.layout != torch.strided:
        raise ValueError(
            f"{name} is sparse ({gradient.layout}); only dense gradients are compared with updates: make the"
            " layer with sparse=False"
        )
    check_dense(name, gradient)
    if gradient.dtype not in DTYPE_CODES:
        raise TypeError(f"{name} has dtype {gradient.dtype}; allowed are {names_of(DTYPE_CODES)}")
    if gradient.shape != weight.shape:
        raise ValueError(
            f"{name} is {tuple(gradient.shape)}, the weight {tuple(weight.shape)}; they must match"
        )
    if gradient.device != weight.device:
        raise ValueError(f"{name} is on {gradient.device}, the weight on {weight.device}; they must match")


def _look(weight: Tensor, gradient: Tensor | None) -> tuple | None:
    """Its address and all that a check depends on; last, whether it lies in memory as its weight does."""
    if gradient is None:
        return None
    at, shape = gradient.data_ptr(), gradient.shape
    alike = shape == weight.shape and lie_alike(weight, gradient)
    plain = alike and not gradient.is_neg() and at % gradient.element_size() == 0
    return at, type(gradient), gradient.dtype, shape, gradient.device, plain


def _copy(weight: Tensor, gradient: Tensor) -> Tensor:
    return empty_alike(weight, gradient.dtype).copy_(gradient.detach())


class Gradients:
    """What the alignments of one plan share: the table, scratch memory, and what was seen last.

    Plain torch ops need neither table nor scratch memory, and have none.
    """

    def __init__(self, plan: Plan) -> None:
        self.device, self._for_kernels = plan.device, plan.impl != "torch"
        self._refuse_capture()  # which would only record that the tickets become 0
        self.table = torch.empty(0, 2, dtype=torch.int64, device=self.device)
        self._captured: list[Tensor] = []
        self._seen: list[tuple | None] | None = None
        self._checked: list[tuple] | None = None
        groups = plan.groups if self._for_kernels else []
        rows = max((len(group.rows) for group in groups), default=0)
        segments = -(-rows // SEGMENT)
        sums = rows + segments
        if self.device.type == "cpu":
            sums = max([sums, *map(_blocks, groups)])
        # Three for each block of the CPU, or for each program of a GPU and each segment of them.
        self.scratch = torch.empty(3 * sums, dtype=torch.float64, device=self.device)
        # How many segments have ended, and how many programs of each; the last one puts it back to 0.
        self.tickets = torch.zeros(segments + 1, dtype=torch.int32, device=self.device)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.table, self.scratch, self.tickets

    def find(
        self, names: Sequence[str] | None, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients, checked and lying in memory as the weights do, with their addresses in `table`.

        They must be kept until the kernel that reads them has been launched.
        """
        if isinstance(gradients, Tensor):  # it would be taken for the list of its rows
            raise TypeError(
                "grads is a single tensor; pass a list with one gradient, or None, for each weight"
            )
        gradients = list(gradients)
        if len(gradients) != len(weights):
            raise ValueError(
                f"grads has {len(gradients)} entries for {len(weights)} weights; give one for each, None"
                " where there is no gradient"
            )
        try:
            looks = list(map(_look, weights, gradients))
        except (AttributeError, RuntimeError, NotImplementedError):
            looks = [()] * len(gradients)  # something that is no plain tensor: the checks say what
        if looks != self._seen:
            self._seen = None
            self._check(names, weights, gradients, looks)
            plain = [g is None or (look and look[-1]) for g, look in zip(gradients, looks, strict=True)]
            copied = zip(weights, gradients, plain, strict=True)
            gradients = [gradient if ok else _copy(weight, gradient) for weight, gradient, ok in copied]
            if self._for_kernels:
                self._write(gradients)
            self._seen = looks if all(plain) else None  # a copy lies elsewhere each time
        if self.device.type == "cuda" and self._for_kernels:
            if torch.cuda.is_current_stream_capturing():
                self._captured.append(self.table)
            else:
                self.table.record_stream(torch.cuda.current_stream(self.device))
        return gradients

    def _check(self, names, weights, gradients, looks) -> None:
        """Where only the address is new, there is nothing to check."""
        if self._checked is None:
            self._checked = [()] * len(weights)
        for i, (gradient, look) in enumerate(zip(gradients, looks, strict=True)):
            if gradient is not None and (not look or look[1:] != self._checked[i]):
                _check_gradient(names[i] if names is not None else f"weights[{i}]", weights[i], gradient)
                self._checked[i] = look[1:]

    def _refuse_capture(self) -> None:
        on_gpu = self._for_kernels and self.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "gradients lie elsewhere than in the call before, or there was none, while a CUDA graph is"
                " being captured, which needs a copy that a graph cannot hold; call once with these gradients"
                " before the capture, and keep them there: with the weights' strides, and"
                " zero_grad(set_to_none=False)"
            )

    def _write(self, gradients: list[Tensor | None]) -> None:
        self._refuse_capture()
        entries = [(0, 0) if g is None else (g.data_ptr(), DTYPE_CODES[g.dtype]) for g in gradients]
        pinned = self.device.type == "cuda"
        table = torch.tensor(entries, dtype=torch.int64, device="cpu", pin_memory=pinned)
        # New memory each time: a kernel that was launched before may still have to read the old table.
        self.table = table.view(len(entries), 2).to(self.device, non_blocking=True)


def _blocks(group: Group) -> int:
    """Blocks that the CPU adds up: those before the last row, and the last row's."""
    if not len(group.rows):
        return 0
    return int(group.places[-1, 2]) - int(-group.rows[-1, 3] // SUM_BLOCK)


def _align(on: TensorTable | Lists, grads: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
    on.check_addresses()
    plan = on.plan
    if plan.gradients is None:
        plan.gradients = Gradients(plan)
    found = plan.gradients.find(on.names, on.weights, grads)
    out = _sums(plan.device, out)
    if not plan.groups:
        return out.zero_()
    if plan.impl == "torch":
        reference.align_(on.weights, found, on.best, out)
    else:
        kernels(plan.impl).align_(plan, out)
        increment_version(on.best_flats)
        increment_version(out)
    return out


def _sums(device: torch.device, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(3, dtype=torch.float64, device=device)
    if (out.shape, out.dtype, out.device) != ((3,), torch.float64, device) or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; it must be (3,) torch.float64 on"
            f" {device}, contiguous"
        )
    return out


def _align_lists(weights, grads, best, out: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    plan = plan_for(weights, None, best, impl, tuple(DTYPE_CODES))
    return _align(Lists(plan, weights, None, best), grads, out)


@torch.library.custom_op("ffkernels::align_", mutates_args=("best",), schema=_SCHEMA)
def _operator(
    weights: Sequence[Tensor], grads: Sequence[Tensor | None], best: Sequence[Tensor], impl: str = "auto"
) -> Tensor:
    return _align_lists(weights, grads, best, impl=impl)


@_operator.register_fake
def _(weights, grads, best, impl="auto") -> Tensor:
    same_length(weights, grads=grads, best=best)
    return torch.empty(3, dtype=torch.float64, device=weights[0].device if len(weights) else "cpu")


@torch.no_grad()
def _traced(weights, grads, best, out: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    sums = _operator(weights, grads, best, impl)
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
    form = _align if isinstance(weights, TensorTable) else _align_lists
    return form(weights, grads, *args, **kwargs)
