"""What one more forward costs, in tokens of computing: what the planner weighs against padding.

    price = (operations · t + bytes / bandwidth) / (2 · weights / speed)

A forward starts its operations one by one and reads its weights once, however few tokens it has; a token
multiplies with the weights that it meets.

The price is an estimate from the model's structure. Ranks must cut the same examples alike, and a resumed run
as before, so nothing is timed or run, and the speeds are those of one card whatever the card: NVIDIA's data
sheet of the H100 SXM (dense), of which products reach about half.
"""

from __future__ import annotations

import torch
from torch import nn

from ffkernels.validation.causal_lm import CausalLM, cuda_products_in_tf32, find_autocast

# Where the model does not matter, or is not known: Python and dispatch on a CPU, launches elsewhere.
_NOMINAL = {"cpu": 48}
_NOMINAL_ELSEWHERE = 512

# Estimates: 2 µs per kernel of a graph, 6 µs where Python launches it.
_SECONDS_PER_OPERATION = 3e-6
_BYTES_PER_SECOND = 3.35e12
_FLOPS = {torch.float32: 67e12, torch.float64: 67e12}
_FLOPS_TF32 = 495e12
_FLOPS_16_BIT = 989e12
_REACHED = 0.5

# Operations that compute (views are none): what PyTorch's dispatcher counted in 16 families, plain and with
# PEFT's adapters, is met to within 30 % for most.
_OF_A_LAYER = 15  # attention, rotations of queries and keys, copies
_OF_EXPERTS = 15  # sorting tokens by expert, two grouped products, the gate, weighting, putting back
_OF_A_MATRIX = 2  # the product, and what is done to it: an addition, an activation, a cast
_OF_A_VECTOR = 7  # a norm in steps: square, mean, root, two products, casts; DoRA's magnitude has more
_OF_TORCHS_OWN = 1  # torch.nn.LayerNorm


def forward_price(lm: CausalLM | None, device: torch.device) -> int:
    """What one more forward of ``lm``'s backbone costs on ``device``, in tokens; the same on every rank."""
    if device.type != "cuda" or lm is None:
        return _NOMINAL.get(device.type, _NOMINAL_ELSEWHERE)
    weights = _weights_per_token(lm)
    if not weights:
        return _NOMINAL_ELSEWHERE
    dtype = max(weights, key=weights.__getitem__)
    wrapped = find_autocast(lm.wrappers)
    if wrapped is not None:
        dtype = wrapped.fast_dtype
    flops = _FLOPS.get(dtype, _FLOPS_16_BIT)
    if dtype == torch.float32 and cuda_products_in_tf32():
        flops = _FLOPS_TF32
    fixed = operations(lm) * _SECONDS_PER_OPERATION + _bytes_read(lm) / _BYTES_PER_SECOND
    return max(1, round(fixed / (2 * sum(weights.values()) / (flops * _REACHED))))


def operations(lm: CausalLM) -> int:
    """About how many operations one forward of the backbone runs."""
    found = _OF_A_LAYER * (getattr(lm.config, "num_hidden_layers", None) or 0)
    for module in lm.backbone.modules():
        own = _own(module)
        if any(_of_experts(parameter, lm) for parameter in own):
            found += _OF_EXPERTS
        elif _is_product(module) or any(parameter.ndim > 1 for parameter in own):
            found += _OF_A_MATRIX
        elif own:
            found += _OF_TORCHS_OWN if type(module).__module__.startswith("torch.nn") else _OF_A_VECTOR
    return found


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _is_product(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix whose sizes it names; where it is quantised its parameters do not."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes) and not module._modules


def _of_experts(parameter: torch.Tensor, lm: CausalLM) -> bool:
    return parameter.ndim == 3 and isinstance(getattr(lm.config, "num_experts_per_tok", None), int)


def _weights_per_token(lm: CausalLM) -> dict[torch.dtype, float]:
    """Weights that a token of the backbone is multiplied with, by dtype; a lookup multiplies with none."""
    found: dict[torch.dtype, float] = {}
    for module in lm.backbone.modules():
        if isinstance(module, nn.Embedding):
            continue
        own = [parameter for parameter in _own(module) if parameter.ndim > 1]
        if _is_product(module):
            floating = bool(own) and own[0].is_floating_point()
            dtype = own[0].dtype if floating else torch.bfloat16  # quantised weights are computed in 16 bits
            found[dtype] = found.get(dtype, 0) + module.in_features * module.out_features
            continue
        for parameter in own:
            share = 1.0
            if _of_experts(parameter, lm):
                share = min(1.0, lm.config.num_experts_per_tok / parameter.shape[0])
            found[parameter.dtype] = found.get(parameter.dtype, 0) + share * parameter.numel()
    return found


def _bytes_read(lm: CausalLM) -> int:
    """Weights that a forward reads, and the head's, of which each has its own labelled positions."""
    return sum(
        parameter.numel() * parameter.element_size()
        for half in (lm.backbone, lm.head)
        for module in half.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in _own(module)
    )
