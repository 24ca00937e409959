"""Where every tensor of a weight move lies: one int64 row per chunk.

A row holds the addresses of one chunk in W, Δ and best and its element count; a group holds the rows of one
storage dtype. Kernels walk rows, so one call moves any number of tensors of any sizes. Beside each row stands
its place, for what has addresses of its own that change: gradients. Δ and best live in flat arenas of the
table, one per dtype, in which each tensor starts on a 128-byte boundary and lies as its weight does: a
chunk's alignment is then decided by its weight alone. Chunks are pieces of memory (``layout``), so the order
of a tensor's dimensions does not show in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ffkernels.ops.layout import lie_alike, runs

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
    gradients: Any = field(default=None, repr=False)  # of gradients.Gradients, once there was an alignment
    constants: dict[tuple, Tensor] = field(default_factory=dict, repr=False)  # of scalars.as_tensor
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


def _check_tensor(name: str, tensor: Any, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
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


def _check_same_device(named: Sequence[tuple[str, Tensor]]) -> torch.device:
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
        if len(twins) != len(weights):
            raise ValueError(
                f"{label} has {len(twins)} tensors for {len(weights)} weights; give one for each"
            )
        named += [(f"{label}[{i}]", twin) for i, twin in enumerate(twins)]
    for name, tensor in named:
        _check_tensor(name, tensor, dtypes)
    for position, (name, tensor) in enumerate(named):
        at = position % len(weights)
        _check_twin(name, tensor, names[at], weights[at])
    device = _check_same_device(named)
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
        from ffkernels.ops.dispatch import choose

        self.names, self.weights = _named(weights, names)
        for name, weight in zip(self.names, self.weights, strict=True):
            _check_tensor(name, weight)
        self.device = _check_same_device(list(zip(self.names, self.weights, strict=True)))
        self.impl = choose(impl, self.device)
        # Arenas made under inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.delta_flats, self.deltas = _arena(self.weights, self.device)
            self.best_flats, self.best = _arena(self.weights, self.device)
            self._lay_out()
            if self.weights:
                torch._foreach_copy_(self.best, self.weights)

    def _lay_out(self) -> None:
        chunk = GPU_CHUNK if self.impl == "triton" else None
        self.plan = make_plan(self.weights, self.deltas, self.best, self.names, chunk=chunk)
        self.plan.impl = self.impl
        self._identity = self._look()
        self._addresses = [weight.data_ptr() for weight in self.weights]

    def follow(self, weights: Sequence[Tensor] | None = None) -> bool:
        """Go on with the same weights where they lie now; Δ and best keep their values.

        Args:
            weights: in the table's order, where they are other tensors.

        Returns:
            False, and nothing is changed, where shapes, dtypes or devices are not those of before.
        """
        weights = self.weights if weights is None else list(weights)
        if [(w.shape, w.dtype, w.device) for w in weights] != [
            (b.shape, b.dtype, b.device) for b in self.best
        ]:
            return False
        self.weights = weights
        with torch.inference_mode(False):
            self._lay_out()
        return True

    def _look(self) -> list[tuple]:
        return [(w.data_ptr(), w.shape, w.dtype, w.stride()) for w in self.weights]

    @property
    def numel(self) -> int:
        """Elements over all weights."""
        return self.plan.numel

    @property
    def nbytes(self) -> int:
        """Bytes the table itself holds: Δ and best."""
        return sum(flat.nbytes for flat in (*self.delta_flats, *self.best_flats))

    def is_stale(self) -> bool:
        """Whether any weight has moved, or changed its shape or dtype, since the table was made."""
        return self._look() != self._identity

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
