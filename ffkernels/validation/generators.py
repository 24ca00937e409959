"""Random generators of a loss's own, which losses of one search have to draw the same numbers from.

The global ones of PyTorch, Python and NumPy are known (`evaluation_mode`). Others are found where a loss
keeps them: from the attributes of the model's modules, and from a loss function, along the attributes of
objects, the items of short lists and dicts, and the variables that a function uses from outside of it.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["keep_generators", "own_generators", "used_by"]

# How many objects deep, and from how many items on something is data and holds none.
DEPTH, DATA = 5, 64


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
def keep_generators(generators: Sequence[Any]) -> Iterator[None]:
    """Put them back where they stood."""
    before = [_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            _put_back(generator, state)


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


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()


def _put_back(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
