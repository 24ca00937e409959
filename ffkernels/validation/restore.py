"""What an evaluation puts back: random generators, and what a forward writes in eval mode too.

Generators of a loss's own, from which losses of one search have to draw the same numbers, are found where
it keeps them: from the attributes of the model's modules, and from a loss function, along the attributes of
objects, the items of short lists and dicts, and the variables that a function uses from outside of it.

Which buffers, tensors that are plain attributes, and numbers beside them a forward writes shows at the
first evaluation, by version counters and values. Until then all are copied, up to `COPIED_AT_FIRST` bytes
in all and the smallest first; from then on those that were written before.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ffkernels.ops.notices import announce_once

# How many objects deep, and from how many items on something is data and holds none.
DEPTH, DATA = 5, 64


@contextmanager
def attributes(wanted: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Give each (object, name, value) its value, and the object back what it had."""
    with ExitStack() as back:
        for holder, name, value in wanted:
            back.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)
        yield


def keep_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Put back the random generators of CPU, `device`, Python and (when already imported) NumPy."""
    known = [torch.default_generator, random, getattr(sys.modules.get("numpy"), "random", None)]
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        if module.is_initialized():
            index = module.current_device() if device.index is None else device.index
            known.append(module.default_generators[index])
    return keep_generators([generator for generator in known if generator is not None])


def own_generators(model: nn.Module, function: Any = None) -> list[Any]:
    """`torch.Generator`, `random.Random`, `numpy.random.Generator` and `RandomState` objects, each once."""
    kinds, found, seen = _kinds(), {}, {}  # by id; what was seen is held, so that no id is given twice
    level = [function, *(value for module in model.modules() for value in vars(module).values())]
    for _ in range(DEPTH):
        new = {id(value): value for value in level if id(value) not in seen}
        seen |= new
        found |= {key: value for key, value in new.items() if isinstance(value, kinds)}
        level = [inner for key, value in new.items() if key not in found for inner in _inside(value)]
    return list(found.values())


@contextmanager
def keep_generators(generators: Iterable[Any]) -> Iterator[None]:
    """Put them back where they stood."""
    with ExitStack() as back:
        for generator in generators:
            back.callback(_way_back(generator))
        yield


def _way_back(generator: Any) -> Callable[[], None]:
    if hasattr(generator, "getstate"):  # Python's
        return partial(generator.setstate, generator.getstate())
    if hasattr(generator, "get_state"):  # PyTorch's and NumPy's older ones
        return partial(generator.set_state, generator.get_state())
    return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, (torch.Tensor, nn.Module, type, ModuleType)):
        return
    if isinstance(value, (dict, list, tuple, set)):
        if len(value) < DATA:
            yield from list(value.values() if isinstance(value, dict) else value)
    elif callable(value):
        yield from used_by(value)
    elif isinstance(attributes := getattr(value, "__dict__", None), dict):
        yield from list(attributes.values())


def used_by(function: Any) -> Iterator[Any]:
    """What a function, method or callable object reads from outside of its arguments, one step far."""
    while isinstance(function, partial):
        yield from (*function.args, *function.keywords.values())
        function = function.func
    bound = getattr(function, "__self__", None if inspect.isroutine(function) else function)
    if not isinstance(bound, nn.Module):
        yield from getattr(bound, "__dict__", {}).values()
    function = inspect.unwrap(function if inspect.isroutine(function) else type(function).__call__)
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        return
    known = function.__globals__
    yield from (known[name] for name in _names(function.__code__) if name in known)
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # empty as yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _names(code: CodeType) -> Iterator[str]:
    """Global names in a function and in those inside of it, comprehensions too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _kinds() -> tuple[type, ...]:
    of_numpy = vars(sys.modules.get("numpy.random", random))
    known = [of_numpy[name] for name in ("Generator", "RandomState") if name in of_numpy]
    return (torch.Generator, random.Random, *known)


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
        self._rewritten: set[tuple[int, str]] = set()  # of the names, those not just replaced
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
            (m, vars(m), name, t)
            for m in own
            for name, t in vars(m).items()
            if type(t) is torch.Tensor and _is_dense(t)
        ]
        if of_own:  # but not another name of a weight, which moves
            weights = (p for m in modules for p in m.parameters(recurse=False) if _is_dense(p))
            memories = {weight.untyped_storage()._cdata for weight in weights}
            found += [entry for entry in of_own if entry[3].untyped_storage()._cdata not in memories]
        found = [e for e in found if e[3] is not None and _is_dense(e[3]) and not e[3].is_inference()]
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
            written = tensor._version != version or key in self._rewritten
            written = written or (known is None and copy is not None and not _same(tensor, copy))
            if not (written or replaced):
                continue
            if key not in self.names:
                self.names[key] = _name_of(model, module, name)
                self._changing.add(id(module))
            if written:
                self._rewritten.add(key)
            if written and copy is None:
                lost.append(self.names[key])
                continue
            if written:
                # Past the version counter: training's graph may have saved it, and it holds what it held.
                tensor.data.copy_(copy)
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


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether it has one memory of a known size, as adjacency matrices and ragged batches have not."""
    return tensor.layout == torch.strided and not tensor.is_nested


def _same(tensor: torch.Tensor, copy: torch.Tensor) -> bool:
    """Batch norms write their statistics, and ``.data`` is written, past the version counter."""
    if tensor.is_meta or tensor.is_quantized:
        return True
    try:
        return torch.equal(tensor, copy) or bool(((tensor == copy) | (tensor != tensor)).all())
    except NotImplementedError:  # for types of four bits
        return True


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
