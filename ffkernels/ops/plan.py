"""Where every tensor of a weight move lies: one int64 row per chunk.

A row holds the addresses of one chunk in W, Δ and best and its element count; a group holds the rows of one
storage dtype. Kernels walk rows, so one call moves any number of tensors of any sizes. Beside each row stands
its place, for what has addresses of its own that change: gradients. Chunks are cut from the runs of
neighbouring elements that hold a tensor, so the order of its dimensions does not show in them:

    contiguous, transposed, channels_last    one run, whatever the order of its dimensions
    columns of a wider matrix                one run per row
    x[::2], x.expand(…)                      refused: runs of next to nothing, elements that share memory

Moves and sums go from element to element: all that belongs together must hold its elements in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# As the kernels number them. Only an alignment computes in float64, the moves do not.
DTYPE_CODES = {dtype: code for code, dtype in enumerate((*DTYPES, torch.float64))}
ALIGNMENT = 128
# Elements per chunk, a multiple of every vector width. On the CPU a chunk is a unit of thread scheduling; on
# a GPU it is one program: small enough that a set of a few megabytes still fills every multiprocessor.
CPU_CHUNK = 32768
GPU_CHUNK = 2048
# Elements that the CPU adds up by themselves in an alignment.
SUM_BLOCK = 1024
# Rows whose sums a GPU adds up together, by the program that is the last of them to end.
SEGMENT = 128


@dataclass(frozen=True)
class Group:
    """All chunks of one dtype: `rows` is an int64 tensor [chunks, 4] of (W, Δ, best, elements).

    The rows are on the plan's device: one launch over them moves the whole group. Rows of misaligned tensors
    stand among the others; a kernel tests the addresses of its row and takes the wide or the narrow path.
    `places`, int64 [chunks, 3], says of each row which of the plan's tensors it is of, at which of that
    tensor's elements it starts, in the order of its memory, and which of the group's blocks of `SUM_BLOCK`
    elements is its first.
    """

    dtype: torch.dtype
    rows: Tensor
    places: Tensor


@dataclass
class Plan:
    """The checked layout of one set of tensors. Holds addresses, never the tensors themselves."""

    device: torch.device
    numel: int
    groups: list[Group]
    impl: str = "torch"
    native: Any = field(default=None, repr=False)  # the groups in the form a loaded backend wants
    gradients: Any = field(default=None, repr=False)  # of align.Gradients, once there was an alignment
    constants: dict[tuple, Tensor] = field(default_factory=dict, repr=False)  # of moves.as_tensor
    streams: set = field(default_factory=set, repr=False)  # CUDA streams that a kept plan was used on


def _cut(numels: Sequence[int], chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes of tensors; of each of their chunks: the tensor's index and the element that it starts at."""
    # Put together on the host, whatever device is the default.
    sizes = torch.tensor(numels, dtype=torch.int64, device="cpu")
    chunks = (sizes + chunk - 1) // chunk
    tensor = torch.repeat_interleave(chunks)
    first = torch.cumsum(chunks, 0) - chunks
    start = (torch.arange(len(tensor), device="cpu") - first[tensor]) * chunk
    return sizes, tensor, start


def chunk_rows(
    weights: Sequence[int],
    deltas: Sequence[int],
    best: Sequence[int],
    numels: Sequence[int],
    itemsize: int,
    chunk: int,
) -> Tensor:
    """Cut tensors, given by addresses and sizes, into rows. A missing side has address 0 and keeps it."""
    sizes, tensor, start = _cut(numels, chunk)
    columns = []
    for addresses in (weights, deltas, best):
        base = torch.tensor(addresses, dtype=torch.int64, device="cpu")[tensor]
        columns.append(torch.where(base == 0, 0, base + start * itemsize))
    columns.append((sizes[tensor] - start).clamp(max=chunk))
    return torch.stack(columns, 1).contiguous()


