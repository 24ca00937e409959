"""Random generators of a loss's own, which losses of one search have to draw the same numbers from.

The global ones of PyTorch, Python and NumPy are known (`evaluation_mode`). Others are found where a loss
keeps them: as attributes of the model's modules or of a callable object, and among the variables that a loss
function uses from outside of it.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import nn

__all__ = ["keep_generators", "own_generators"]


def own_generators(model: nn.Module, function: Any = None) -> list[Any]:
    """`torch.Generator`, `numpy.random.Generator` and `random.Random` objects, each once."""
    held = [value for module in model.modules() for value in vars(module).values()]
    found = {id(value): value for value in (*held, *_used_by(function)) if _is_generator(value)}
    return list(found.values())


@contextmanager
def keep_generators(generators: Sequence[Any]) -> Iterator[None]:
    """Put them back where they stood."""
    before = [_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            _put_back(generator, state)


def _used_by(function: Any) -> Iterator[Any]:
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


def _is_generator(value: Any) -> bool:
    of_numpy = getattr(sys.modules.get("numpy.random"), "Generator", torch.Generator)
    return isinstance(value, (torch.Generator, random.Random, of_numpy))


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _put_back(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
