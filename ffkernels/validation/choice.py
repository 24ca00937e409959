"""Which way a validation loss is computed, and why: the fast one where the model's own loss agrees with it.

    fast        a causal language model on ordinary batches (`fast`)
    generic     any model whose `model(**batch)` returns a loss: the batches as given, weighted by what that
                loss is the mean of (`generic`, `mean`)
    callable    `loss_fn(model)`, whatever it computes (`generic`)

A model may do more around its two halves than its structure shows. The comparison runs both on up to four
examples of different lengths, in one padded batch, with the padding on the side the user's data has it;
longer examples are cut so that the model's full logits stay within a fixed number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ffkernels.ops.notices import announce_once
from ffkernels.ranks.ranks import Ranks
from ffkernels.validation.batches import IGNORE, Example, Given
from ffkernels.validation.causal_lm import CausalLM, unwrap
from ffkernels.validation.evaluator import Evaluator, Loss, coarsest
from ffkernels.validation.fast import LabelledLoss
from ffkernels.validation.generic import FunctionLoss, GradientsWhereNeeded, ModelCall, ModelLoss, ask_model
from ffkernels.validation.maskless_attention import could_be_given_a_mask
from ffkernels.validation.mean import Mean
from ffkernels.validation.shared import shared_function, shared_labelled_loss, shared_model_loss

_LOGIT_BYTES = 128 << 20
# By precision, relative. transformers computes its loss in fp32 for float64 models too.
TOLERANCES = {
    **{torch.float64: 2e-5, torch.float32: 2e-5, "tf32": 2e-3},
    **{torch.float16: 5e-3, torch.bfloat16: 2e-2, None: 2e-2},
}


class Choice(NamedTuple):
    """A way to the loss."""

    path: str  # "fast", "generic" or "callable"
    reason: str
    make: Callable[[CausalLM | None, Sequence[Example], torch.device], Loss]  # shared by the ranks, if any
    loss: Loss  # that it made
    mean: Mean | None  # what the model's own loss is the mean of, if it was asked


def choose(
    given: Given,
    model: nn.Module,
    evaluator: Evaluator,
    ranks: Ranks | None,
    max_tokens: int,
    *,
    check: bool = True,
    mean: Mean | None = None,
) -> Choice:
    """Choose the way for what was given.

    Args:
        evaluator: runs the comparison, and asks a model on the generic path what its loss is the mean of.
        max_tokens: padded tokens of one forward at most, on the fast path.
        check: compare the fast path with the model's own loss.
        mean: what the model said before.

    Raises:
        ValueError: when the model returns no loss for such batches, or they have nothing to score.
    """

    def of_function(lm: Any, rows: Any, device: torch.device) -> Loss:
        loss = FunctionLoss(given.function, model, device)
        return loss if ranks is None else shared_function(ranks, loss)

    def of_rows(lm: CausalLM, rows: Sequence[Example], device: torch.device) -> Loss:
        if ranks is None:
            return LabelledLoss(lm, rows, max_tokens=max_tokens, device=device)
        return shared_labelled_loss(ranks, lm, rows, max_tokens, device)

    def of_batches(lm: Any, rows: Any, device: torch.device) -> Loss:
        loss = ModelLoss(model, given.batches, device, mean)
        return loss if ranks is None else shared_model_loss(ranks, loss)

    lm, reason = given.lm, given.refused or "a causal language model on plain batches"
    if lm is not None and check and given.rows:
        lm, difference = _compare(lm, model, given.rows, evaluator)
        reason = difference or f"{reason}, equal to the model's own loss"
    if given.function is not None:
        path, reason, make = "callable", "the loss is a callable", of_function
    elif lm is not None:
        path, make = "fast", of_rows
    else:
        path, make = "generic", of_batches
        mean = mean or ask_model(model, given.batches, evaluator.device, reason, evaluator.run_first)
    loss = make(lm, given.rows, evaluator.device)
    if given.batches and not loss.tokens:
        raise ValueError(
            "no labelled token in the whole validation set: all labels are -100, or only a row's first "
            "token has one, which nothing predicts"
        )
    if path == "generic":
        name = type(unwrap(model)[0]).__name__
        said = f"ValidationLoss runs {name} with full logits, without losses by example: {reason}"
        announce_once(f"validation: {said}", said)
    return Choice(path, reason, make, loss, mean)


def _compare(
    lm: CausalLM, model: nn.Module, rows: Sequence[Example], evaluator: Evaluator
) -> tuple[CausalLM | None, str | None]:
    """The halves to run, given a mask where they would make one and agree so; or None, and why not."""
    chosen, device = _choose(rows, lm.vocabulary or 1 << 16), evaluator.device
    call = ModelCall(model, device)
    own_loss = partial(call, call.prepared(_as_batch(chosen)))
    own = float(evaluator.run_first(partial(GradientsWhereNeeded(call.model), own_loss)))
    allowed = coarsest(TOLERANCES, model, device, lm.wrappers, evaluator.autocast)
    for candidate in [replace(lm, given_mask=True), lm] if could_be_given_a_mask(lm) else [lm]:
        try:
            loss = LabelledLoss(candidate, chosen, max_tokens=1 << 30, device=device, one_batch=True)
            fast = float(evaluator.run(loss.evaluate))
        except Exception as error:
            difference = f"the fast path raised {type(error).__name__}: {error}"
            continue
        equal = fast == own or (fast != fast and own != own)
        if equal or abs(fast - own) <= allowed * max(1.0, abs(own)):
            return candidate, None
        difference = (
            f"on {len(chosen)} examples the fast path gives {fast:.7g} and the model's own loss is {own:.7g} "
            f"(allowed difference {allowed:g})"
        )
    return None, difference


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
