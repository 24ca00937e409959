"""How a tensor lies in memory: the runs of neighbouring elements that hold it, and which tensors lie alike.

    contiguous, transposed, channels_last    one run, whatever the order of its dimensions
    columns of a wider matrix                one run per row
    x[::2], x.expand(…)                      refused: runs of next to nothing, elements that share memory

Moves and sums go from element to element, so the order in which a run holds them does not matter as long as
all that belongs together has the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of a run below which its row in a plan is larger than what it moves.
SHORTEST = 16


def runs(tensor: Tensor) -> tuple[int, list[int]]:
    """Elements in each run, and how many elements after the tensor's first one each starts, ascending.

    Raises:
        ValueError: with the reason why its memory cannot be moved in runs.
    """
    if tensor.numel() == 0:
        return 0, []
    if tensor.is_contiguous():
        return tensor.numel(), [0]
    length, extent, outer = 1, 1, []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < extent:
            raise ValueError("elements of it share memory, or lie between others of it")
        if not outer and stride == length:
            length *= size
        else:
            outer.append((stride, size))
        extent += (size - 1) * stride
    if outer and length * tensor.element_size() < SHORTEST:
        raise ValueError(f"its memory has a gap after each {length * tensor.element_size()} bytes of it")
    starts = [0]
    for stride, size in outer:
        starts = [place * stride + start for place in range(size) for start in starts]
    return length, starts


def pieces(tensor: Tensor) -> list[Tensor]:
    """Each run as a 1-dim view of its memory."""
    length, starts = runs(tensor)
    first = tensor.storage_offset()
    return [tensor.as_strided((length,), (1,), first + start) for start in starts]


def lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold their elements in one order, with the same gaps."""
    if a.stride() == b.stride() or a.numel() == 0:
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(mine == other for size, mine, other in strides if size > 1)


def empty_alike(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a tensor that lies as this one."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
