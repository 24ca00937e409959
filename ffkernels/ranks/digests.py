"""Short numbers that are equal in two processes if, in all likelihood, what they were made of is.

checksum    the bits of tensors on their device, in one pass and one read: is every replica the same?
digest      nested plain values and tensors: is the configuration, is the data the same?
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def checksum(flats: Sequence[torch.Tensor]) -> int:
    """One int64 for the bits of all tensors, which are contiguous; the order of adding does not matter.

    Integer sums wrap and are the same in any order, on any device, with any number of threads.
    """
    total = 0
    for place, flat in enumerate(flats, start=1):
        if flat.numel():
            total += place * int(_words(flat.detach()).sum(dtype=torch.int64))
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def _words(flat: torch.Tensor) -> torch.Tensor:
    """The memory as 64-bit integers, whose sum needs no wider copy, where it can be cut into those."""
    flat = flat.reshape(-1)
    if flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0:
        return flat.view(torch.int64)
    return flat.view(torch.uint8)


def digest(values: Any) -> str:
    """A short hash of nested dicts, sequences, tensors and plain values, the same in every process."""
    hashed = hashlib.sha256()
    _feed(hashed, values)
    return hashed.hexdigest()[:16]


def _feed(hashed: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        hashed.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        hashed.update(ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hashed.update(f"{key}:".encode())
            _feed(hashed, value[key])
    elif isinstance(value, (list, tuple)):
        hashed.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(hashed, item)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        hashed.update(repr(value).encode())
    else:  # an object whose text may hold an address
        hashed.update(type(value).__qualname__.encode())
