"""Run a model's loss and leave no trace: what an evaluation needs to know of the model, from one to the next.

That is how its parameters are spread, under which autocast training runs, which random generators the loss
has of its own, and which buffers it writes. What `evaluation_mode` does with that is said there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ffkernels.ops.notices import announce_once
from ffkernels.ranks.parallelism import fsdp_modules, replicas, reshard, without_broadcasts
from ffkernels.validation.buffers import WrittenBuffers
from ffkernels.validation.causal_lm import unwrap
from ffkernels.validation.evaluation_mode import evaluation_mode
from ffkernels.validation.generators import own_generators
from ffkernels.validation.training_autocast import TrainingAutocast, needed_autocast

__all__ = ["Evaluator"]


class Evaluator:
    """Evaluations of one model.

    Args:
        device: where its inputs go; may be set anew.
        function: the loss function, if it is one.

    Attributes:
        is_collective: each forward waits for other processes (FSDP2).
    """

    def __init__(
        self, model: nn.Module, device: torch.device, function: Callable[..., Any] | None = None
    ) -> None:
        self.model, self.device = model, device
        self._fsdp, self._replicas = fsdp_modules(model), replicas(model)
        self.is_collective = bool(self._fsdp)
        self._training = TrainingAutocast(device.type)
        self._buffers = WrittenBuffers()
        self._generators = own_generators(model, function)

    @property
    def autocast(self) -> torch.dtype | None:
        """What an evaluation casts to where no autocast is active; None for nothing."""
        return self._training.dtype

    @property
    def written_buffers(self) -> list[str]:
        """Names of the buffers that evaluations were seen to write, and put back."""
        return list((self._buffers.names or {}).values())

    def listen(self, model: nn.Module) -> list[Any]:
        """Follow the autocast around this model's training forwards; the handles end that."""
        return self._training.hooks(model)

    def mode(self) -> AbstractContextManager[None]:
        return evaluation_mode(
            self.model,
            self.device,
            autocast=self.autocast,
            generators=self._generators,
            buffers=self._buffers,
        )

    def run(self, measure: Callable[[], Any]) -> Any:
        """Call ``measure`` in evaluation mode."""
        with self.mode():
            return self.forward(measure)

    def run_first(self, measure: Callable[[], Any]) -> Any:
        """The same, before any training: under an autocast where the model cannot be run without."""
        try:
            return self.run(measure)
        except RuntimeError as error:
            needed = needed_autocast(self.model, error)
            if needed is None or self.autocast is not None or torch.is_autocast_enabled(self.device.type):
                raise
            self._training.dtype, cause = needed, error
        try:
            found = self.run(measure)
        except RuntimeError:
            self._training.dtype = None
            raise cause from None
        kind, name = self.device.type, str(needed).removeprefix("torch.")
        announce_once(
            "validation-needs-autocast",
            f"{type(unwrap(self.model)[0]).__name__} runs under autocast only ({cause}): its validation loss "
            f"is computed under torch.autocast({kind!r}, torch.{name}) until training's forward says what it "
            "runs under",
        )
        return found

    def forward(self, measure: Callable[[], Any]) -> Any:
        """Call ``measure`` for those who hold the model in ``mode`` themselves.

        Under FSDP2: with parameters gathered anew, and given back. Under DDP: without its broadcasts.
        """
        if not self._fsdp:
            with without_broadcasts(self._replicas):
                return measure()
        reshard(self._fsdp)
        try:
            return measure()
        finally:
            reshard(self._fsdp)
