"""Causal attention without a mask: keep transformers from looking for one.

With `attention_mask=None` transformers still examines the position ids for packed sequences: on a GPU one
device-to-host read per forward, and inside a CUDA graph capture, where it cannot read, a materialised mask.
It leaves a model alone whose attention implementation its mask table does not know. So the same SDPA
function is registered under a private name, and the model's configs carry that name for the duration of a
call.

Without a mask transformers leaves keys and values ungrouped to SDPA (`enable_gqa=True`). On CUDA the fused
kernels take such in 16 bits only; for float32 keys and values are repeated first, once per group, (rows,
heads, length, width) each.

"eager" attention, which families with capped attention logits need, knows no causality without a mask. It
is given one that was made once, (1, 1, length, length): transformers takes it as it is and reads nothing.

Right only for causal attention over right-padded rows: exactly what the fast path runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ffkernels.validation.causal_lm import CausalLM, accepts_argument
from ffkernels.validation.restore import attributes

PRIVATE_NAME = "ffkernels_sdpa"
_FIELD = "_attn_implementation_internal"
_WARNING = "warn_if_padding_and_no_attention_mask"


def attention_configs(backbone: nn.Module) -> list[Any]:
    """The config objects from which the modules of `backbone` read their attention implementation."""
    functions = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    if functions is None:
        return []
    if PRIVATE_NAME not in functions:
        functions.register(PRIVATE_NAME, _fused(functions["sdpa"]))
    configs: dict[int, Any] = {}
    for module in backbone.modules():
        config = getattr(module, "config", None)
        if hasattr(config, _FIELD):
            configs[id(config)] = config
    return list(configs.values())


def attends_eagerly(configs: list[Any]) -> bool:
    """Whether these are the configs of a model whose attention is transformers' plain "eager" one."""
    return bool(configs) and all(getattr(config, _FIELD) == "eager" for config in configs)


def could_be_given_a_mask(lm: CausalLM) -> bool:
    """Whether the model would make a mask, and read from the device for it, where it is given none."""
    return attends_eagerly(attention_configs(lm.backbone)) and accepts_argument(lm.backbone, "attention_mask")


def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Added to attention scores, (1, 1, length, length): 0, and above the diagonal the least of `dtype`."""
    lowest = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=device)
    return lowest.triu(1)[None, None]


def _fused(sdpa: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' SDPA function, kept on a fused kernel where it would leave one."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **options: Any
    ) -> Any:
        groups = getattr(module, "num_key_value_groups", 1)
        if groups > 1 and attention_mask is None and _no_fused_kernel_takes_groups(key):
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            module = _Ungrouped(getattr(module, "is_causal", True))
        return sdpa(module, query, key, value, attention_mask, **options)

    return attend


class _Ungrouped:
    """What SDPA sees in place of a module whose keys and values are repeated already."""

    def __init__(self, is_causal: bool) -> None:
        self.is_causal = is_causal


def _no_fused_kernel_takes_groups(key: torch.Tensor) -> bool:
    # Autocast casts what SDPA is given.
    return key.is_cuda and key.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")


@contextmanager
def maskless_attention(backbone: nn.Module, configs: list[Any]) -> Iterator[None]:
    """Run what uses plain "sdpa" under the private name; other implementations stay as they are.

    A few families also search their input for padding tokens to warn about the missing mask, which is one
    more read and, here, a false alarm: that method is shadowed.
    """
    fused = [(config, _FIELD, PRIVATE_NAME) for config in configs if getattr(config, _FIELD) == "sdpa"]
    shadowed = hasattr(backbone, _WARNING) and _WARNING not in vars(backbone)
    with attributes(fused):
        try:
            if shadowed:
                setattr(backbone, _WARNING, _no_warning)
            yield
        finally:
            if shadowed:
                delattr(backbone, _WARNING)


def _no_warning(*args: Any, **kwargs: Any) -> None:
    pass
