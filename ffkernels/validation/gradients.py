"""Gradients are off in a validation, but for a loss that differentiates inside: forces, gradient penalties.

One that fails without them and works with them has them from then on, and leaves none behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ffkernels.ops.notices import announce_once
from ffkernels.ranks.parallelism import fsdp_modules
from ffkernels.validation.causal_lm import unwrap

__all__ = ["GradientsWhereNeeded"]


class GradientsWhereNeeded:
    """Calls the forward of one loss.

    Attributes:
        on: whether it was seen to differentiate.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.on = self._worked = False

    def __call__(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.on:
            return self._with_gradients(forward)
        try:
            found = forward()
        except RuntimeError as error:
            first = not self._worked and not torch.is_grad_enabled() and "grad" in str(error)
            # Where a forward is collective, the ranks would not all begin it anew.
            if not first or fsdp_modules(self.model):
                raise
            cause = error
        else:
            self._worked = True
            return found
        try:
            found = self._with_gradients(forward)
        except Exception:
            raise cause from None
        self.on = True
        announce_once(
            "validation-differentiates",
            f"the validation loss of {type(unwrap(self.model)[0]).__name__} differentiates inside, so it is "
            "computed with gradients on and keeps what a backward pass needs; to save that memory, put "
            "torch.enable_grad() around the part that differentiates",
        )
        return found

    def _with_gradients(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.enable_grad(), _gradients_of_its_own(self.model):
            return forward()


@contextmanager
def _gradients_of_its_own(model: nn.Module) -> Iterator[None]:
    """Those that come up inside, as by `backward()`, do not add to those that training has."""
    before = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
