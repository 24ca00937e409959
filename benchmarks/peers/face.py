"""What the trainer needs of a loop that is not ours: stages with their costs, run from the optimizer's step.

A peer does what its original does, at its price: everything that belongs to it runs inside one of two clocks,
``moving()`` for weights and ``validating()`` for losses, and ends up in a ``Stage`` as our own stages do.
Work that an original does in steps without a stage (snapshots) is charged to the stage that follows.

On a GPU the original's own reads of the loss are the only waits; the clocks add one, where a stage begins, so
that training which is still queued is not booked to the peer. The split into moving and validating is by host
time there; their sum is not affected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import Any

import torch

from ffkernels.engine.step_hooks import on_step
from ffkernels.ops.notices import announce_once
from ffkernels.stage.record import Stage

MOVE_FLOPS = 2  # per element, as ours are counted


def require(**values: tuple[Any, int]) -> None:
    """Raise ValueError unless each ``(value, least)`` is an integer of at least ``least``."""
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")


class Peer:
    """Hooks on ``session.optimizer`` and a list of stages.

    Args:
        session: the run it joins.
        interval: optimizer steps from stage to stage.
        cap: repetitions per stage at most; reaching it is announced, once.

    Attributes:
        stages: one ``Stage`` per stage. Its ``losses`` begin at τ = 1: no peer measures τ = 0.
        optimizer_steps: optimizer steps seen.
        forward_flops: of one of its validation losses, measured once when it is made.
        moved: elements that one of its weight moves touches.
    """

    name = "peer"

    def __init__(self, session: Any, *, interval: int, cap: int) -> None:
        require(interval=(interval, 1), cap=(cap, 2))
        self.session, self.model, self.device = session, session.model, session.device
        self.interval, self.cap = interval, cap
        self.stages: list[Stage] = []
        self.optimizer_steps = 0
        self.forward_flops = self.moved = 0
        self._seconds = {"move": 0.0, "validate": 0.0}
        self._hooks: list[Any] = []

    def join(self) -> None:
        """Put the hooks on; the last thing that a peer does when it is made."""
        self._hooks = on_step(self.session.optimizer, self._before_step, self._after_step)

    def before_step(self) -> None:
        """Called before each optimizer step."""

    def after_step(self) -> None:
        """Called after each optimizer step; ``optimizer_steps`` counts it already."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of every tensor that the original would hold on to."""

    def detach(self) -> None:
        """Take the hooks off and free what is held; ``stages`` stays readable. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.release()

    def _before_step(self, *_: Any) -> None:
        self.before_step()

    def _after_step(self, *_: Any) -> None:
        self.optimizer_steps += 1
        self.after_step()

    def moving(self) -> AbstractContextManager[None]:
        """Charge what runs inside to the peer's weight moves."""
        return self._charging("move")

    def validating(self) -> AbstractContextManager[None]:
        """Charge what runs inside to the peer's validations."""
        return self._charging("validate")

    @contextmanager
    def _charging(self, what: str) -> Iterator[None]:
        begin = perf_counter()
        yield
        self._seconds[what] += perf_counter() - begin

    def wait_for_training(self) -> None:
        """Let the device finish what it was given before the stage."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def finish(self, losses: list[float], stopped_because: str) -> None:
        """Record a stage of ``len(losses)`` repetitions, each of one move; all of them stay."""
        spent, self._seconds = self._seconds, {"move": 0.0, "validate": 0.0}
        self.stages.append(
            Stage(
                self.optimizer_steps,
                tau=len(losses),
                losses=list(enumerate(losses, start=1)),
                seconds=sum(spent.values()),
                validate_seconds=spent["validate"],
                move_seconds=spent["move"],
                flops=len(losses) * (self.forward_flops + MOVE_FLOPS * self.moved),
                executor=self.name,
                executor_reason="a peer, not ffkernels",
                stopped_because=stopped_because,
            )
        )

    def announce_cap(self, message: str) -> str:
        """Say once that a stage was ended by the cap; the words for ``stopped_because``."""
        announce_once(f"peer-cap-{self.name}-{self.cap}", message)
        return f"cap of {self.cap} repetitions"


def held_bytes(*roots: Any, apart_from: torch.nn.Module | None = None) -> int:
    """Bytes of the distinct tensor storages in ``roots`` (lists, tuples and dicts of tensors, nested).

    ``apart_from``: storages of this module's parameters and buffers do not count.
    """
    own = set()
    if apart_from is not None:
        own = {t.untyped_storage().data_ptr() for t in [*apart_from.parameters(), *apart_from.buffers()]}
    found: dict[int, int] = {}
    todo, seen = list(roots), set()
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value
    return sum(found.values())
