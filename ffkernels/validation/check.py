"""Compare the fast path with the model's own loss once, on a few short examples.

A model may do more around its two halves than its structure shows. The comparison runs both on up to four
examples of different lengths, in one padded batch, with the padding on the side the user's data has it;
longer examples are cut so that the model's full logits stay within a fixed number of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ffkernels.validation.batches import IGNORE, Example
from ffkernels.validation.causal_lm import CausalLM, cuda_products_in_tf32, find_autocast
from ffkernels.validation.fast import LabelledLoss
from ffkernels.validation.generic import ModelLoss

__all__ = ["disagreement"]

_LOGIT_BYTES = 128 << 20
# transformers computes its loss in fp32 for float64 models too.
_TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_TOLERANCE_TF32 = 2e-3


def disagreement(
    lm: CausalLM, model: nn.Module, examples: Sequence[Example], device: torch.device
) -> str | None:
    """Why the fast path must not be used, or None. The caller holds the model in evaluation mode."""
    chosen = _choose(examples, lm.vocabulary or 1 << 16)
    own = float(ModelLoss(model, [_as_batch(chosen)], device)())
    try:
        fast = float(LabelledLoss(lm, chosen, max_tokens=1 << 30, device=device, one_batch=True)())
    except Exception as error:
        return f"the fast path raised {type(error).__name__}: {error}"
    if fast == own or (fast != fast and own != own):
        return None
    allowed = _tolerance(lm, model, device)
    if abs(fast - own) <= allowed * max(1.0, abs(own)):
        return None
    return (
        f"on {len(chosen)} examples the fast path gives {fast:.7g} and the model's own loss is {own:.7g} "
        f"(allowed difference {allowed:g})"
    )


def _choose(examples: Sequence[Example], vocabulary: int) -> list[Example]:
    ordered = sorted(examples, key=lambda example: example.input_ids.numel())
    last = len(ordered) - 1
    picked = {0, last // 3, 2 * last // 3, last}
    # Absolute positions differ from the fast path's only where padding stood on the left.
    left = next((i for i, example in enumerate(ordered) if example.left_padded), None)
    chosen = [ordered[i] for i in sorted(picked if left is None else {left, *picked})]
    budget = max(256, min(4096, _LOGIT_BYTES // (4 * vocabulary)))
    return [_cut(example, budget // len(chosen)) for example in chosen]


def _cut(example: Example, length: int) -> Example:
    if example.input_ids.numel() <= length:
        return example
    ids, labels = example.input_ids[:length], example.labels[:length].clone()
    if not bool(labels[1:].ne(IGNORE).any()):
        labels[length // 2 :] = ids[length // 2 :]
    return Example(ids, labels, example.left_padded)


def _as_batch(examples: Sequence[Example]) -> dict[str, Any]:
    length = max(example.input_ids.numel() for example in examples)
    left = any(example.left_padded for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i, example in enumerate(examples):
        n = example.input_ids.numel()
        place = slice(length - n, length) if left else slice(0, n)
        ids[i, place], labels[i, place], mask[i, place] = example.input_ids, example.labels, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _tolerance(lm: CausalLM, model: nn.Module, device: torch.device) -> float:
    """By the coarsest precision at work: the parameters', the active autocast's, TF32's."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    wrapped = find_autocast(lm.wrappers)
    if wrapped is not None and wrapped._enabled:
        dtypes.add(wrapped.fast_dtype)
    tolerances = [_TOLERANCE.get(dtype, 2e-2) for dtype in dtypes] or [0.0]
    if device.type == "cuda" and torch.float32 in dtypes and cuda_products_in_tf32():
        tolerances.append(_TOLERANCE_TF32)
    if any(not (p.is_floating_point() or p.is_complex()) for p in model.parameters()):
        tolerances.append(2e-2)  # quantised weights are computed in a 16-bit type
    return max(tolerances)
