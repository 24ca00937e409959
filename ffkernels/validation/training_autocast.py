"""The autocast that training's forward runs under, for validations that run outside of it.

    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**batch).loss          # a hook notes it here
    loss.backward()
    optimizer.step()                        # and a stage's losses are computed under the same

A base in 16 bits whose norms were upcast to float32 runs under autocast only; any other model has another
loss under it, and the search would optimize what training does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ffkernels.validation.causal_lm import unwrap
from ffkernels.validation.evaluation_mode import is_evaluating

__all__ = ["TrainingAutocast", "autocast_dtype", "needed_autocast"]


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What the autocast that is active for this kind of device casts to; None where none is."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def needed_autocast(model: nn.Module, error: RuntimeError) -> torch.dtype | None:
    """What to cast to where a forward failed since it meets two dtypes; None where something else failed."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    narrow = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes]
    return narrow[0] if narrow and torch.float32 in dtypes and "dtype" in str(error) else None


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """``module``, or in the place of a container, which has no forward, what is in it."""
    if type(module).forward is not nn.Module.forward or "forward" in vars(module):
        yield module
    else:
        for child in module.children():
            yield from _called(child)


class TrainingAutocast:
    """A forward pre-hook that notes the autocast around each forward with gradients.

    Attributes:
        dtype: what it casts to, None for none. Before the first such forward: what was active when this was
            made.
        heard: whether there was such a forward.
    """

    is_harmless_before_a_bypassed_forward = True

    def __init__(self, kind: str) -> None:
        self.kind, self.dtype, self.heard = kind, autocast_dtype(kind), False

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and not is_evaluating():
            self.dtype, self.heard = autocast_dtype(self.kind), True

    def hooks(self, model: nn.Module) -> list[Any]:
        """Listen to this model, whichever of its wrappers training calls; the handles end that."""
        inner, wrappers = unwrap(model)
        heard = []
        for module in wrappers:
            heard.append(module.register_forward_pre_hook(self))
            if isinstance(getattr(module, "_orig_mod", None), nn.Module):
                return heard  # what is inside is compiled, and is not to be compiled anew
        return heard + [module.register_forward_pre_hook(self) for module in _called(inner)]
