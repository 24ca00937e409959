"""Validation data as users have it, read once into batches and, where possible, into unpadded examples.

Of a batch nothing is asked but to be one; what else it must be is asked by the path that runs it.

An example of the fast path is a row without its padding. A causal model computes position i from
positions ≤ i only, so everything after the last scored prediction is cut off as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import nn

from ffkernels.validation.causal_lm import CausalLM, FastPathRefused, find_causal_lm
from ffkernels.validation.restore import keep_random_state

IGNORE = -100
_OWN_KEYS = {"input_ids", "attention_mask", "labels"}
_TOKENS = {"cpu": 2048}
_TOKENS_ELSEWHERE = 16384
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


def is_loss_function(given: Any) -> bool:
    """Whether this is a function of the model, and nothing that holds examples."""
    return callable(given) and not any(hasattr(given, name) for name in ("__iter__", "__getitem__"))


def micro_batch_limit(given: int | None, device: torch.device) -> int:
    """Padded tokens of one forward: what was given, checked, or what suits the device."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ValueError(f"micro_batch_tokens = {given!r}: a positive integer or None is allowed")
    return given or _TOKENS.get(device.type, _TOKENS_ELSEWHERE)


def items_of(dataset: Any, count: int | None = None) -> list[Any]:
    """The first `count` items (None: all) of what has a length and numbered items, or is iterated over.

    A sized `IterableDataset` has the method `__getitem__`, which raises.
    """
    if not isinstance(dataset, Iterable) and hasattr(dataset, "__getitem__"):
        return [dataset[i] for i in range(len(dataset) if count is None else min(count, len(dataset)))]
    return list(islice(dataset, count))


@dataclass(frozen=True)
class Given:
    """A validation set as it was read."""

    function: Callable[[nn.Module], Any] | None = None
    batches: list[dict[str, Any]] = field(default_factory=list)  # of a function none
    lm: CausalLM | None = None  # the halves of a model that runs rows; None where it does not, or not these
    rows: list[Example] = field(default_factory=list)
    refused: str = ""  # why not


def read(
    model: nn.Module, given: Any, collator: Callable[..., Any] | None, tokens: int, device: torch.device
) -> Given:
    """Read what users give, once: as batches and, where batches and model are such, as rows.

    Raises:
        TypeError, ValueError: for what is no validation set of this model.
    """
    if is_loss_function(given):
        if collator is not None:
            raise TypeError("collator goes with a dataset, not with a callable loss_fn(model)")
        return Given(function=given)
    with keep_random_state(device):  # shuffling loaders and masking collators draw random numbers
        batches = read_batches(given, collator, tokens)
    try:
        lm = find_causal_lm(model)
        check_causal_batches(batches, lm.vocabulary, lm.embeddings)
        rows = read_examples(batches)
        lm.check_length(max((row.input_ids.numel() for row in rows), default=0))
    except FastPathRefused as refusal:
        return Given(batches=batches, refused=str(refusal))
    return Given(batches=batches, lm=lm, rows=rows)


def read_batches(batches: Any, collator: Callable[..., Any] | None, tokens: int) -> list[dict[str, Any]]:
    """`batches` as a list of dicts whose sequences are tensors on the CPU or wherever they were."""
    if isinstance(batches, Mapping):
        batches = [batches]
    elif isinstance(batches, (str, bytes, torch.Tensor)) or not (
        isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    ):
        raise TypeError(f"validation batches of type {type(batches).__name__}: {_ACCEPTED}")
    items = items_of(batches)
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
            with suppress(TypeError, ValueError, RuntimeError):  # rows of many lengths, dicts of boxes
                batch[key] = torch.as_tensor(value)
    if count_rows(batch) == 0:
        raise ValueError(f"validation batch {index} has no rows")
    return batch


