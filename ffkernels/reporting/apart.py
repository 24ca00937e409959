"""Run a model as its training does, apart from that training: nothing of it is left, whatever it writes.

For the time of the context, what a forward or a backward pass may write is replaced by stand-ins:

    trainable weights     leaves of their own over the same numbers: no gradient, hook or reduction of
                          training's sees the backward pass, and each of their gradients is freed at once
    buffers, tensors      copies
    lists, dicts          copies; attributes are what they were afterwards
    what hooks fill       lists and dicts that a hook uses, attributes of its object: as before afterwards
    random generators     put back, the model's own too
    caches                of autocast and of parametrizations: not used

Frozen weights, and large integer tensors, which are quantised weights, are not copied: nothing writes them.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.validation.evaluator import no_training
from ffkernels.validation.restore import keep_generators, keep_random_state, own_generators, used_by

# Elements; beyond, integers are weights.
_LARGE = 2**16
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_FILLED = (list, deque, set, *_DICTS)


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """See above. Not for a model that FSDP shards: it holds its weights elsewhere too."""
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        stack.enter_context(no_training())
        for device in {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}:
            stack.enter_context(keep_random_state(device))
        stack.enter_context(keep_generators(own_generators(model)))
        stack.enter_context(_parametrized_anew())
        stack.enter_context(_books_of_hooks(model))
        stack.enter_context(_without_gradients(model))
        stack.enter_context(_stand_ins(model))
        stack.callback(torch.set_autocast_cache_enabled, cached)
        torch.set_autocast_cache_enabled(False)
        yield


@contextmanager
def _parametrized_anew() -> Iterator[None]:
    """Nothing is read from, nor left in, what ``parametrize.cached()`` keeps for training's forward."""
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


@contextmanager
def _books_of_hooks(model: nn.Module) -> Iterator[None]:
    """Features that hooks collect for a loss are those of training's forward, each once."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    hooks = [hook for m in model.modules() for kind in kinds for hook in vars(m).get(kind, {}).values()]
    objects = {id(one): one for one in (getattr(hook, "__self__", hook) for hook in hooks)}
    attributes = [one.__dict__ for one in objects.values() if type(getattr(one, "__dict__", None)) is dict]
    filled = [*attributes, *(one for hook in hooks for one in used_by(hook) if type(one) in _FILLED)]
    before = [(one, copy.copy(one)) for one in {id(one): one for one in filled}.values()]
    try:
        yield
    finally:
        with interrupt_later():
            for one, saved in before:
                one.clear()
                (one.update if hasattr(one, "update") else one.extend)(saved)


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    made: dict[int, Any] = {}
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        for module, attributes in before:
            vars(module).update({name: stand_in(value, made) for name, value in attributes.items()})
        yield
    finally:
        with interrupt_later():
            for module, attributes in before:
                vars(module).clear()
                vars(module).update(attributes)


def stand_in(value: Any, made: dict[int, Any]) -> Any:
    """``value``, or what takes its place; the same one for the same tensor. ``made`` holds them by id."""
    if isinstance(value, torch.Tensor):
        if id(value) not in made:
            made[id(value)] = _tensor(value)
        return made[id(value)]
    kind = type(value)
    if kind in _DICTS:
        new = value.copy()
        for key, one in value.items():
            new[key] = stand_in(one, made)
        return new
    if kind in (list, tuple, set):
        return kind(stand_in(one, made) for one in value)
    if kind is deque:
        return deque((stand_in(one, made) for one in value), value.maxlen)
    return value


def _tensor(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.requires_grad:
        if isinstance(tensor, nn.Parameter):
            own = nn.Parameter(tensor.detach())
            vars(own).update(vars(tensor))
        else:
            own = tensor.detach().clone().requires_grad_()
        own.register_post_accumulate_grad_hook(_free)
        return own
    large = not tensor.is_floating_point() and tensor.numel() > _LARGE
    return tensor if isinstance(tensor, nn.Parameter) or large else tensor.detach().clone()


def _free(tensor: torch.Tensor) -> None:
    tensor.grad = None


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """The model's own gradients, and hooks on their arrival, out of the way of whatever holds its weights."""
    weights = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in weights]
    hooks = [(p._post_accumulate_grad_hooks, dict(p._post_accumulate_grad_hooks or {})) for p in weights]
    try:
        for weight, (own, _) in zip(weights, hooks, strict=True):
            weight.grad = None
            if own:
                own.clear()
        yield
    finally:
        with interrupt_later():
            for weight, grad, (own, saved) in zip(weights, grads, hooks, strict=True):
                weight.grad = grad
                if saved:
                    own.update(saved)
