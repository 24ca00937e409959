"""Everything that a few training steps change, kept aside and put back bit for bit.

Weights and buffers, gradients, the optimizer's state and settings, schedulers, train/eval flags, and the
random generators of CPU, device, Python and NumPy. Tensors are written in place, so that whoever holds them
still does.

Buffers that training writes are small: statistics, counters. Large ones are quantised weights, which it does
not write; they are not copied, but a checksum tells whether that is true.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ffkernels.engine.digests import checksum
from ffkernels.engine.evaluation_mode import keep_random_state
from ffkernels.engine.optimizer_probe import OptimizerState

__all__ = ["RunState"]

LARGE = 1 << 20  # elements


class RunState:
    """A copy of a run. Making it takes the gradients away, so that steps to come start without any.

    Memory: a copy of what the optimizer trains, of its state, and of the model's buffers.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, schedulers: Sequence[Any] = ()
    ) -> None:
        self._devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
        self._random = ExitStack()
        self._random.enter_context(_keep_random_states(self._devices))
        self._optimizer = OptimizerState(optimizer)
        self._opt_called = vars(optimizer).get("_opt_called")  # where schedulers note the first step
        self._wrapped = optimizer
        self._schedulers = [(s, copy.deepcopy(s.state_dict())) for s in schedulers]
        trained = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        trained |= {id(p): p for p in model.parameters() if p.requires_grad}
        buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.device.type != "meta"}
        small = [buffer for buffer in buffers.values() if buffer.numel() <= LARGE]
        self._tensors = [(t, t.detach().clone()) for t in [*trained.values(), *small]]
        self._untouched = [(n, b, checksum([b])) for n, b in buffers.items() if b.numel() > LARGE]
        self._gradients = [(p, p.grad) for p in [*trained.values(), *model.parameters()]]
        self._flags = [(module, module.training) for module in model.modules()]
        for parameter, _ in self._gradients:
            parameter.grad = None

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back. Once.

        Raises:
            RuntimeError: when a buffer was written that is too large to have been copied; all else is put
                back.
        """
        for tensor, value in self._tensors:
            tensor.detach().copy_(value)
        self._optimizer.restore()
        if self._opt_called is None:
            vars(self._wrapped).pop("_opt_called", None)
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(state)
        self._restore_gradients()
        for module, training in self._flags:
            module.training = training
        self._random.close()
        written = [name for name, buffer, before in self._untouched if checksum([buffer]) != before]
        if written:
            raise RuntimeError(f"training wrote {written[0]!r}, which is too large a buffer to be put back")

    def keep(self) -> None:
        """Let everything stand as it is now, except for the gradients, which are what they were."""
        self._restore_gradients()
        with _keep_random_states(self._devices):  # the outer of the two is what stays
            self._random.close()

    def _restore_gradients(self) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient


@contextmanager
def _keep_random_states(devices: Iterable[torch.device]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(keep_random_state(device))
        yield
