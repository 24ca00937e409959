"""Counting the FLOPs of real calls: ``FlopCounterMode``, completed with attention on the CPU.

A multiply and an add are two FLOPs; matrix products, convolutions and attention count, elementwise work
does not. PyTorch's counter has no formula for the fused attention of the CPU and counts it as zero; here it
has the one that the GPU kernels have, so that a FLOP is the same on every device. As there, a causal mask
does not halve it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import flop_counter


def counter() -> flop_counter.FlopCounterMode:
    """A silent counter, used as a context manager; ``get_total_flops()`` may be read before it ends."""
    return flop_counter.FlopCounterMode(display=False, custom_mapping=_missing_formulas())


def count_flops(fn: Callable[[], Any]) -> int:
    """FLOPs of one call of ``fn``; a backward pass inside it is counted too."""
    with counter() as counted:
        fn()
    return int(counted.get_total_flops())


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    formulas = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    }
    found = {getattr(torch.ops.aten, name, None): formula for name, formula in formulas.items()}
    # A PyTorch that learns one of them keeps its own formula.
    return {op: f for op, f in found.items() if op is not None and op not in flop_counter.flop_registry}


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products over (batch, heads, queries, keys): Q·Kᵀ and P·V."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Five products: the scores again, then the gradients of P, V, Q and K."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (3 * width + 2 * value[-1])
