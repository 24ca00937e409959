"""What a Trainer evaluates on: a dataset's examples, in the batches that its own evaluation makes of them.

The items of a dataset are examples, whatever their shapes. Only a list may hold batches instead, and then the
Trainer's own examples say what one looks like: an item whose values are nested as deep is an example, one
whose values are as deep as those of a collated example is a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from ffkernels.validation.batches import count_rows, items_of


class EvaluationData:
    """Batches, how many examples each has (``sizes``), and what they are made of, unless they were given.

    ``examples`` and ``collator`` are None where batches were given.
    """

    def __init__(self, batches: Sequence[Any] = (), loader: DataLoader | None = None, size: int = 1) -> None:
        self.examples = self.collator = None
        if loader is None:
            self.batches, self.sizes = list(batches), [count_rows(batch) for batch in batches]
            return
        self.examples, self.collator = items_of(loader.dataset), loader.collate_fn
        self._groups = _groups(loader, size)
        self.sizes = [len(group) for group in self._groups]

    @cached_property
    def batches(self) -> list[Any]:
        """Made where they are asked for: a collator may draw random numbers."""
        return [self.collator([self.examples[i] for i in group]) for group in self._groups]


def evaluation_data(trainer: Any, given: Any, count: int | None = None) -> EvaluationData:
    """The first ``count`` examples (None: all) of ``given``, batched as the Trainer does; or its batches.

    Args:
        given: None, for the Trainer's ``eval_dataset``; a dataset, of any kind; a dict of them, of which the
            first counts; a list of examples; a DataLoader, a list of batches or one batch.

    Raises:
        ValueError: when a list holds neither batches nor anything like the Trainer's own examples.
    """
    if given is None:
        given = _first_of(trainer.eval_dataset)
    elif isinstance(given, DataLoader):
        return EvaluationData(list(given))
    elif isinstance(given, Mapping):
        if not all(_holds_examples(value) for value in given.values()):
            return EvaluationData([given])
        given = _first_of(given)
    elif not isinstance(given, Dataset) and not _is_table(given):
        given = items_of(given, count)
        if given and _is_batch(trainer, given[0]):
            return EvaluationData(given)
    loader = trainer.get_test_dataloader(_first(given, count))
    return EvaluationData(loader=loader, size=trainer.args.eval_batch_size)


def _first(dataset: Any, count: int | None) -> Any:
    """The first ``count`` items (None: all) of a dataset; of a ``datasets.Dataset`` as one of those."""
    if _is_table(dataset):
        return dataset if count is None else dataset.select(range(min(count, len(dataset))))
    return items_of(dataset, count)


def examples_and_collator(trainer: Any, examples: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """``examples`` without the columns that the model does not take, and the Trainer's collator for them.

    Both out of the dataloader that the Trainer itself makes; it is not iterated, so nothing is shuffled,
    sharded or drawn from a random generator.
    """
    loader = trainer.get_test_dataloader(examples)
    dataset = loader.dataset
    return [dataset[i] for i in range(len(dataset))], loader.collate_fn


def _groups(loader: DataLoader, size: int) -> list[Sequence[int]]:
    """The examples of each batch of all processes: below accelerate's shards is the Trainer's sampler."""
    sampler = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    groups = [] if sampler is None or isinstance(loader.dataset, IterableDataset) else list(sampler)
    # Of fewer examples than one batch has, a sampler that drops the last batch leaves none.
    count = len(loader.dataset)
    return groups or [range(start, min(start + size, count)) for start in range(0, count, size)]


def _first_of(dataset: Any) -> Any:
    return next(iter(dataset.values())) if isinstance(dataset, Mapping) else dataset


def _is_table(dataset: Any) -> bool:
    """Whether it is a ``datasets.Dataset``, whose columns the Trainer takes care of."""
    return hasattr(dataset, "column_names") and hasattr(dataset, "select") and hasattr(dataset, "__len__")


def _holds_examples(value: Any) -> bool:
    if isinstance(value, Dataset) or _is_table(value):
        return True
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _is_batch(trainer: Any, item: Any) -> bool:
    """Whether an item of a list is a batch. A Trainer without datasets has no examples: it gets batches."""
    own = [_first_of(getattr(trainer, name, None)) for name in ("train_dataset", "eval_dataset")]
    own = sorted((d for d in own if d is not None), key=lambda dataset: isinstance(dataset, IterableDataset))
    if not isinstance(item, Mapping) or not own:
        return isinstance(item, Mapping)
    (example,), collate = examples_and_collator(trainer, _first(own[0], 1))
    as_example = _alike(item, example)
    if as_example and as_example == len(item.keys() & example.keys()):
        return False
    as_batch = _alike(item, collate([example]))
    if not as_example and not as_batch:
        theirs = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(
            f"validation= holds items with {sorted(item)}, where this Trainer's own examples have {theirs}: "
            "give it examples in that form (tokenized, if they are), or a list or DataLoader of batches"
        )
    return as_batch > as_example


def _alike(item: Mapping[str, Any], other: Any) -> int:
    """How many values are nested as deep as the other's of the same name."""
    if not isinstance(other, Mapping):
        return 0
    return sum(_depth(item[key]) == _depth(other[key]) for key in item.keys() & other.keys())


def _depth(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return 1 + (_depth(value[0]) if value else 0)
    return getattr(value, "ndim", 0)