def count_rows(batch: Mapping[str, Any]) -> int:
    """How many examples a batch has: as many as it has labels, else rows of token ids or of what comes first.

    In what comes first there may be more of them: the answers to one question, the patches of all images.
    """
    values = [batch[key] for key in ("labels", "input_ids") if key in batch]
    for value in (*values, *batch.values()):
        if isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.ndim > 0):
            return len(value)
    return 1


def chosen_rows(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any] | None:
    """Some rows of a batch, in this order; None where a tensor has another number of rows."""
    count, chosen = count_rows(batch), {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            if len(value) != count:
                return None
            value = value[torch.tensor(list(rows), device=value.device)]
        elif isinstance(value, (list, tuple)) and len(value) == count:
            value = [value[row] for row in rows]
        chosen[key] = value
    return chosen


def on_device(value: Any, device: torch.device) -> Any:
    """A batch's value with every tensor in it, at any depth of lists and dicts, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    return [on_device(item, device) for item in value] if isinstance(value, list) else value


def check_causal_batches(
    batches: list[dict[str, Any]], vocabulary: int | None, embeddings: int | None
) -> None:
    """Refuse token numbers outside the vocabulary, where GPUs end the process, and masks of other shapes."""
    for index, batch in enumerate(batches):
        ids, labels = batch.get("input_ids"), batch.get("labels")
        where = f"validation batch {index}"
        if _is_integer(labels) and (ids is None or (_is_integer(ids) and ids.shape == labels.shape)):
            _check_range(labels[labels != IGNORE], vocabulary, f"{where}: labels", "−100 or ")
        if _is_integer(ids):
            _check_range(ids, embeddings, f"{where}: input_ids", "")
        if batch.keys() <= _OWN_KEYS and (why := _why_mask_does_not_fit(batch)):
            raise ValueError(f"{where}{why}")


def _why_mask_does_not_fit(batch: Mapping[str, Any]) -> str | None:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not (_is_integer(ids) and isinstance(mask, torch.Tensor) and ids.ndim == mask.ndim == 2):
        return None
    shapes = f": attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} must have one shape"
    return None if mask.shape == ids.shape else shapes


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())


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
        why = _why_no_token_rows(batch)
        if why:
            raise FastPathRefused(f"validation batch {index}{why}")
        ids, labels = batch["input_ids"].long().cpu(), batch["labels"].long().cpu()
        mask = batch.get("attention_mask")
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().ne(0)
        if mask is not None and not torch.equal(kept.to(mask.dtype), mask.cpu()):
            raise FastPathRefused(f"attention_mask of batch {index} holds values other than 0 and 1")
        for row in range(ids.shape[0]):
            example = _read_row(ids[row], labels[row], kept[row])
            if example is not None:
                examples.append(example)
    return examples


def _why_no_token_rows(batch: Mapping[str, Any]) -> str | None:
    """What keeps a batch from being rows of token ids with a label at each, to be read behind its name."""
    for key in ("input_ids", "labels"):
        if key not in batch:
            return (
                f" has no {key}, only {sorted(batch)}; a causal language model's labels are the input_ids "
                "with -100 where nothing is scored"
            )
        if not isinstance(batch[key], torch.Tensor):
            return f": {key} cannot be made one tensor; pad the rows to one length or pass collator="
        if not _is_integer(batch[key]):
            return f": {key} must be integers, not {batch[key].dtype}"
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    if ids.ndim == 1:
        return (
            ": input_ids has one dimension, so this is an example, not a batch; pass collator= to make "
            "batches of examples, or add the batch dimension"
        )
    if ids.ndim != 2:
        return f": input_ids has {ids.ndim} dimensions, not two"
    if labels.shape != ids.shape:
        return f": labels {tuple(labels.shape)} and input_ids {tuple(ids.shape)} must have one shape"
    if mask is not None and getattr(mask, "ndim", 0) != 2:
        return f": attention_mask has {getattr(mask, 'ndim', 'no')} dimensions, not two"
    return _why_mask_does_not_fit(batch)


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