def chunk_places(members: Sequence[int], starts: Sequence[int], numels: Sequence[int], chunk: int) -> Tensor:
    """The places of the same rows; `members` are the tensors' indices in the plan, `starts` where in them."""
    sizes, tensor, start = _cut(numels, chunk)
    blocks = (sizes + SUM_BLOCK - 1) // SUM_BLOCK
    first = (torch.cumsum(blocks, 0) - blocks)[tensor]
    of_plan, within = (torch.tensor(x, dtype=torch.int64, device="cpu")[tensor] for x in (members, starts))
    return torch.stack([of_plan, within + start, first + start // SUM_BLOCK], 1).contiguous()


def check_dense(name: str, tensor: Any) -> None:
    """Refuse what is no plain tensor with memory of its own."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; only torch tensors can be moved")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, which has no one memory of its own; pass its plain tensor"
            " (for a DTensor: its local shard, `.to_local()`)"
        )
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"{name} has layout {tensor.layout} on {tensor.device}; only dense tensors with memory are moved"
        )


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, tensor: Any, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    check_dense(name, tensor)
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; allowed are {names_of(dtypes)}. The arithmetic is float32,"
            " which would take from wider types what they are chosen for: convert the tensor or leave it out"
        )
    if tensor.is_neg():
        raise ValueError(
            f"{name} is a view whose memory holds the negative of its values (such as `.conj().imag`); pass"
            " `.resolve_neg()` of it"
        )
    try:
        runs(tensor)
    except ValueError as reason:
        raise ValueError(
            f"{name} is not contiguous (shape {tuple(tensor.shape)}, strides {tensor.stride()}): {reason};"
            " make the parameter from a `.contiguous()` tensor"
        ) from None
    if tensor.numel() and tensor.data_ptr() % tensor.element_size():
        raise ValueError(
            f"{name} does not start on a multiple of its element size ({tensor.element_size()} bytes);"
            " copy it with `.clone()`"
        )


def _check_overlap(named: Iterable[tuple[str, Tensor]]) -> None:
    spans = []
    for name, tensor in named:
        length, starts = runs(tensor)
        for start in starts:
            at = tensor.data_ptr() + start * tensor.element_size()
            spans.append((at, at + length * tensor.element_size(), name))
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"{name} and {other} share memory, so one move would be applied twice; pass each memory once"
                " (of tied weights, one)"
            )


def check_same_device(named: Sequence[tuple[str, Tensor]]) -> torch.device:
    if not named:
        return torch.device("cpu")
    first_name, first = named[0]
    for name, tensor in named:
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first_name} on {first.device}; a table has one device:"
                " make one for each"
            )
    return first.device


def _check_twin(name: str, tensor: Tensor, weight_name: str, weight: Tensor) -> None:
    if tensor.shape != weight.shape or tensor.dtype != weight.dtype:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} but {weight_name} is {tuple(weight.shape)}"
            f" {weight.dtype}; they must match"
        )
    if not lie_alike(tensor, weight):
        raise ValueError(
            f"{name} has strides {tensor.stride()} but {weight_name} {weight.stride()}; they must match, as"
            " those of `torch.empty_strided(weight.shape, weight.stride())` do"
        )


def same_length(weights: Sequence[Tensor], **twins: Sequence[Tensor]) -> None:
    for label, tensors in twins.items():
        if len(tensors) != len(weights):
            raise ValueError(
                f"{label} has {len(tensors)} tensors for {len(weights)} weights; give one for each"
            )


def make_plan(
    weights: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
    best: Sequence[Tensor],
    names: Sequence[str] | None = None,
    *,
    chunk: int | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Plan:
    """Check the tensors and lay out their rows, `chunk` elements each (by default what suits the device).

    `deltas` is None for moves that have no Δ; `dtypes` are allowed.
    """
    names = list(names) if names is not None else [f"weights[{i}]" for i in range(len(weights))]
    named = list(zip(names, weights, strict=True))
    for label, twins in (("deltas", deltas), ("best", best)):
        if twins is None:
            continue
        same_length(weights, **{label: twins})
        named += [(f"{label}[{i}]", twin) for i, twin in enumerate(twins)]
    for name, tensor in named:
        check_tensor(name, tensor, dtypes)
    for position, (name, tensor) in enumerate(named):
        at = position % len(weights)
        _check_twin(name, tensor, names[at], weights[at])
    device = check_same_device(named)
    _check_overlap(named)

    if chunk is None:
        chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    parts = []
    for dtype in dtypes:
        members = [i for i, weight in enumerate(weights) if weight.dtype == dtype and weight.numel()]
        if not members:
            continue
        found = [
            (i, start, length) for i in members for length, starts in [runs(weights[i])] for start in starts
        ]
        members, starts, numels = zip(*found, strict=True)
        w, delta, base = (
            [0 if side is None else side[i].data_ptr() + start * dtype.itemsize for i, start, _ in found]
            for side in (weights, deltas, best)
        )
        rows = chunk_rows(w, delta, base, numels, dtype.itemsize, chunk)
        parts.append(Group(dtype, rows, chunk_places(members, starts, numels, chunk)))
    return Plan(device, sum(weight.numel() for weight in weights), _groups(parts, device))


def _groups(parts: Sequence[Group], device: torch.device) -> list[Group]:
    """The same on `device`, sent there in one copy."""
    if not parts:
        return []
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "these tensors are laid out for the first time while a CUDA graph is being captured, which needs"
            " a copy that a graph cannot hold; make the TensorTable, or call once, before the capture"
        )
    # All rows come first: their addresses stay multiples of 16.
    tables = [part.rows for part in parts] + [part.places for part in parts]
    flat = torch.cat([table.flatten() for table in tables]).to(device).split([t.numel() for t in tables])
    sent = [there.view(table.shape) for there, table in zip(flat, tables, strict=True)]
    half = len(parts)
    return [
        Group(part.dtype, rows, places)
        for part, rows, places in zip(parts, sent[:half], sent[half:], strict=True)
    ]


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
