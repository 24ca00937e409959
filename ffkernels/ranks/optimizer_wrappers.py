"""The optimizers that one is made of: wrappers, and inside the one whose step changes the weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def optimizer_chain(optimizer: object) -> list[Any]:
    """From the outermost wrapper to the optimizer whose ``step`` changes the weights.

    A wrapper keeps the next one as ``.optimizer``, or under another name as the one optimizer whose groups
    are also its own (``base_optimizer`` of SAM).
    """
    chain: list[Any] = []
    while optimizer is not None and all(optimizer is not seen for seen in chain):
        chain.append(optimizer)
        optimizer = _inside(optimizer)
    return chain


def _inside(wrapper: object) -> object | None:
    inner = getattr(wrapper, "optimizer", None)
    if inner is not None or _has_modes(wrapper):
        return inner
    groups = getattr(wrapper, "param_groups", None)
    shared = [part for part in parts(wrapper) if groups is None or part.param_groups is groups]
    return shared[0] if len(shared) == 1 else None


def parts(wrapper: object) -> list[torch.optim.Optimizer]:
    """The optimizers among an object's attributes, or in a list, tuple or dict of them."""
    found: list[torch.optim.Optimizer] = []
    for value in [wrapper, *getattr(wrapper, "__dict__", {}).values()]:
        inner = list(value.values()) if isinstance(value, dict) else value
        for part in inner if isinstance(inner, (list, tuple)) else [inner]:
            known = part is wrapper or any(part is other for other in found)
            if isinstance(part, torch.optim.Optimizer) and not known:
                found.append(part)
    return found


def needs_closure(optimizer: Any) -> bool:
    """Whether its ``step`` cannot be called without one."""
    given = inspect.signature(type(optimizer).step).parameters.get("closure")
    return given is not None and given.default is inspect.Parameter.empty


def names_of(optimizers: list[Any]) -> str:
    return " around ".join(type(optimizer).__name__ for optimizer in optimizers)


def _has_modes(optimizer: object) -> bool:
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def refuse_own_weights(chain: list[Any]) -> None:
    """Refuse what says of itself that it trains other weights than the model's.

    Raises:
        ValueError: naming it.
    """
    if _has_modes(chain[-1]):  # of wrappers, some only hand the call on
        raise ValueError(
            f"{type(chain[-1]).__name__} has train() and eval() modes, as schedule-free optimizers have: "
            "while it trains, the model holds one mixture of two weight sequences and is evaluated with "
            "another. Fast Forward would move the model's and leave the optimizer's behind; use an optimizer "
            "without modes, such as torch.optim.AdamW"
        )
    for optimizer in chain:
        if getattr(optimizer, "master_weights", None) is True:
            raise ValueError(
                f"{type(optimizer).__name__} has master_weights=True: it trains float32 copies and "
                "overwrites the model's weights with them at each step, whatever Fast Forward moved; keep "
                "trainable weights in float32 and leave master_weights off"
            )
