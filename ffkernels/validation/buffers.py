"""Put back the buffers that a forward writes in eval mode too: token counts of experts, ranges of observers.

Which ones those are shows at the first evaluation, by their version counters. Until then all are copied, up
to `COPIED_AT_FIRST` bytes in all and the smallest first; from then on those that were written before.
With a buffer go the plain numbers beside it in its module: some say what a buffer was computed for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ffkernels.ops.notices import announce_once

__all__ = ["COPIED_AT_FIRST", "WrittenBuffers"]

COPIED_AT_FIRST = 256 << 20


class _Before(NamedTuple):
    module: nn.Module
    name: str
    tensor: torch.Tensor
    version: int
    copy: torch.Tensor | None


class WrittenBuffers:
    """The buffers of one model that its evaluations were seen to write.

    Attributes:
        names: of them, by module and name; None before the first evaluation.
    """

    def __init__(self) -> None:
        self.names: dict[tuple[int, str], str] | None = None

    @contextmanager
    def put_back(self, model: nn.Module) -> Iterator[None]:
        """Around one evaluation, also one that raises."""
        numbers = [(module, _numbers(module)) for module in model.modules() if module._buffers]
        before = self._note(module for module, _ in numbers)
        try:
            yield
        finally:
            self._restore(model, before, dict(zip([id(m) for m, _ in numbers], numbers, strict=True)))

    def _note(self, modules: Iterator[nn.Module]) -> list[_Before]:
        found = [
            (module, name, buffer)
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]
        if self.names is None:
            found.sort(key=lambda entry: entry[2].nbytes)
        noted, left = [], COPIED_AT_FIRST
        for module, name, buffer in found:
            left -= buffer.nbytes if self.names is None else 0
            wanted = left >= 0 if self.names is None else (id(module), name) in self.names
            copy = buffer.detach().clone() if wanted else None
            noted.append(_Before(module, name, buffer, buffer._version, copy))
        return noted

    def _restore(self, model: nn.Module, before: list[_Before], numbers: dict[int, tuple[Any, Any]]) -> None:
        known, self.names, lost = self.names, dict(self.names or {}), []
        for module, name, buffer, version, copy in before:
            written, replaced = buffer._version != version, module._buffers.get(name) is not buffer
            if not (written or replaced):
                continue
            key = (id(module), name)
            if key not in self.names:
                self.names[key] = _name_of(model, module, name)
            if written and copy is None:
                lost.append(self.names[key])
                continue
            if written:
                with torch.no_grad():
                    buffer.copy_(copy)
            if replaced and name in module._buffers:
                module._buffers[name] = buffer
            vars(module).update(numbers[id(module)][1])
        if lost:
            cause = "is too large to be copied before each" if known is None else "had not been before"
            announce_once(
                f"buffers-{lost[0]}",
                f"a validation wrote the buffer {lost[0]}{f' and {len(lost) - 1} more' if lost[1:] else ''}, "
                f"which {cause}, so that it was not put back; let the forward write it only where "
                "self.training is True",
            )


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (int, float)) and name != "training"
    }


def _name_of(model: nn.Module, module: nn.Module, name: str) -> str:
    for path, candidate in model.named_modules():
        if candidate is module:
            return f"{path}.{name}" if path else name
    return f"{type(module).__name__}.{name}"
