"""What a Trainer callback needs and is not given: the Trainer itself.

For what it evaluates, and for a log that reaches every ``report_to`` backend: their callbacks run before any
callback of a user's, so what is added to ``logs`` in ``on_log`` comes too late.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Around = Callable[[Any, Any], AbstractContextManager[None]]


def calling_trainer() -> Any | None:
    """The innermost ``transformers.Trainer`` whose method is running, or None.

    The call stack is the only way from an event to the Trainer that holds whichever way the callback was
    added. Reading it is reading: nothing is patched.
    """
    trainer_class = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame = sys._getframe(1) if trainer_class is not None else None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, trainer_class):
            return owner
        frame = frame.f_back
    return None


def log(trainer: Any, metrics: dict[str, float]) -> None:
    """Log ``metrics`` now, at the present global step, to every callback and into ``state.log_history``.

    By the base class's method: subclasses add and clear their own running averages in theirs (TRL does),
    which belong to the log that comes next. The step's own log, when one is due, stays due.
    """
    from transformers import Trainer

    due = trainer.control.should_log
    Trainer.log(trainer, dict(metrics))
    trainer.control.should_log = due


def wrap_training_step(trainer: Any, around: Around) -> Callable[[], None]:
    """Run ``training_step(model, inputs, …)`` inside ``around(model, inputs)``; returns what undoes it."""
    own, step, wanted = vars(trainer).get("training_step"), trainer.training_step, [around]

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with wanted[0](model, inputs) if wanted else nullcontext():
            return step(model, inputs, *args, **kwargs)

    def undo() -> None:
        wanted.clear()  # also where it cannot be taken off: it must not run twice after the next wrapping
        if vars(trainer).get("training_step") is not training_step:
            return  # somebody has wrapped it since
        if own is None:
            del trainer.training_step
        else:
            trainer.training_step = own

    trainer.training_step = training_step
    return undo


def other_models(trainer: Any, model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that a Trainer holds beside the one that it trains, such as a reference model."""
    own = set(model.modules())
    held = {id(value): value for value in vars(trainer).values() if isinstance(value, torch.nn.Module)}
    return [module for module in held.values() if own.isdisjoint(module.modules())]
