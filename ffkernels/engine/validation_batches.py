"""Validation data as users have it, read once into batches and, where possible, into unpadded examples.

Accepted: one dict, an iterable of dicts as a Hugging Face collator makes them (`input_ids`, `attention_mask`,
`labels`, −100 where nothing is scored), or a dataset of examples together with its collator.

An example of the fast path is a row without its padding. A causal model computes position i from
positions ≤ i only, so everything after the last scored prediction is cut off as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ffkernels.engine.causal_lm import FastPathRefused

__all__ = ["IGNORE", "Example", "check_causal_batches", "read_batches", "read_examples"]

IGNORE = -100
_OWN_KEYS = {"input_ids", "attention_mask", "labels"}
_ACCEPTED = (
    "pass a list of dicts with input_ids, attention_mask and labels, a dataset with collator=, or a callable "
    "loss_fn(model)"
)


@dataclass(frozen=True)
class Example:
    """One row without padding; `labels[i]` is −100 or the token at position i."""

    input_ids: torch.Tensor  # (length,) int64
    labels: torch.Tensor  # (length,) int64
    left_padded: bool = False

    @cached_property
    def computed(self) -> int:
        """Positions a causal model has to compute: up to the one that predicts the last label."""
        return int(self.labels.ne(IGNORE).nonzero()[-1])

    @cached_property
    def scored(self) -> int:
        return int(self.labels[1:].ne(IGNORE).sum())


def read_batches(batches: Any, collator: Callable[..., Any] | None, tokens: int) -> list[dict[str, Any]]:
    """`batches` as a list of dicts whose sequences are tensors on the CPU or wherever they were."""
    if isinstance(batches, Mapping):
        batches = [batches]
    elif not isinstance(batches, (str, bytes, torch.Tensor)) and isinstance(batches, Iterable):
        pass
    elif not isinstance(batches, (str, bytes, torch.Tensor)) and hasattr(batches, "__getitem__"):
        batches = [batches[i] for i in range(len(batches))]  # a map-style dataset
    else:
        raise TypeError(f"validation batches of type {type(batches).__name__}: {_ACCEPTED}")
    items = list(batches)
    if not items:
        raise ValueError(f"the validation set is empty: {_ACCEPTED}")
    if collator is not None:
        if not callable(collator):
            raise TypeError(f"collator is a {type(collator).__name__}: a callable is needed")
        items = [collator(group) for group in _groups(items, tokens)]
    return [_read_batch(item, index, collated=collator is not None) for index, item in enumerate(items)]


def _groups(examples: list[Any], tokens: int) -> list[list[Any]]:
    """Runs of examples of at most `tokens` tokens padded; eight at a time where lengths are unknown."""
    groups: list[list[Any]] = []
    longest = 0
    for example in examples:
        ids = example.get("input_ids") if isinstance(example, Mapping) else None
        length = len(ids) if hasattr(ids, "__len__") else max(1, tokens // 8)
        longest = max(longest, length)
        if not groups or longest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
            longest = length
        groups[-1].append(example)
    return groups


def _read_batch(item: Any, index: int, *, collated: bool) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise TypeError(
            f"validation batch {index} is a {type(item).__name__}, not a dict: "
            + ("the collator must return dicts" if collated else _ACCEPTED)
        )
    batch = dict(item)
    if not batch:
        raise ValueError(f"validation batch {index} is an empty dict")
    for key in _OWN_KEYS & batch.keys():
        value = batch[key]
        if value is None:
            del batch[key]
        elif not isinstance(value, torch.Tensor):
            try:
                batch[key] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"validation batch {index}: {key} cannot be made one tensor ({error}); pad the rows "
                    "to one length or pass collator="
                ) from error
    _check_shapes(batch, index)
    return batch


def _check_shapes(batch: dict[str, Any], index: int) -> None:
    ids, mask, labels = (batch.get(key) for key in ("input_ids", "attention_mask", "labels"))
    if ids is None:
        return
    if ids.ndim == 1:
        raise ValueError(
            f"validation batch {index}: input_ids has one dimension, so this is an example, not a batch; "
            "pass collator= to make batches of examples, or add the batch dimension"
        )
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"validation batch {index}: input_ids must be integers, not {ids.dtype}")
    if ids.shape[0] == 0:
        raise ValueError(f"validation batch {index} has no rows")
    if mask is not None and mask.ndim == 2 and mask.shape != ids.shape:
        raise ValueError(
            f"validation batch {index}: attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} "
            "must have one shape"
        )
    if labels is not None and labels.ndim > 0 and labels.shape[0] != ids.shape[0]:
        raise ValueError(
            f"validation batch {index}: labels {tuple(labels.shape)} and input_ids {tuple(ids.shape)} differ "
            "in their number of rows"
        )


def check_causal_batches(
    batches: list[dict[str, Any]], vocabulary: int | None, embeddings: int | None
) -> None:
    """Refuse what a causal language model's batches cannot be: unlabelled, or outside the vocabulary."""
    for index, batch in enumerate(batches):
        if "labels" not in batch:
            raise ValueError(
                f"validation batch {index} has no labels, only {sorted(batch)}; a causal language model's "
                "labels are the input_ids with -100 where nothing is scored"
            )
        labels, ids = batch["labels"], batch.get("input_ids")
        if ids is not None and labels.shape != ids.shape:
            raise ValueError(
                f"validation batch {index}: labels {tuple(labels.shape)} and input_ids {tuple(ids.shape)} "
                "must have one shape"
            )
        if labels.is_floating_point():
            raise ValueError(f"validation batch {index}: labels must be integers, not {labels.dtype}")
        _check_range(labels[labels != IGNORE], vocabulary, f"validation batch {index}: labels", "−100 or ")
        if ids is not None:
            _check_range(ids, embeddings, f"validation batch {index}: input_ids", "")


