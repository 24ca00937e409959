"""Run a model's loss and leave no trace: as if nobody had evaluated it.

In an evaluation all modules have `training = False`, gradients are off, an active autocast context, or else
the one that training's forward had, is active without its cache, and PEFT's DoRA norm cache is off: both
caches would keep values computed from weights that have moved since. Afterwards, also when an exception
passes through, each module has its own `training` flag again, and what forwards draw from and write stands
where it stood (`validation.restore`).

A stage runs in `optimizer.step()`, mostly outside of the autocast around training's forward. A base in 16
bits whose norms were upcast to float32 runs under it only; any other model has another loss under it.

`torch.no_grad` and not `inference_mode`: a buffer built lazily in here must stay usable for autograd later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ffkernels.ops.notices import announce_once
from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.ranks.parallelism import fsdp_modules, replicas, reshard
from ffkernels.validation.batches import Example
from ffkernels.validation.causal_lm import CausalLM, cuda_products_in_tf32, find_autocast, unwrap
from ffkernels.validation.flops import counter, say_uncounted
from ffkernels.validation.restore import (
    WrittenBuffers,
    attributes,
    keep_generators,
    keep_random_state,
    own_generators,
)

_no_training = 0  # contexts that are open


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What the autocast that is active for this kind of device casts to; None where none is."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def coarsest(
    tolerances: Mapping[Any, float],
    model: nn.Module,
    device: torch.device,
    wrappers: tuple[nn.Module, ...] = (),
    otherwise: torch.dtype | None = None,
) -> float:
    """The largest tolerance of the precisions at work in a forward: the parameters', TF32's on a GPU, that of
    the active autocast or else ``otherwise``, and that of an autocast around the forward of a wrapper.

    Args:
        tolerances: by dtype and for "tf32"; for None that of all others, since quantised weights, say, are
            computed in a 16-bit type.
    """
    at_work: set[Any] = {parameter.dtype for parameter in model.parameters()}
    wrapped = find_autocast(wrappers)
    at_work |= {autocast_dtype(device.type) or otherwise, wrapped and wrapped.fast_dtype} - {None}
    if device.type == "cuda" and torch.float32 in at_work and cuda_products_in_tf32():
        at_work.add("tf32")
    return max(tolerances.get(precision, tolerances[None]) for precision in at_work or {None})


@contextmanager
def uncached_autocast(device_type: str, otherwise: torch.dtype | None = None) -> Iterator[None]:
    """Keep the caller's autocast for `device_type`, if one is active, but not what its cache holds.

    Casts of weights that have moved since are stale. An autocast opened further inside brings its own
    cache, which is cleared only with the outermost context: so the cache is emptied on both sides.
    Where none is active, one to the dtype `otherwise` is, if given.
    """
    dtype = autocast_dtype(device_type) or otherwise
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


def is_training_forward() -> bool:
    """Whether a forward that runs now is one of training: with gradients, and not in ``no_training``."""
    return torch.is_grad_enabled() and not _no_training


@contextmanager
def no_training() -> Iterator[None]:
    """For evaluations, and for forwards that measure what training costs."""
    global _no_training
    _no_training += 1
    try:
        yield
    finally:
        _no_training -= 1


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
                stack.enter_context(no_training())
                stack.enter_context(keep_random_state(device))
                stack.enter_context(keep_generators(generators))
                stack.enter_context((buffers or WrittenBuffers()).put_back(model))
                stack.enter_context(_all_modules_in_eval(model))
                stack.enter_context(torch.no_grad())
                stack.enter_context(uncached_autocast(device.type, autocast))
                dora = sys.modules.get("peft.tuners.lora.dora")
                if getattr(dora, "ENABLE_DORA_CACHING", False):
                    stack.enter_context(attributes([(dora, "ENABLE_DORA_CACHING", False)]))
            yield
        finally:
            with interrupt_later():
                stack.close()


def needed_autocast(model: nn.Module, error: RuntimeError) -> torch.dtype | None:
    """What to cast to where a forward failed since it meets two dtypes; None where something else failed."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    narrow = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes]
    return narrow[0] if narrow and torch.float32 in dtypes and "dtype" in str(error) else None


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """``module``, or in the place of a container, which has no forward, what is in it."""
    if type(module).forward is not nn.Module.forward or "forward" in vars(module):
        yield module
    else:
        for child in module.children():
            yield from _called(child)


class TrainingAutocast:
    """A forward pre-hook that notes the autocast around each forward of training.

    Attributes:
        dtype: what it casts to, None for none. Before the first such forward: what was active when this was
            made.
    """

    is_harmless_before_a_bypassed_forward = True

    def __init__(self, kind: str) -> None:
        self.kind, self.dtype = kind, autocast_dtype(kind)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if is_training_forward():
            self.dtype = autocast_dtype(self.kind)

    def hooks(self, model: nn.Module) -> list[Any]:
        """Listen to this model, whichever of its wrappers training calls; the handles end that."""
        inner, wrappers = unwrap(model)
        heard = []
        for module in wrappers:
            heard.append(module.register_forward_pre_hook(self))
            if isinstance(getattr(module, "_orig_mod", None), nn.Module):
                return heard  # what is inside is compiled, and is not to be compiled anew
        return heard + [module.register_forward_pre_hook(self) for module in _called(inner)]


