"""Validation examples drawn anew before each stage from a pool, so that no few of them are searched twice.

The pool is sorted by length and cut into as many strata as a draw has examples; a draw takes one of each:

    strata 1 … n    neighbours in length, from short to long, equally many up to one
    draw d          example (d mod m) of a permutation of the m of each stratum; a new one after m draws

So each draw has the same mix of lengths, and the places of the longest of each stratum, which are made
once, hold every draw: nothing changes its address and graphs that were captured stay valid. What is drawn
is a function of (seed, d) alone. The paper searches on 32 fixed examples and leaves resampling to future
work (arXiv 2409.04206).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels.ranks.parallelism import training_group
from ffkernels.ranks.ranks import Ranks, together
from ffkernels.validation.batches import (
    IGNORE,
    Example,
    check_causal_batches,
    count_rows,
    is_loss_function,
    items_of,
    read_batches,
    read_examples,
)
from ffkernels.validation.causal_lm import FastPathRefused, model_device
from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.restore import keep_random_state

Batch = dict[str, Any]


class ValidationPool(ValidationLoss):
    """A ``ValidationLoss`` on ``size`` examples of a pool; ``FastForward`` draws others before each stage.

        validation = ValidationPool(model, examples, collator=collator)     # say 256, of which 32 at a time
        ff = FastForward(model, optimizer, validation)

    Between draws it is the loss of the present ones. Stage number d, from 0, has draw d, so a resumed run
    draws what the uninterrupted one would; a learning rate is found on draw 0. Losses of different draws do
    not compare; ``Stage.draw`` says which one a stage had.

    The fast path computes places as long as the longest of each stratum, with the most labels of one, where a
    draw alone would have its own: the closer neighbours of the pool are, the less that costs. On
    the generic path and in a job of several processes each draw makes everything anew, as ``swap_batch``
    says. There every rank must have the same pool and seed, or ``RanksDisagree``.

    Args:
        model, collator, micro_batch_tokens, check, process_group: as for ``ValidationLoss``.
        pool: an iterable of batches, which are taken apart into rows; or a dataset or list of examples, with
            ``collator``, which then makes a batch of each one, once. Rows with nothing to score are left out.
        size: examples per draw.
        seed: of the draws.
        batch_size: examples of one batch where the generic path makes batches of a draw with ``collator``;
            by default as many as ``micro_batch_tokens`` allows.

    Attributes:
        drawn: the number of the present draw.
        pool_size: how many examples there are to draw from.

    Raises:
        TypeError: for a callable, which has no examples.
        ValueError: when the pool has fewer than ``size`` examples, and as for ``ValidationLoss``, for every
            example of the pool.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Any,
        *,
        size: int = 32,
        seed: int = 0,
        collator: Callable[..., Any] | None = None,
        micro_batch_tokens: int | None = None,
        check: bool = True,
        process_group: Any = None,
        batch_size: int | None = None,
    ) -> None:
        device = model_device(model)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r}: must be an integer of at least 1")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r}: must be an integer of at least 0")
        ranks = Ranks.present(device, process_group or training_group(model))
        with together(ranks):
            with keep_random_state(device):
                self._pool, self._items = _read(pool, collator, placeholder_ids(model))
            self._collator, self._batch_size = collator, batch_size
            examples = [_example(row) for row in self._pool]
            kept = [i for i, example in enumerate(examples) if example is not None]
            if len(kept) < size:
                raise ValueError(
                    f"the pool has {len(kept)} examples with something to score, and a draw takes "
                    f"size={size}: give more of them, several times as many, or a smaller size"
                )
            order = sorted(kept, key=lambda i: _order(examples[i]))
            cuts = [len(order) * i // size for i in range(size + 1)]
            self._strata = [order[cuts[i] : cuts[i + 1]] for i in range(size)]
            self._seed, self.pool_size, self.drawn = seed, len(kept), -1
            self._places: list[Batch] | None = None
            if all(isinstance(examples[i], Example) for i in kept):
                padded = any(examples[i].left_padded for i in kept)
                self._places = [_longest([examples[i] for i in stratum], padded) for stratum in self._strata]
        super().__init__(
            model,
            self._places or [self._pool[i] for i in self._indices(0)],
            micro_batch_tokens=micro_batch_tokens,
            check=check,
            process_group=process_group,
        )
        with together(ranks):
            if (lm := self.causal_lm) is not None:
                check_causal_batches(self._pool, lm.vocabulary, lm.embeddings)
        self.draw(0)

    def draw(self, number: int) -> bool:
        """Validate on draw ``number`` from now on.

        Returns:
            True where nothing changed its address: the same draw, or another one at the same places.
        """
        if number == self.drawn:
            return True
        drawn = self._indices(number)
        rows = [self._pool[i] for i in drawn]
        in_place = False
        self.follow()
        if self._collator is not None and self.causal_lm is None:  # it makes batches of several
            self._swap_collated([self._items[i] for i in drawn])
        elif self.ranks is None and self._places is not None:
            in_place = self._loss.swap(rows)
            if not in_place:  # places were made for one draw, when the model went to another device
                self.swap_batch(self._places)
                self.swap_batch(rows)
        else:
            self.swap_batch(rows)
        self.drawn = number
        return in_place

    def _swap_collated(self, items: list[Any]) -> None:
        if self._batch_size is None:
            self.swap_batch(items, self._collator)
            return
        groups = [items[i : i + self._batch_size] for i in range(0, len(items), self._batch_size)]
        with keep_random_state(self.device):
            batches = [self._collator(group) for group in groups]
        self.swap_batch(batches)

    def _indices(self, number: int) -> list[int]:
        """Which rows of the pool draw ``number`` has, one of each stratum, from short to long."""
        return [_pick(stratum, number, self._seed, i) for i, stratum in enumerate(self._strata)]


def draw_for_stage(validation: object, number: int) -> int | None:
    """Draw for the stage of this number where there is a pool; the draw's number, None without a pool."""
    if not isinstance(validation, ValidationPool):
        return None
    validation.draw(number)
    return number


def _pick(stratum: Sequence[int], number: int, seed: int, place: int) -> int:
    turn, index = divmod(number, len(stratum))
    mixed = ((seed * 1_000_003 + turn) * 1_000_003 + place) % (1 << 63)
    generator = torch.Generator().manual_seed(mixed)
    return stratum[int(torch.randperm(len(stratum), generator=generator)[index])]


def _read(
    pool: Any, collator: Callable[..., Any] | None, placeholders: dict[str, int]
) -> tuple[list[Batch], list[Any]]:
    """The pool as batches of one row, and the examples that a collator made them of."""
    if is_loss_function(pool):
        raise TypeError("the pool is a callable, which has no examples: pass batches or a dataset")
    if collator is None:
        return [row for batch in read_batches(pool, None, 1) for row in rows_of(batch, placeholders)], []
    items = items_of(pool)
    batches = [read_batches([item], collator, 1)[0] for item in items]
    if any(count_rows(batch) != 1 for batch in batches):
        raise ValueError("the collator makes several rows of one example: pass the pool as batches")
    return batches, items


def _example(row: Batch) -> Example | int | None:
    """The row as the fast path reads it, None where it has nothing to score; else its number of tokens."""
    try:
        return next(iter(read_examples([row])), None)
    except FastPathRefused:
        ids, mask = row.get("input_ids"), row.get("attention_mask")
        if isinstance(mask, torch.Tensor):
            return int(mask.sum())
        return ids.shape[-1] if isinstance(ids, torch.Tensor) else 0


def _order(example: Example | int) -> tuple[int, int]:
    # As the fast path orders examples when it finds places for them, so each finds its stratum's.
    return (example.computed, example.scored) if isinstance(example, Example) else (example, 0)


def _longest(stratum: Sequence[Example], left_padded: bool) -> Batch:
    """A row that takes up as much as any of these: the longest of them, with the most labels of one."""
    longest = max(stratum, key=lambda example: example.computed)
    computed, scored = longest.computed, max(example.scored for example in stratum)
    ids = longest.input_ids[: computed + 1]
    labels = torch.full_like(ids, IGNORE)
    labels[computed + 1 - scored :] = ids[computed + 1 - scored :]
    mask = torch.ones_like(ids)
    if left_padded:  # so that it is compared with the model's own loss in this form too
        one = ids.new_ones(1)
        ids, labels = torch.cat([ids[:1], ids]), torch.cat([IGNORE * one, labels])
        mask = torch.cat([0 * one, mask])
    return {"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]}


Batch = dict[str, Any]
# What a tensor's name has, and whose tokens stand for its entries.
_NAMED = {"video": "video", "audio": "audio", "input_features": "audio", "image": "image", "pixel": "image"}


def placeholder_ids(model: nn.Module) -> dict[str, int]:
    """By "image", "video" and "audio": the token that stands for a part of one, where the model has it."""
    found: dict[str, int] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        for media in set(_NAMED.values()):
            for name in (f"{media}_token_id", f"{media}_token_index"):
                if isinstance(token := getattr(config, name, None), int):
                    found.setdefault(media, token)
    return found


def rows_of(batch: Batch, placeholders: dict[str, int]) -> list[Batch]:
    """The batch's rows, each as a batch of one; lists with an entry for each row are cut, too.

        (rows, …)                      one entry for each row
        (k, rows, tokens)              positions in several dimensions
        (patches or images, …)         those of all rows one after the other, as vision-language models have

    The last, known by their names, are divided by the tokens in ``input_ids`` that stand for them, whose id
    is in the model's config: so many entries for each such token, or so many tokens for each entry; a grid
    (``image_grid_thw``) says of every image how many patches it has. What else there is all rows share, but
    not images of which no token is known.

    Raises:
        ValueError: naming a tensor that cannot be divided among the rows.
    """
    ids, count = batch.get("input_ids"), count_rows(batch)
    if count == 1:
        return [batch]
    parts = {key: _parts(key, value, batch, ids, count, placeholders) for key, value in batch.items()}
    return [{key: part[i] for key, part in parts.items()} for i in range(count)]


def _parts(
    key: str, value: Any, batch: Batch, ids: Any, count: int, placeholders: dict[str, int]
) -> Sequence[Any]:
    if isinstance(value, (list, tuple)) and len(value) == count:
        return [value[i : i + 1] for i in range(count)]
    if not isinstance(value, Tensor) or value.ndim == 0:
        return [value] * count
    tokens = ids.shape[:2] if isinstance(ids, Tensor) and ids.ndim > 1 else None
    if value.ndim == 3 and value.shape[1:] == tokens and len(value) != count:
        return [value[:, i : i + 1] for i in range(count)]
    media = next((media for word, media in _NAMED.items() if word in key), None)
    if value.shape[:2] != tokens and tokens is not None and media in placeholders:
        stand_in = (ids == placeholders[media]).sum(1).tolist()
        by_row = len(value) == count and len({*stand_in}) == 1
        if not by_row and sum(stand_in):
            sizes = _sizes(value, batch.get(f"{media}_grid_thw"), stand_in)
            if sizes is None:
                raise _undivided(key, value, count, stand_in)
            return value.split(sizes)
    if len(value) == count:
        return value.split(1)
    if media is not None and media not in placeholders and len(value) > 1:
        raise _undivided(key, value, count, "no")
    return [value] * count


def _undivided(key: str, value: Tensor, count: int, stand_in: Any) -> ValueError:
    return ValueError(
        f"{key} has {len(value)} entries for {count} rows, in which {stand_in} tokens stand for them: it is "
        "not known whose each is. Pass the pool as examples, with the collator that makes batches of them"
    )


def _sizes(value: Tensor, grid: Any, stand_in: Sequence[int]) -> list[int] | None:
    """How many of the tensor's entries are of each row, by the tokens that stand for them."""
    if isinstance(grid, Tensor) and grid.ndim == 2:
        patches = grid.prod(1).tolist()
        images = _images(patches, stand_in)
        if images is not None and len(value) == len(grid):
            return images
        if images is not None and len(value) == sum(patches):
            per_row = torch.tensor(patches).split(images)
            return [int(of_row.sum()) for of_row in per_row]
        return None
    total = sum(stand_in)
    sizes = [tokens * len(value) // total for tokens in stand_in]
    exact = all(size * total == tokens * len(value) for size, tokens in zip(sizes, stand_in, strict=True))
    return sizes if exact else None


def _images(patches: Sequence[int], stand_in: Sequence[int]) -> list[int] | None:
    """How many images each row has, where each token stands for equally many patches."""
    per_token, rest = divmod(sum(patches), sum(stand_in))
    images, left = [], list(patches)
    for tokens in stand_in:
        before, taken = len(left), 0
        while left and taken < tokens * per_token:
            taken += left.pop(0)
        images.append(before - len(left))
        if taken != tokens * per_token:
            return None
    return None if rest or left else images
