"""Hooks on an optimizer's step that fire once for every step that the training loop takes.

PyTorch wraps ``step`` in every optimizer class, so that a class of one's own whose ``step`` calls
``super().step()`` runs the hooks twice: but only if an optimizer of the parent class was made before, in
this process, by anybody. Here the outermost call alone counts. Nothing is kept from one step to the next, so
a step that raises leaves nothing behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.utils.hooks import RemovableHandle

Hook = Callable[[torch.optim.Optimizer, tuple, dict], None]


def on_step(optimizer: torch.optim.Optimizer, before: Hook, after: Hook) -> list[RemovableHandle]:
    """Call ``before`` and ``after`` around each step of ``optimizer``; the handles take them off again.

    Raises:
        RuntimeError: from the step itself, when it runs inside ``backward()``.
    """

    def enter(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not _inside_another_step(optimizer):
            _refuse_backward(optimizer)
            before(optimizer, args, kwargs)

    def leave(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not _inside_another_step(optimizer):
            after(optimizer, args, kwargs)

    # Where step() is compiled, what happens around it is not: it differs from step to step.
    enter, leave = torch.compiler.disable(enter), torch.compiler.disable(leave)
    return [optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(leave)]


def _inside_another_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether two of PyTorch's wrappers around a step of this optimizer are on the stack."""
    wrapper = getattr(type(optimizer).step, "__code__", None)  # the same code object for every class
    frame, steps = sys._getframe(1), 0
    while frame is not None and steps < 2:
        steps += frame.f_code is wrapper and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def _refuse_backward(optimizer: torch.optim.Optimizer) -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() was called inside backward(), as with one optimizer for each "
            "parameter: the other gradients of this step are not there yet, so there is no whole update for "
            "Fast Forward to repeat. Call step() after backward() has returned, on one optimizer for them all"
        )