class Loss:
    """What an evaluator runs: one face for every way to a validation loss. As it is here, of no examples.

    Methods touch neither modes nor random state; the evaluator does. The attributes are those of the same
    name of a ``ValidationLoss``; ``flops`` is None until an evaluator has counted them.
    """

    examples = tokens = computed_tokens = 0
    lm: CausalLM | None = None
    rows: Sequence[Example] = ()
    example_tokens: torch.Tensor | None = None
    example_counts: list[int] | None = None
    flops: int | None = None

    def evaluate(self) -> torch.Tensor:
        """The loss, 0-dim float64."""
        raise NotImplementedError

    def measure(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, and S, the sums of NLL by example, (rows,) float64; None where there are none."""
        return self.evaluate(), None

    def part(self) -> Any:
        """Run what this process runs of it, without the others."""
        return self.evaluate()

    def swap(self, batches: list[dict[str, Any]]) -> bool:
        """Copy other examples over the present ones, if they fit: whether they were."""
        return False


class Evaluator:
    """Evaluations of one model.

    Args:
        device: where its inputs go; may be set anew.
        function: the loss function, if it is one.

    Attributes:
        is_collective: each forward waits for other processes (FSDP2).
    """

    def __init__(
        self, model: nn.Module, device: torch.device, function: Callable[..., Any] | None = None
    ) -> None:
        self.model, self.device = model, device
        self._fsdp, self._replicas = fsdp_modules(model), replicas(model)
        self.is_collective = bool(self._fsdp)
        self._training = TrainingAutocast(device.type)
        self._buffers = WrittenBuffers()
        self._generators = own_generators(model, function)

    @property
    def autocast(self) -> torch.dtype | None:
        """What an evaluation casts to where no autocast is active; None for nothing."""
        return self._training.dtype

    @property
    def written_buffers(self) -> list[str]:
        """Names of the buffers that evaluations were seen to write, and put back."""
        return list((self._buffers.names or {}).values())

    def listen(self, model: nn.Module) -> list[Any]:
        """Follow the autocast around this model's training forwards; the handles end that."""
        return self._training.hooks(model)

    def mode(self) -> AbstractContextManager[None]:
        return evaluation_mode(
            self.model,
            self.device,
            autocast=self.autocast,
            generators=self._generators,
            buffers=self._buffers,
        )

    def run(self, measure: Callable[[], Any]) -> Any:
        """Call ``measure`` in evaluation mode."""
        with self.mode():
            return self.forward(measure)

    def flops(self, loss: Loss) -> int:
        """FLOPs of this process's part of an evaluation, which is run for it, eagerly, the first time.

        0, announced, where an evaluation cannot be counted.
        """
        if loss.flops is None:
            try:
                with counter() as counted:
                    self.run(loss.part)
                loss.flops = counted.total
            except Exception as error:
                loss.flops = 0
                say_uncounted("the validation loss", error)
        return loss.flops

    def run_first(self, measure: Callable[[], Any]) -> Any:
        """The same, before any training: under an autocast where the model cannot be run without."""
        try:
            return self.run(measure)
        except RuntimeError as error:
            needed = needed_autocast(self.model, error)
            if needed is None or self.autocast is not None or torch.is_autocast_enabled(self.device.type):
                raise
            self._training.dtype, cause = needed, error
        try:
            found = self.run(measure)
        except RuntimeError:
            self._training.dtype = None
            raise cause from None
        kind, name = self.device.type, str(needed).removeprefix("torch.")
        announce_once(
            "validation-needs-autocast",
            f"{type(unwrap(self.model)[0]).__name__} runs under autocast only ({cause}): its validation loss "
            f"is computed under torch.autocast({kind!r}, torch.{name}) until training's forward says what it "
            "runs under",
        )
        return found

    def forward(self, measure: Callable[[], Any]) -> Any:
        """Call ``measure`` for those who hold the model in ``mode`` themselves.

        Under FSDP2: with parameters gathered anew, and given back. Under DDP: without its broadcasts.
        """
        if not self._fsdp:
            # Also without gradients, the first forward of DDP after a training step would broadcast rank 0's
            # buffers, and note that the next one, of training, need not.
            syncs = ("require_forward_param_sync", "require_backward_grad_sync")
            with attributes([(module, sync, False) for module in self._replicas for sync in syncs]):
                return measure()
        reshard(self._fsdp)
        try:
            return measure()
        finally:
            reshard(self._fsdp)
