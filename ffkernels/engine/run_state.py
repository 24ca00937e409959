"""Everything that a few training steps change, kept aside and put back bit for bit.

Weights and buffers, gradients, the optimizer's state and settings, schedulers, train/eval flags, and the
random generators of CPU, device, Python and NumPy. Tensors are written in place, so that whoever holds them
still does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ffkernels.engine.causal_lm import model_device
from ffkernels.engine.evaluation_mode import keep_random_state
from ffkernels.engine.optimizer_probe import OptimizerState

__all__ = ["RunState"]


class RunState:
    """A copy of a run. Making it takes the gradients away, so that steps to come start without any.

    Memory: a copy of what the optimizer trains, of its state, and of the model's buffers.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, schedulers: Sequence[Any] = ()
    ) -> None:
        self._random = ExitStack()
        self._random.enter_context(keep_random_state(model_device(model)))
        self._optimizer = OptimizerState(optimizer)
        self._opt_called = vars(optimizer).get("_opt_called")  # where schedulers note the first step
        self._wrapped = optimizer
        self._schedulers = [(s, copy.deepcopy(s.state_dict())) for s in schedulers]
        trained = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        trained |= {id(p): p for p in model.parameters() if p.requires_grad}
        tensors = [*trained.values(), *model.buffers()]
        self._tensors = [(t, t.detach().clone()) for t in tensors]
        self._gradients = [(p, p.grad) for p in [*trained.values(), *model.parameters()]]
        self._flags = [(module, module.training) for module in model.modules()]
        for parameter, _ in self._gradients:
            parameter.grad = None

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back. Once."""
        for tensor, value in self._tensors:
            tensor.detach().copy_(value)
        self._optimizer.restore()
        if self._opt_called is None:
            vars(self._wrapped).pop("_opt_called", None)
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(state)
        self.restore_gradients()
        for module, training in self._flags:
            module.training = training
        self._random.close()

    def restore_gradients(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
