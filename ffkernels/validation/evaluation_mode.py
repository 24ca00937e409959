"""Evaluate a model as if nobody had: eval mode, no grad, and every bit of state put back.

Inside the context all modules have `training = False`, gradients are off, an active autocast context, or else
the one that training's forward had, is active without its cache, and PEFT's DoRA norm cache is off: both
caches would keep values computed from weights that have moved since. Afterwards, also when an exception
passes through, each module has its own `training` flag again, the random generators (CPU, the model's device,
Python, NumPy when imported, those of the loss's own) stand where they stood, and buffers hold what they held.

`torch.no_grad` and not `inference_mode`: a buffer built lazily in here must stay usable for autograd later.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.validation.buffers import WrittenBuffers
from ffkernels.validation.generators import keep_generators

__all__ = ["evaluation_mode", "is_evaluating", "keep_random_state", "uncached_autocast"]

_evaluations = 0  # that are going on


@contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Put back the random generators of CPU, `device`, Python and (when already imported) NumPy."""
    accelerator = _accelerator_generator(device)
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    cpu = torch.get_rng_state()
    on_device = accelerator.get_rng_state(device) if accelerator is not None else None
    python = random.getstate()
    numpy = numpy_random.get_state() if numpy_random is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if accelerator is not None:
            accelerator.set_rng_state(on_device, device)
        random.setstate(python)
        if numpy_random is not None:
            numpy_random.set_state(numpy)


def _accelerator_generator(device: torch.device) -> Any:
    if device.type not in ("cuda", "xpu"):
        return None
    module = torch.get_device_module(device)
    return module if module.is_initialized() else None


@contextmanager
def uncached_autocast(device_type: str, otherwise: torch.dtype | None = None) -> Iterator[None]:
    """Keep the caller's autocast for `device_type`, if one is active, but not what its cache holds.

    Casts of weights that have moved since are stale. An autocast opened further inside brings its own
    cache, which is cleared only with the outermost context: so the cache is emptied on both sides.
    Where none is active, one to the dtype `otherwise` is, if given.
    """
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else otherwise
    if dtype is None:
        yield
        return
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _without_dora_cache() -> Iterator[None]:
    dora = sys.modules.get("peft.tuners.lora.dora")
    if dora is None or not getattr(dora, "ENABLE_DORA_CACHING", False):
        yield
        return
    dora.ENABLE_DORA_CACHING = False
    try:
        yield
    finally:
        dora.ENABLE_DORA_CACHING = True


@contextmanager
def _all_modules_in_eval(model: nn.Module) -> Iterator[None]:
    # Flags are set one by one: `eval()` and `train()` may be overridden with side effects (merging adapters
    # into the weights, say), and a model may mix frozen modules in eval with others in training.
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, training in flags:
            # bitsandbytes packs a 4-bit weight for inference at its first use in eval mode on such a CPU, for
            # good: no gradient would come through it any more. The layer has no other use for the flag, and
            # `from_pretrained` leaves it in eval mode.
            wanted = bool(vars(module).get("support_avx512bf16_for_cpu"))
            if training != wanted:
                _set_training(module, wanted)
        yield
    finally:
        for module, training in flags:
            if module.training != training:
                _set_training(module, training)


def _set_training(module: nn.Module, training: bool) -> None:
    # Past Module.__setattr__, which looks for parameters, buffers and submodules first: a large model has
    # thousands of modules. A scripted module keeps the flag elsewhere.
    attributes = vars(module)
    if "training" in attributes:
        attributes["training"] = training
    else:
        module.training = training


def is_evaluating() -> bool:
    """Whether an evaluation is going on."""
    return _evaluations > 0


@contextmanager
def _counted() -> Iterator[None]:
    global _evaluations
    _evaluations += 1
    try:
        yield
    finally:
        _evaluations -= 1


@contextmanager
def evaluation_mode(
    model: nn.Module,
    device: torch.device,
    *,
    autocast: torch.dtype | None = None,
    generators: Sequence[Any] = (),
    buffers: WrittenBuffers | None = None,
) -> Iterator[None]:
    """Everything above at once. Ctrl-C waits while state is changed or put back.

    Args:
        autocast: what to cast to where no autocast is active; None for nothing.
        generators: random generators beside the global ones.
        buffers: what earlier evaluations of this model wrote.
    """
    with ExitStack() as stack:
        try:
            with interrupt_later():
                stack.enter_context(_counted())
                stack.enter_context(keep_random_state(device))
                stack.enter_context(keep_generators(generators))
                stack.enter_context((buffers or WrittenBuffers()).put_back(model))
                stack.enter_context(_all_modules_in_eval(model))
                stack.enter_context(torch.no_grad())
                stack.enter_context(uncached_autocast(device.type, autocast))
                stack.enter_context(_without_dora_cache())
            yield
        finally:
            with interrupt_later():
                stack.close()
