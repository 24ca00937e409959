"""A loss that raises at a trial point, in place of NaN: weights far off, which training itself never visits.

Distributions check their parameters, a Cholesky factor needs a positive definite matrix, an assignment
refuses NaN costs, a sampler negative probabilities. Once a validation has worked, on the same data and in the
same code, what it raises later comes of the weights, and the point counts as NaN: a search never keeps it.
"""

from __future__ import annotations

import torch

from ffkernels.ops.notices import announce_once

# What arithmetic and checks of values raise. LinAlgError is a RuntimeError in torch, a ValueError in NumPy.
_OF_VALUES = (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError)
# These are RuntimeErrors too, but say that memory or a device is at its end.
_OF_MACHINES = (torch.OutOfMemoryError, torch.AcceleratorError)
# A kernel that does not fit or compile raises what is only an Exception, too.
_PACKAGES_OF_MACHINES = {"torch", "triton", "subprocess"}
_WORDS_OF_MACHINES = ("out of memory", "can't allocate memory", "CUDA error", "ALLOC_FAILED")


class NoLoss(ArithmeticError):
    """On one rank at least, the loss cannot be computed at these weights; all ranks get this."""


def comes_of_weights(error: BaseException) -> bool:
    """Whether other values of the weights may be all that made a loss raise this."""
    # A class that is only an Exception is of somebody's own checks: gpytorch's NotPSDError.
    kind = next(cls for cls in type(error).__mro__ if cls.__module__ == "builtins")
    own = kind is Exception and type(error).__module__.partition(".")[0] not in _PACKAGES_OF_MACHINES
    if not (isinstance(error, _OF_VALUES) or own) or isinstance(error, _OF_MACHINES):
        return False
    return not any(words in str(error) for words in _WORDS_OF_MACHINES)


def say_there_is_none(error: BaseException) -> None:
    kind, text = type(error).__name__.lstrip("_"), str(error).strip().partition("\n")[0]
    announce_once(
        f"trial-{kind}",
        f"the validation loss raised {kind} ({text}) at weights that Fast Forward tried: they count as a "
        "loss of NaN, and training goes on with the best ones. If it raises at weights where it should not, "
        "call the loss there by hand",
    )
