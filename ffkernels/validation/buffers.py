"""Put back what a forward writes in eval mode too: token counts of experts, ranges of observers, counters.

Buffers, tensors that are plain attributes, and the numbers beside them, some of which say what a buffer was
computed for. Which ones those are shows at the first evaluation, by version counters and values. Until then
all are copied, up to `COPIED_AT_FIRST` bytes in all and the smallest first; from then on those that were
written before.
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
    held: dict[str, Any]  # by the module
    name: str
    tensor: torch.Tensor
    version: int
    copy: torch.Tensor | None


class WrittenBuffers:
    """The buffers and tensor attributes of one model that its evaluations were seen to write.

    Attributes:
        names: of them, by module and name; None before the first evaluation.
    """

    def __init__(self) -> None:
        self.names: dict[tuple[int, str], str] | None = None
        self._changing: set[int] = set()  # modules with attributes that an evaluation changes

    @contextmanager
    def put_back(self, model: nn.Module) -> Iterator[None]:
        """Around one evaluation, also one that raises."""
        first, modules = self.names is None, list(model.modules())
        own = [module for module in modules if first or id(module) in self._changing]
        numbers = [(m, _numbers(m)) for m in modules if first or m._buffers or id(m) in self._changing]
        before = self._note(modules, own)
        try:
            yield
        finally:
            for module, noted in numbers:
                if _numbers(module) != noted:
                    vars(module).update(noted)
                    self._changing.add(id(module))
            self._restore(model, before)

    def _note(self, modules: list[nn.Module], own: list[nn.Module]) -> list[_Before]:
        found = [(m, m._buffers, name, b) for m in modules for name, b in m._buffers.items()]
        of_own = [
            (m, vars(m), name, t) for m in own for name, t in vars(m).items() if type(t) is torch.Tensor
        ]
        if of_own:  # but not another name of a weight, which moves
            weights = {p.untyped_storage()._cdata for m in modules for p in m.parameters(recurse=False)}
            found += [entry for entry in of_own if entry[3].untyped_storage()._cdata not in weights]
        found = [entry for entry in found if entry[3] is not None and not entry[3].is_inference()]
        if self.names is None:
            found.sort(key=lambda entry: entry[3].nbytes)
        noted, left = [], COPIED_AT_FIRST
        for module, held, name, tensor in found:
            left -= tensor.nbytes if self.names is None else 0
            wanted = left >= 0 if self.names is None else (id(module), name) in self.names
            copy = tensor.detach().clone() if wanted else None
            noted.append(_Before(module, held, name, tensor, tensor._version, copy))
        return noted

    def _restore(self, model: nn.Module, before: list[_Before]) -> None:
        known, self.names, lost = self.names, dict(self.names or {}), []
        for module, held, name, tensor, version, copy in before:
            key, replaced = (id(module), name), held.get(name) is not tensor
            written = tensor._version != version or key in self.names
            written = written or (known is None and copy is not None and not _same(tensor, copy))
            if not (written or replaced):
                continue
            if key not in self.names:
                self.names[key] = _name_of(model, module, name)
                self._changing.add(id(module))
            if written and copy is None:
                lost.append(self.names[key])
                continue
            if written:
                with torch.no_grad():
                    tensor.copy_(copy)
            if replaced and name in held:
                held[name] = tensor
        if lost:
            cause = "is too large to be copied before each" if known is None else "had not been before"
            announce_once(
                f"buffers-{lost[0]}",
                f"a validation wrote the buffer {lost[0]}{f' and {len(lost) - 1} more' if lost[1:] else ''}, "
                f"which {cause}, so that it was not put back; let the forward write it only where "
                "self.training is True",
            )


def _same(tensor: torch.Tensor, copy: torch.Tensor) -> bool:
    """Batch norms write their statistics, and ``.data`` is written, past the version counter."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return True
    return torch.equal(tensor, copy) or bool(((tensor == copy) | (tensor != tensor)).all())


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
