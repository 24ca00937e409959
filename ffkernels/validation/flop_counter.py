"""Counting the FLOPs of real calls: matrix products, convolutions, attention; elementwise work is none.

A dispatch mode that looks at each operation, runs it as it is and adds what its formula says: PyTorch's, or
one of ``flop_formulas``. (PyTorch's ``FlopCounterMode`` decomposes operations on the way, which changes the
last bits of what they compute, and cannot run higher-order operations such as ``flex_attention``.) A causal
mask does not halve attention.

Code that ``torch.compile`` made runs eagerly while it is counted, and is compiled as before afterwards:
what PyTorch first compiles under a dispatch mode, it would leave uncompiled for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ffkernels.ops.notices import announce_once
from ffkernels.validation.flop_formulas import formula_of, is_like_a_product

__all__ = ["FlopCounter", "count_flops", "counter", "say_uncounted"]


class FlopCounter(TorchDispatchMode):
    """Adds up FLOPs of what runs inside of it.

    Attributes:
        total: FLOPs so far.
        missed: names of operations that look like matrix products and have no formula.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.missed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = formula_of(func)
        if formula is None:
            if isinstance(func, HigherOrderOperator):  # cond, scan: count in what they call
                args, kwargs = tree_map_only(FunctionType, self._inside, (args, kwargs))
            elif func.namespace == "aten" and (torch.is_inference_mode_enabled() or is_like_a_product(func)):
                with self:  # linear and matmul come whole where autograd is not
                    out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        elif is_like_a_product(func):
            self.missed.add(str(getattr(func, "_overloadpacket", func)))
        return out

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return counted


@contextmanager
def counter() -> Iterator[FlopCounter]:
    """A counter at work, compiled code running eagerly; says once which products it has no formula for."""
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counted:
        yield counted
    for name in sorted(counted.missed):
        announce_once(
            f"no FLOP formula: {name}",
            f"FLOPs of {name} are not counted, it has no formula: FLOPs called measured are too few by them. "
            "Give it one with torch.utils.flop_counter.register_flop_formula",
        )


def count_flops(fn: Callable[[], Any]) -> int:
    """FLOPs of one call of ``fn``; a backward pass inside it is counted too."""
    with counter() as counted:
        fn()
    return counted.total


def say_uncounted(what: str, cause: Exception | str) -> None:
    """Say once that FLOPs of ``what`` are not counted, and that all else goes on."""
    if isinstance(cause, Exception):
        cause = f"{type(cause).__name__}: {cause}".splitlines()[0]
    announce_once(
        f"FLOPs of {what}: {cause}",
        f"FLOPs of {what} are not counted: {cause}. Training goes on; what is called measured lacks them",
    )
