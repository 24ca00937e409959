"""FLOPs of the training batches that somebody else's loop runs, counted apart from that training.

Where a batch has a new shape, each call of the model (and of a reference model beside it) that the step
makes is run once more just before, on copies, eagerly: forward, and backward from its loss, or from its
logits. After ``SHAPES`` different shapes the cost is read off a fit, which is exact for a transformer
(head of a classifier, matrix products, attention):

    FLOPs(rows B, length T) = a·B + b·B·T + c·B·T²

A loss that is computed outside of the model counts as the elementwise work it mostly is. Calls that hold more
than tensors and plain values, the cache of a generation for one, cannot be repeated without a trace: they are
not counted, which is said. Where FSDP shards a model, its other ranks would wait for a further call: it is
counted while it trains, unless it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ffkernels.ranks.parallelism import fsdp_modules
from ffkernels.reporting.apart import stand_in
from ffkernels.reporting.flops import Flops, flops_of, shapes
from ffkernels.validation.flops import counter, say_uncounted

# Enough to determine three coefficients, few enough to cost nothing in a run of hundreds of steps.
SHAPES = 8

_PLAIN = (torch.Tensor, torch.dtype, torch.device, int, float, complex, str, bytes, type(None))


class StepFlops:
    """Costs of training batches by their shapes.

    Attributes:
        counted: by the shapes of a batch, its (rows, length) and what it costs; None where counting failed.
    """

    def __init__(self) -> None:
        self.counted: dict[Any, tuple[tuple[int, int], Flops | None]] = {}
        self._repeating = False

    @contextmanager
    def batch(self, model: nn.Module, inputs: Any, beside: Iterable[nn.Module] = ()) -> Iterator[list[Flops]]:
        """Around one micro-batch's forward and backward; the list holds its cost when that has ended.

        ``beside``: further modules that the step calls by themselves, which hold none of the model's.
        """
        key, size, cost = shapes(inputs), _size(inputs), []
        if key in self.counted or len(self.counted) >= SHAPES:
            yield cost
            cost.append(self.cost(key, size))
            return
        found: list[Flops | None] = []  # None of a call that could not be counted
        with ExitStack() as stack:
            if fsdp_modules(model):
                stack.enter_context(_counted_in_training(model, found))
            else:
                for module in (model, *beside):
                    stack.enter_context(_before_each_call(module, self._repeat_into(found)))
            yield cost
        if not found:
            say_uncounted("a training batch", "its step called the model in no way that could be counted")
        known = [flops for flops in found if flops is not None]
        self.counted[key] = size, Flops(*map(sum, zip(*known, strict=True))) if known else None
        cost.append(self.cost(key, size))

    def cost(self, key: Any, size: tuple[int, int]) -> Flops:
        """Of a batch of these shapes: as counted, or off the fit through what was counted; 0 before that."""
        known = [pair for pair in self.counted.values() if pair[1] is not None]
        if key in self.counted and self.counted[key][1] is not None:
            return self.counted[key][1]
        if not known:
            return Flops(0, 0)
        features = torch.tensor([_features(*s) for s, _ in known], dtype=torch.float64)
        costs = torch.tensor([list(c) for _, c in known], dtype=torch.float64)
        scale = features.amax(0)
        fit = torch.linalg.lstsq(features / scale, costs, driver="gelsd").solution
        paper, measured = (torch.tensor(_features(*size), dtype=torch.float64) / scale) @ fit
        return Flops(max(0, round(float(paper))), max(0, round(float(measured))))

    def _repeat_into(self, found: list[Flops | None]) -> Callable[[nn.Module, tuple, dict], None]:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # In compiled code it is nothing: what is compiled is called from code that is not.
            if torch.compiler.is_compiling() or self._repeating:
                return
            self._repeating = True
            try:
                found.append(_repeat(module, args, kwargs))
            except Exception as error:
                found.append(None)
                say_uncounted("a training batch", error)
            finally:
                self._repeating = False

        return before


def _repeat(module: nn.Module, args: tuple, kwargs: dict) -> Flops:
    """What this call costs with its backward pass, from one on copies."""
    other = {type(leaf).__name__ for leaf in tree_leaves((args, kwargs)) if not isinstance(leaf, _PLAIN)}
    if other:
        raise TypeError(f"a call with {', '.join(sorted(other))} cannot be repeated without a trace")
    # Wrappers that talk to other ranks, or compile.
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod
        else:
            break
    args, kwargs = stand_in((args, dict(kwargs)), {})
    return flops_of(module, lambda: _differentiated(module(*args, **kwargs)))


def _differentiated(output: Any) -> torch.Tensor | None:
    """The loss in a model's output, else its logits, else all that takes gradients, summed."""
    for name in ("loss", "logits"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return value.sum()
    taking = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    return sum(t.sum().float() for t in taking if t.is_floating_point()) if taking else None


@contextmanager
def _before_each_call(module: nn.Module, do: Callable[[nn.Module, tuple, dict], None]) -> Iterator[None]:
    compiled = module._compiled_call_impl  # of `module.compile()`: its hooks are compiled with it
    if compiled is None:
        hook = module.register_forward_pre_hook(do, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        do(module, args, kwargs)
        return compiled(*args, **kwargs)

    module._compiled_call_impl = call
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


@contextmanager
def _counted_in_training(model: nn.Module, found: list[Flops | None]) -> Iterator[None]:
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        yield  # what is compiled under a counter stays uncompiled
        found.append(None)
        say_uncounted("a training batch", "its model is compiled, and sharded by FSDP")
        return
    forward = 0
    with counter() as counted:

        def after_forward(*_: Any) -> None:
            nonlocal forward
            forward = counted.total

        hook = model.register_forward_hook(after_forward)
        try:
            yield
        finally:
            hook.remove()
    found.append(Flops(3 * forward, counted.total))


def _features(rows: int, length: int) -> tuple[int, int, int]:
    return rows, rows * length, rows * length * length


def _size(inputs: Any) -> tuple[int, int]:
    """Rows and length of a batch: of ``input_ids``, else of its first tensor of two or more dimensions."""
    tensors = [inputs]
    if isinstance(inputs, Mapping):
        tensors = [inputs["input_ids"]] if "input_ids" in inputs else list(inputs.values())
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2:
            return tensor.shape[0], tensor.numel() // max(1, tensor.shape[0])
    return next((len(t), 1) for t in [*tensors, ()] if hasattr(t, "__len__"))
