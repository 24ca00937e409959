"""Counting the FLOPs of real calls: matrix products, convolutions, attention; elementwise work is none.

A dispatch mode looks at each operation, runs it as it is and adds what its formula says: PyTorch's, or one of
these, for what PyTorch's registry lacks or gets wrong. A multiply and an add are two FLOPs.

    m×k by k×n, quantised or not        2·m·n·k
    attention, Q·Kᵀ and P·V             2·B·H·Lq·Lk·(d + dv), causal or not; backward 5 products in place of 2
    experts (grouped products)          2·rows·k·n: each row meets one expert
    a fused encoder layer               2·tokens·weights + 4·B·L²·E
    LSTM, GRU, RNN                      2·rows·weights of the layers; backward twice that
    convolution, weight gradient        what the forward costs: PyTorch's formula has it times the groups

(PyTorch's ``FlopCounterMode`` decomposes operations on the way, which changes the last bits of what they
compute, and cannot run higher-order operations such as ``flex_attention``.) Code that ``torch.compile`` made
runs eagerly while it is counted, and is compiled as before afterwards: what PyTorch first compiles under a
dispatch mode, it would leave uncompiled for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ffkernels.ops.notices import announce_once

# Gets what its operation gets, and ``out_val``, its result.
Formula = Callable[..., int]


def _product(*args: Any, out_val: Any, left: int = 0, **kwargs: Any) -> int:
    product = kwargs.get("out", out_val)
    product = product[0] if isinstance(product, tuple) else product  # some return what they left out, too
    return 2 * product.numel() * args[left].shape[-1]


def _summed_products(*args: Any, **kwargs: Any) -> int:
    """addbmm: (b, n, k) by (b, k, p), summed over b."""
    return 2 * args[1].numel() * args[2].shape[-1]


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """(batch, heads, length, width) each; fewer heads of key and value serve several of the query."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Five products: the scores again, then the gradients of P, V, Q and K."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (3 * width + 2 * value.shape[-1])


def _grouped(left: Any, right: Any, *args: Any, out_val: Any, **kwargs: Any) -> int:
    """Rows by expert (m, k)·(g, k, n), columns (g, m, k)·(k, n), both, or neither (m, k)·(k, n)."""
    if left.ndim == right.ndim == 2:  # the inner dimension is what is divided: each k meets one expert
        return 2 * left.numel() * right.shape[-1]
    return 2 * out_val.numel() * left.shape[-1]


