"""Which tensors Fast Forward moves: the trainable parameters that the optimizer updates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

NameFilter = Callable[[str], bool] | str | Iterable[str]


def unwrap_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The torch optimizer whose ``step`` really runs, out of wrappers that keep it as ``.optimizer``.

    Raises:
        TypeError: when no torch optimizer is inside.
    """
    # A wrapper may itself be a torch.optim.Optimizer, and wrappers may be stacked; `seen` ends a circle.
    seen = {id(optimizer)}
    while (inner := getattr(optimizer, "optimizer", None)) is not None and id(inner) not in seen:
        optimizer = inner
        seen.add(id(inner))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer or wrap one as .optimizer, "
            f"got {type(optimizer).__name__}"
        )
    return optimizer


def trainable_weights(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
) -> dict[str, nn.Parameter]:
    """Parameters of ``model`` that require a gradient and belong to ``optimizer``, by name.

    ``include`` and ``exclude`` narrow the set: a predicate on the name, a regular expression
    (``re.search``), or several of them.

    Raises:
        ValueError: when nothing is left, saying at which of the conditions.
    """
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "the model has no trainable parameter (requires_grad is False on all of them); "
            "add an adapter or unfreeze some"
        )
    weights = {name: p for name, p in trainable.items() if id(p) in updated}
    if not weights:
        raise ValueError(
            f"none of the model's {len(trainable)} trainable parameters is in the optimizer's param_groups; "
            "make the optimizer from this model's parameters (after adding adapters or moving the model)"
        )
    wanted, unwanted = _matcher(include, "include"), _matcher(exclude, "exclude")
    kept = {
        name: p
        for name, p in weights.items()
        if (include is None or wanted(name)) and not (exclude is not None and unwanted(name))
    }
    if not kept:
        raise ValueError(
            f"include={include!r} and exclude={exclude!r} leave none of the {len(weights)} trainable "
            f"parameters (the first is {next(iter(weights))!r})"
        )
    if not any(p.numel() for p in kept.values()):
        raise ValueError(
            f"all {len(kept)} trainable parameters are empty on this process, as DeepSpeed ZeRO-3 and FSDP "
            "leave them between steps; Fast Forward moves whole weights: use DDP, ZeRO-1 or ZeRO-2"
        )
    return kept


def _matcher(names: NameFilter | None, field: str) -> Callable[[str], bool]:
    if names is None:
        return lambda name: False
    if callable(names):
        return names
    if isinstance(names, str):
        names = [names]
    names = list(names)
    if not all(isinstance(n, str) for n in names):
        raise TypeError(
            f"{field} must be a predicate, a regular expression or several of them, got {names!r}"
        )
    patterns = [re.compile(n) for n in names]
    return lambda name: any(p.search(name) for p in patterns)


def signature(weights: dict[str, nn.Parameter]) -> tuple:
    """What must not change while a table points at these weights."""
    return tuple(
        (name, id(p), p.data_ptr(), p.shape, p.stride(), p.dtype, p.device) for name, p in weights.items()
    )