def _check_range(values: torch.Tensor, size: int | None, what: str, also: str) -> None:
    if values.numel() == 0:
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or (size is not None and high >= size):
        found = low if low < 0 else high
        allowed = f"below the vocabulary's {size}" if size is not None else "not negative"
        raise ValueError(f"{what} hold {found}: {also}token ids {allowed} are allowed")


def read_examples(batches: list[dict[str, Any]]) -> list[Example]:
    """All rows with something to score, without padding; `FastPathRefused` where rows are more than that."""
    examples: list[Example] = []
    for index, batch in enumerate(batches):
        extra = sorted(batch.keys() - _OWN_KEYS)
        if extra:
            raise FastPathRefused(f"the batches carry {', '.join(map(str, extra))}")
        if "input_ids" not in batch:
            raise FastPathRefused("the batches carry no input_ids")
        ids, labels = batch["input_ids"].long().cpu(), batch["labels"].long().cpu()
        if ids.ndim != 2:
            raise FastPathRefused(f"input_ids of batch {index} has {ids.ndim} dimensions, not two")
        mask = batch.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise FastPathRefused(f"attention_mask of batch {index} has {mask.ndim} dimensions, not two")
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().ne(0)
        if mask is not None and not torch.equal(kept.to(mask.dtype), mask.cpu()):
            raise FastPathRefused(f"attention_mask of batch {index} holds values other than 0 and 1")
        for row in range(ids.shape[0]):
            example = _read_row(ids[row], labels[row], kept[row])
            if example is not None:
                examples.append(example)
    return examples


def _read_row(ids: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor) -> Example | None:
    if not bool(labels[1:].ne(IGNORE).any()):
        return None
    real = kept.nonzero().flatten()
    if real.numel() == 0:
        raise FastPathRefused("a row is all padding but has labels")
    start, end = int(real[0]), int(real[-1]) + 1
    if end - start != real.numel():
        raise FastPathRefused("attention_mask has holes: padding stands between real tokens")
    if bool(labels[1:][~kept[1:]].ne(IGNORE).any()):
        raise FastPathRefused("padding positions have labels; set them to -100")
    if start > 0 and int(labels[start]) != IGNORE:
        # The model itself scores this label, from a padding position.
        raise FastPathRefused("left-padded rows score their first token; set its label to -100 or pad right")
    return Example(ids[start:end].clone(), labels[start:end].clone(), left_padded=start > 0)
