"""A fixed set of weights with room for Δ and best, ready to be moved in one call.

Δ and best lie in flat arenas, one per dtype, in which each tensor starts on a 128-byte boundary and lies as
its weight does: a chunk's alignment is then decided by its weight alone (`plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ffkernels.ops.dispatch import choose
from ffkernels.ops.plan import (
    ALIGNMENT,
    GPU_CHUNK,
    check_same_device,
    check_tensor,
    lie_alike,
    make_plan,
    runs,
)


def _look(weights: Iterable[Tensor]) -> list[tuple]:
    return [(w.data_ptr(), w.shape, w.dtype, w.stride()) for w in weights]


def _named(weights: Any, names: Sequence[str] | None) -> tuple[list[str], list[Tensor]]:
    if isinstance(weights, Tensor):
        raise TypeError(
            "weights is a single tensor; pass a list of tensors, a mapping or (name, tensor) pairs"
        )
    entries = list(weights.items()) if isinstance(weights, Mapping) else list(weights)
    if entries and all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries):
        own, tensors = [str(name) for name, _ in entries], [tensor for _, tensor in entries]
    else:
        own, tensors = [f"weights[{i}]" for i in range(len(entries))], entries
    if names is None:
        return own, tensors
    names = [str(name) for name in names]
    if len(names) != len(tensors):
        raise ValueError(f"names has {len(names)} entries for {len(tensors)} weights; give one for each")
    return names, tensors


def _arena(weights: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Zeroed memory for twins of `weights`: (flat tensors, one per dtype; views, one per weight)."""
    views: list[Tensor | None] = [None] * len(weights)
    flats = []
    for dtype in dict.fromkeys(weight.dtype for weight in weights):
        step = ALIGNMENT // dtype.itemsize
        starts, end = {}, 0
        for i, weight in enumerate(weights):
            if weight.dtype == dtype:
                starts[i] = end
                length, within = runs(weight)
                end += -(-(within[-1] + length) // step) * step if within else 0
        # Room to start on a boundary even where the allocator promises less than ALIGNMENT.
        memory = torch.zeros(end + step, dtype=dtype, device=device)
        skip = (-memory.data_ptr() % ALIGNMENT) // dtype.itemsize
        flats.append(memory)
        for i, start in starts.items():
            views[i] = memory.as_strided(weights[i].shape, weights[i].stride(), skip + start)
    return flats, views  # type: ignore[return-value]


class TensorTable:
    """A fixed set of weights with room for Δ and best, ready to be moved in one call.

    `weights` is a sequence of tensors, a mapping from name to tensor, or (name, tensor) pairs such as
    `model.named_parameters()`. The tensors are kept by reference and moved in place. A new table holds best
    = W and Δ = 0. `impl` is "auto", "cuda", "triton", "cpp" or "torch".
    """

    def __init__(self, weights: Any, *, names: Sequence[str] | None = None, impl: str = "auto") -> None:
        self.names, self.weights = _named(weights, names)
        for name, weight in zip(self.names, self.weights, strict=True):
            check_tensor(name, weight)
        self.device = check_same_device(list(zip(self.names, self.weights, strict=True)))
        self.impl = choose(impl, self.device)
        # Arenas made under inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.delta_flats, self.deltas = _arena(self.weights, self.device)
            self.best_flats, self.best = _arena(self.weights, self.device)
            self._lay_out(self.weights)
            if self.weights:
                torch._foreach_copy_(self.best, self.weights)

    def _lay_out(self, weights: Sequence[Tensor]) -> None:
        chunk = GPU_CHUNK if self.impl == "triton" else None
        plan = make_plan(weights, self.deltas, self.best, self.names, chunk=chunk)
        plan.impl = self.impl
        self.weights, self.plan = weights, plan
        self._identity = _look(self.weights)
        self._addresses = [weight.data_ptr() for weight in self.weights]

    def follow(self, weights: Sequence[Tensor] | None = None) -> bool:
        """Go on with the same weights where they lie now; Δ and best keep their values.

        Args:
            weights: in the table's order, where they are other tensors.

        Returns:
            False, and nothing is changed, where shapes, strides, dtypes or devices are not those of before,
            or weights share memory now.
        """
        weights = self.weights if weights is None else list(weights)
        if [(w.shape, w.dtype, w.device) for w in weights] != [
            (b.shape, b.dtype, b.device) for b in self.best
        ] or not all(map(lie_alike, weights, self.best)):
            return False
        try:
            with torch.inference_mode(False):
                self._lay_out(weights)
        except ValueError:
            return False
        return True

    @property
    def numel(self) -> int:
        """Elements over all weights."""
        return self.plan.numel

    @property
    def nbytes(self) -> int:
        """Bytes the table itself holds: Δ and best."""
        return sum(flat.nbytes for flat in (*self.delta_flats, *self.best_flats))

    def is_stale(self, weights: Iterable[Tensor] | None = None) -> bool:
        """Whether any weight has moved, or changed its shape or dtype, since the table was made.

        Args:
            weights: in the table's order, where they may be other tensors than it has.
        """
        return _look(self.weights if weights is None else weights) != self._identity

    def check_addresses(self) -> None:
        """Refuse to write through addresses that a weight has left."""
        now = list(map(Tensor.data_ptr, self.weights))
        if now != self._addresses:
            at = next(i for i, (new, old) in enumerate(zip(now, self._addresses, strict=True)) if new != old)
            raise RuntimeError(
                f"{self.names[at]} has moved in memory since the table was made (by `.to()`, `.data =` or"
                " `load_state_dict(assign=True)`); make a new TensorTable"
            )

    def __repr__(self) -> str:
        size = f"{len(self.weights)} tensors, {self.numel} elements"
        return f"TensorTable({size}, {self.device}, impl={self.impl!r})"
