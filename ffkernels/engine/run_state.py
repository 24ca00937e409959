"""Everything that a few training steps change, kept aside and put back bit for bit.

Tensors are written in place, so that whoever holds them (captured graphs, fused kernels) still does.

Buffers that training writes are small: statistics, counters. Large ones are quantised weights, which it does
not write; they are not copied, but a checksum tells whether that is true.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels.ranks.digests import checksum
from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.validation.restore import attributes, keep_random_state

LARGE = 1 << 20  # elements


class OptimizerSnapshot:
    """What an optimizer trains, and all it knows: its state, its groups and what it keeps in attributes.

    ``restore`` puts it back as often as needed; what did not exist is removed. Memory: a copy of the weights
    and of the state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._weights = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        self._rest = _kept(optimizer, {id(weight) for weight, _ in self._weights})

    def restore(self) -> None:
        _copy_back(self._weights)
        self._rest()


def _kept(value: Any, known: set[int]) -> Callable[[], Any]:
    """What returns this very value as it is now; objects other than data and optimizers are let be.

    ``known``: the ids of what is put back elsewhere.
    """
    if id(value) in known:
        return lambda: value
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        return lambda: (value.detach().copy_(copied), value)[1]
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: (value.set_state(state), value)[1]
    if isinstance(value, tuple):
        items = [_kept(item, known) for item in value]
        return lambda: ([item() for item in items], value)[1]
    # An optimizer may have another one inside: ZeroRedundancyOptimizer that of this rank's share.
    entries = vars(value) if isinstance(value, torch.optim.Optimizer) else value
    if not isinstance(entries, (dict, list)):
        return lambda: value
    known.add(id(value))
    if isinstance(entries, list):
        items = [_kept(item, known) for item in entries]

        def put_back() -> Any:
            entries[:] = [item() for item in items]
            return value

        return put_back
    named = {name: _kept(entry, known) for name, entry in entries.items() if not _is_hooks(name)}

    def put_back() -> Any:
        for name in [name for name in entries if name not in named and not _is_hooks(name)]:
            del entries[name]
        entries.update((name, entry()) for name, entry in named.items())
        return value

    return put_back


def _is_hooks(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("_optimizer_")


@contextmanager
def as_before(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedulers: Sequence[Any] = ()
) -> Iterator[None]:
    """For some training steps, which start without gradients. Afterwards a whole run is as before: what an
    ``OptimizerSnapshot`` holds, buffers, gradients, schedulers, train/eval flags, and the random generators
    of CPU, device, Python and NumPy.

    Raises:
        RuntimeError: when a buffer was written that is too large to have been copied; all else is put back.
    """
    parameters, modules = list(model.parameters()), list(model.modules())
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    # An optimizer that is not known here may train them.
    others = [p for p in parameters if p.requires_grad and p not in trained]
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.device.type != "meta"}
    small = [buffer for buffer in buffers.values() if buffer.numel() <= LARGE]
    with ExitStack() as back:  # from the last to the first
        large = [(n, b, checksum([b])) for n, b in buffers.items() if b.numel() > LARGE]
        back.callback(_refuse_written, large)
        for device in {p.device for p in parameters} or {torch.device("cpu")}:
            back.enter_context(keep_random_state(device))
        back.enter_context(attributes([(module, "training", module.training) for module in modules]))
        back.enter_context(attributes([(p, "grad", None) for p in {*trained, *parameters}]))
        for module in modules:
            back.callback(_register, module._buffers, dict(module._buffers.items()))
        back.callback(_copy_back, [(t, t.detach().clone()) for t in [*others, *small]])
        for scheduler in schedulers:
            back.callback(scheduler.load_state_dict, copy.deepcopy(scheduler.state_dict()))
        if vars(optimizer).get("_opt_called") is None:  # where schedulers note the first step
            back.callback(vars(optimizer).pop, "_opt_called", None)
        back.callback(OptimizerSnapshot(optimizer).restore)
        try:
            yield
        finally:
            with interrupt_later():
                back.close()


@torch.no_grad()
def _copy_back(tensors: Iterable[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in tensors:
        tensor.copy_(value)


def _register(registered: dict[str, Any], before: dict[str, Any]) -> None:
    """Training may put another tensor in a buffer's place."""
    for name, buffer in before.items():
        if name not in registered or registered[name] is not buffer:
            registered[name] = buffer


def _refuse_written(buffers: Iterable[tuple[str, Tensor, int]]) -> None:
    written = [name for name, buffer, before in buffers if checksum([buffer]) != before]
    if written:
        raise RuntimeError(
            f"training wrote {written[0]!r}, a buffer of more than {LARGE:,} elements, which was not "
            "copied and cannot be put back"
        )
