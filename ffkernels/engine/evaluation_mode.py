"""Evaluate a model as if nobody had: eval mode, no grad, and every bit of state put back.

Inside the context all modules have `training = False`, gradients are off, an active autocast context stays
active but without its cache, and PEFT's DoRA norm cache is off: both caches would keep values computed from
weights that have moved since. Afterwards, also when an exception passes through, each module has its own
`training` flag again and the random generators (CPU, the model's device, Python, NumPy when imported)
stand where they stood.

`torch.no_grad` and not `inference_mode`: a buffer built lazily in here must stay usable for autograd later.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ffkernels.engine.interrupts import interrupt_later

__all__ = ["evaluation_mode", "keep_random_state", "uncached_autocast"]


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
def uncached_autocast(device_type: str) -> Iterator[None]:
    """Keep the caller's autocast for `device_type`, if one is active, but not what its cache holds.

    Casts of weights that have moved since are stale. An autocast opened further inside brings its own
    cache, which is cleared only with the outermost context: so the cache is emptied on both sides.
    """
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
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
            # good: no gradient would come through it any more. The layer has no other use for the flag.
            if training and not vars(module).get("support_avx512bf16_for_cpu"):
                _set_training(module, False)
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


@contextmanager
def evaluation_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Everything above at once. Ctrl-C waits while state is changed or put back."""
    with ExitStack() as stack:
        try:
            with interrupt_later():
                stack.enter_context(keep_random_state(device))
                stack.enter_context(_all_modules_in_eval(model))
                stack.enter_context(torch.no_grad())
                stack.enter_context(uncached_autocast(device.type))
                stack.enter_context(_without_dora_cache())
            yield
        finally:
            with interrupt_later():
                stack.close()