def _grouped_backward(rows: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 4 * rows.numel() * weight.shape[-1]


def _tokens_and_pairs(tensor: Any) -> tuple[int, int]:
    """B·L and B·L² of (B, L, E), which may be nested; attention pads its rows to the longest."""
    if not tensor.is_nested:
        return tensor.numel() // tensor.shape[-1], tensor.shape[0] * tensor.shape[1] ** 2
    lengths = [row.shape[0] for row in tensor.unbind()]
    return sum(lengths), len(lengths) * max(lengths, default=0) ** 2


def _encoder_layer(*args: Any, **kwargs: Any) -> int:
    """args: source, embed_dim, heads, …; weights of Q, K and V, of the projection, of the linear layers."""
    tokens, pairs = _tokens_and_pairs(args[0])
    return 2 * tokens * sum(args[i].numel() for i in (3, 5, 14, 16)) + 4 * pairs * args[1]


def _multi_head(query: Any, key: Any, value: Any, width: int, heads: int, *args: Any, **kwargs: Any) -> int:
    """Projections of all three and of the result, width × width each, and attention between them."""
    queries, pairs = _tokens_and_pairs(query)
    keys, _ = _tokens_and_pairs(key)
    if not query.is_nested and key is not query:
        pairs = query.shape[0] * query.shape[1] * key.shape[1]
    return 2 * width * width * (2 * queries + 2 * keys) + 4 * pairs * width


def _recurrent(passes: int, rows: Any, weights: Iterable[Any]) -> int:
    """Each row of (…, features) meets each matrix of each layer and direction once; vectors are biases."""
    matrices = sum(weight.numel() for weight in weights if weight.ndim == 2)
    return passes * 2 * (rows.numel() // rows.shape[-1]) * matrices


def _recurrent_list(rows: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return _recurrent(1, rows, weights)


def _recurrent_list_backward(rows: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    of_weights = args[-1][-1]  # the last of output_mask
    return _recurrent(1 + bool(of_weights), rows, weights)


def _recurrent_layer(rows: Any, *weights: Any, passes: int = 1, **kwargs: Any) -> int:
    return _recurrent(passes, rows, weights[:2])


def _convolution_backward(
    grad: Any, rows: Any, weight: Any, biases: Any, *args: Any, out_val: Any, **kwargs: Any
) -> int:
    """Either gradient costs what the forward did: a filter's weights meet each place it is applied to."""
    transposed, output_mask = args[3], args[6]
    places = rows if transposed else grad
    return 2 * places.numel() * (weight.numel() // weight.shape[0]) * sum(output_mask[:2])


_FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(
        [f"aten::{name}" for name in ("mv", "dot", "vdot", "_int_mm", "_scaled_mm_v2", "mkldnn_linear")]
        + [f"aten::_weight_{kind}" for kind in ("int8pack_mm", "int4pack_mm", "int4pack_mm_for_cpu")]
        + ["aten::_weight_int4pack_mm_with_scales_and_zeros"]
        + [f"bitsandbytes::{kind}" for kind in ("gemm_4bit", "gemv_4bit", "int8_scaled_mm")]
        + ["bitsandbytes::int8_mixed_scaled_mm", "bitsandbytes::int8_linear_matmul", "quanto::qbytes_mm"]
        + [f"quanto::gemm_{kind}" for kind in ("f16i4_awq", "f16i4_marlin", "f16f8_marlin")],
        _product,
    ),
    **dict.fromkeys(["aten::addmv", "aten::_addmm_activation"], partial(_product, left=1)),
    "aten::addbmm": _summed_products,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "aten::_scaled_dot_product_attention_math_for_mps": _attention,
    "aten::_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm_v2": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
    "transformers::grouped_mm_fallback_backward": _grouped_backward,
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    "aten::_native_multi_head_attention": _multi_head,
    "aten::_triton_multi_head_attention": _multi_head,
    "aten::mkldnn_rnn_layer": _recurrent_layer,
    "aten::mkldnn_rnn_layer_backward": partial(_recurrent_layer, passes=2),
    "aten::_cudnn_rnn": _recurrent_list,
    "aten::_cudnn_rnn_backward": _recurrent_list_backward,
    "aten::miopen_rnn": _recurrent_list,
    "aten::miopen_rnn_backward": _recurrent_list_backward,
}
_CORRECTED: dict[str, Formula] = {"aten::convolution_backward": _convolution_backward}

# Parts of names, between underscores.
_PRODUCTS = {"matmul", "gemm", "gemv", "linear", "attention", "attn", "rnn", "lstm", "gru", "mha", "scan"}
_PRODUCTS |= {"dot", "vdot", "einsum", "trilinear", "experts", "moe", "conv", "convolution", "mlp", "encoder"}
_PRODUCTS |= {"cdist", "euclidean", "cholesky", "solve", "qr", "svd", "eig", "eigh", "inv", "lu", "det"}
_PRODUCTS |= {"matrix", "householder"}
# Elementwise, or data laid out anew.
_NO_PRODUCTS = ("upsample", "thnn", "flatten", "reorder", "pack", "convert", "quantize", "combination")


def formula_of(operation: Any) -> Formula | None:
    """The formula of what a dispatch mode is called with; None where there is none."""
    packet = getattr(operation, "_overloadpacket", operation)
    name = _name(operation)
    found = _CORRECTED.get(name) or flop_counter.flop_registry.get(packet) or _FORMULAS.get(name)
    if found is None and name.endswith("_"):  # in place
        space, _, own = name.removesuffix("_").partition("::")
        plain = getattr(getattr(torch.ops, space, None), own, None)
        return formula_of(plain) if plain is not None else None
    return found


def is_like_a_product(operation: Any) -> bool:
    """Whether an operation's name says that it multiplies matrices, or holds what does."""
    space, _, name = _name(operation).rpartition("::")
    if space.startswith(("c10d", "_c10d", "prim")) or any(part in name for part in _NO_PRODUCTS):
        return False
    parts = [part.rstrip("0123456789d") or part for part in name.lower().split("_")]
    return any(part in _PRODUCTS or part.endswith(("mm", "mv", "linear")) for part in parts)


def _name(operation: Any) -> str:
    packet = getattr(operation, "_overloadpacket", operation)
    return getattr(packet, "_qualified_op_name", None) or f"higher_order::{operation.name()}"


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
