"""The tokens that training runs through a model: a hook on its input embedding, wherever gradients are on.

The hook holds a number and nothing else, so that a model that is copied, pickled or saved takes nothing of
Fast Forward's along; the copy counts for nobody. In compiled code it does nothing, and breaks no graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ffkernels.validation.causal_lm import unwrap

__all__ = ["TokenCount", "input_embedding", "uncounted"]

_uncounted = 0  # contexts that are open


class TokenCount:
    """A forward pre-hook for an embedding.

    Attributes:
        tokens: elements of its input so far, padding included.
    """

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or _uncounted or not torch.is_grad_enabled():
            return
        if inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].is_floating_point():
            self.tokens += inputs[0].numel()

    def __reduce__(self) -> Any:  # deepcopy asks it too
        return TokenCount, ()


@contextmanager
def uncounted() -> Iterator[None]:
    """For forwards with gradients that are no training, such as those that measure what training costs."""
    global _uncounted
    _uncounted += 1
    try:
        yield
    finally:
        _uncounted -= 1


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that gets a model's token ids; None where there is none to be found."""
    inner, _ = unwrap(model)
    try:
        embedding = inner.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None
