"""A batch as batches of one row each: which part of every tensor belongs to which row.

    (rows, …)                      one entry for each row
    (k, rows, tokens)              positions in several dimensions
    (patches or images, …)         those of all rows one after the other, as vision-language models have them

The last, known by their names, are divided by the tokens in ``input_ids`` that stand for them, whose id is in
the model's config: so many entries for each such token, or so many tokens for each entry; a grid
(``image_grid_thw``) says of every image how many patches it has. What else there is all rows share, but not
images of which no token is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels.validation.batches import count_rows

__all__ = ["placeholder_ids", "rows_of"]

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
