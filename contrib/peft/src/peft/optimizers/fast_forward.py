# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
This module contains the implementation of Fast Forward: every few optimizer steps, the last update is repeated for as
long as that lowers the loss on a tiny validation set.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import torch
from torch import nn
from torch.optim import Optimizer

from ..helpers import DoraCaching
from ..peft_model import PeftModel


# The search over tau, the number of times that the last update is repeated, is a generator: it yields the tau to
# measure next and is sent the loss there (inf if not finite). The first tau is 0, the plain optimizer's weights.
Search = Generator[int, float, None]
Validation = Union[Callable[[nn.Module], Any], Iterable[Mapping[str, Any]]]

# The parabolic search ends when the parabola promises less than this share of the decrease found so far.
_REFINE_TOLERANCE = 5e-4
_GOLDEN = 0.3819660112501051  # (3 - sqrt(5)) / 2
# Optimizer state that must survive a restart is kept in the first parameter group: it is part of the `state_dict` of
# every optimizer, also of those that override `load_state_dict` (e.g. bitsandbytes).
_STEP_KEY = "fast_forward_step"
_FAILURES_KEY = "fast_forward_failures"
# Attributes that mark a parameter as a shard: DTensor (FSDP2, TP), DeepSpeed ZeRO-3, FSDP1.
_SHARD_ATTRIBUTES = ("device_mesh", "ds_id", "_fsdp_flattened")


def _linear_search(max_tau: int) -> Search:
    """The search of the paper: one step after the other until the loss does not decrease."""
    best = yield 0
    for tau in range(1, max_tau + 1):
        loss = yield tau
        if not loss < best:
            return
        best = loss


def _golden_section(a: int, b: int, c: int) -> int:
    if c - b >= b - a:
        return b + max(1, math.floor(_GOLDEN * (c - b) + 0.5))
    return b - max(1, math.floor(_GOLDEN * (b - a) + 0.5))


def _parabolic_search(max_tau: int) -> Search:
    """Doubles tau until the loss does not decrease, then refines inside the bracket a < b < c with parabola vertices.

    Golden sections are taken where the parabola does not keep its promises. At most `2 * log2(max_tau) + 6` losses are
    measured.
    """
    budget = int(2 * math.log2(max_tau)) + 6
    evaluations = 2
    a, fa, b, tau = 0, math.inf, 0, 1
    baseline = fb = yield 0
    while (loss := (yield tau)) < fb:
        a, fa, b, fb = b, fb, tau, loss
        if tau == max_tau:
            break
        tau = min(2 * tau, max_tau)
        evaluations += 1
    if b == 0:
        return
    next_tau = None
    if b == max_tau:
        # Still decreasing at the limit: the point before it tells whether the minimum has been passed.
        c, fc = max_tau + 1, math.inf
        if b - a == 1:
            return
        next_tau = max_tau - 1
    else:
        c, fc = tau, loss

    vertices = 0
    predicted = last_miss = miss = math.inf
    while True:
        if next_tau is not None:
            loss = yield next_tau
            evaluations += 1
            miss = abs(loss - predicted)
            if not math.isfinite(miss):
                miss = math.inf
            if loss < fb:  # the former best becomes the end of the bracket on its side
                if next_tau > b:
                    a, fa = b, fb
                else:
                    c, fc = b, fb
                b, fb = next_tau, loss
            elif next_tau > b:
                c, fc = next_tau, loss
            else:
                a, fa = next_tau, loss
        wrong, last_miss = max(miss, last_miss), miss
        if c - a <= 2 or evaluations >= budget:
            return
        left = (fb - fa) / (b - a)
        right = (fc - fb) / (c - b)
        curvature = (right - left) / (c - a)
        if not 0.0 < curvature < math.inf:
            predicted, next_tau = math.inf, _golden_section(a, b, c)
            continue
        vertex = 0.5 * (a + b) - 0.5 * left / curvature
        next_tau = min(max(math.floor(vertex + 0.5), a + 1), c - 1)
        promise = fb - (fb + (next_tau - b) * (left + curvature * (next_tau - a)))
        if promise + wrong <= _REFINE_TOLERANCE * (baseline - fb):
            return
        if vertices < 2:
            vertices += 1
            if next_tau == b:  # a point on the longer side tells whether the parabola is right about its vertex
                next_tau = b + max(1, (c - b) // 4) if c - b >= b - a else b - max(1, (b - a) // 4)
        else:
            next_tau = _golden_section(a, b, c)
        predicted = fb + (next_tau - b) * (left + curvature * (next_tau - a))


_SEARCHES: dict[str, Callable[[int], Search]] = {"parabolic": _parabolic_search, "linear": _linear_search}


@contextmanager
def _evaluation_mode(model: nn.Module, devices: set[torch.device]) -> Iterator[None]:
    """Eval mode that leaves no trace: per-module training flags and RNG states are put back."""
    in_training = [module for module in model.modules() if module.training]
    # In eval mode, transformers models would build a KV cache that nothing reads.
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            if device.type in ("cuda", "xpu", "npu"):
                stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        # The weights change between two forward passes, cached weight norms would be outdated.
        stack.enter_context(DoraCaching(enabled=False))
        try:
            # Not with `.eval()` and `.train()`: these would also switch modules that the user has put in eval mode.
            for module in in_training:
                module.training = False
            if use_cache:
                config.use_cache = False
            yield
        finally:
            for module in in_training:
                module.training = True
            if use_cache:
                config.use_cache = use_cache
            torch.clear_autocast_cache()


def _number_of_targets(batch: Mapping[str, Any], shift: bool) -> int:
    """Number of labels that the mean loss of this batch runs over (rows, if there are no token labels)."""
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return int((labels[:, 1:] if shift else labels).ne(-100).sum())
    return next((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim), 1)


@dataclass
class FastForwardStage:
    """
    What one Fast Forward stage did.

    Args:
        step (`int`): The optimizer step that it followed, counted from 1.
        tau (`int`): How many times the update was repeated in the end; 0 means that the plain update was kept.
        losses (`list[tuple[int, float]]`): Each tau that was measured and the validation loss there, in order.
    """

    step: int
    tau: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)


class FastForward:
    """
    Adds Fast Forward to an existing optimizer. Use [`create_fast_forward_optimizer`] unless the optimizer comes from
    somewhere else, e.g. from [`create_loraplus_optimizer`].

    The weights are moved inside `optimizer.step()`, with hooks before and after the original step. Between two calls
    of `step`, nothing is stored apart from two integers in the first parameter group. They are part of the optimizer's
    `state_dict`, so after `load_state_dict` the interval and `patience` go on where they were. The hooks are not part
    of it, nor of a copy of the optimizer. During a stage, two copies of the trainable parameters exist: the best
    weights so far and the update. Frozen parameters are never copied.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, also one that was prepared by accelerate.
        model (`torch.nn.Module`): The model that is trained.
        validation (`Callable` or `Iterable[dict]`): See [`create_fast_forward_optimizer`].
        interval (`int`), warmup_steps (`int`), search (`str`), max_tau (`int`), patience (`int`):
            See [`create_fast_forward_optimizer`].

    Attributes:
        stages (`list[FastForwardStage]`): The stages since this object was created.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        validation: Validation,
        *,
        interval: int = 6,
        warmup_steps: int = 0,
        search: Literal["parabolic", "linear"] = "parabolic",
        max_tau: int = 1024,
        patience: Optional[int] = 3,
    ) -> None:
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks of its own
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise ValueError(
                f"{type(optimizer).__name__} is a schedule-free optimizer: it trains other weights than those that are "
                "evaluated, Fast Forward would only move one of them. Use an optimizer without train() and eval()."
            )
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if getattr(optimizer, "fast_forward", None) is not None:
            raise ValueError("This optimizer already does Fast Forward, call optimizer.fast_forward.remove() first.")
        for name, value, low in (
            ("interval", interval, 1),
            ("warmup_steps", warmup_steps, 0),
            ("max_tau", max_tau, 1),
            ("patience", patience, 1),
        ):
            if name == "patience" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}.")
        if search not in _SEARCHES:
            raise ValueError(f"search must be one of {list(_SEARCHES)}, got {search!r}.")

        if not callable(validation):
            if isinstance(validation, Mapping) or not isinstance(validation, Iterable):
                raise TypeError(
                    "validation must be a function that takes the model and returns its loss, or a list of batches "
                    f"(dicts), got {type(validation).__name__}."
                )
            validation = list(validation)
            if not validation or not all(isinstance(batch, Mapping) for batch in validation):
                raise ValueError("validation must contain at least one batch, and each batch must be a dict.")
            if not all(any(isinstance(value, torch.Tensor) for value in batch.values()) for batch in validation):
                raise ValueError(
                    "Each validation batch must contain tensors. Pass what the data collator returns, not the dataset."
                )

        self.optimizer = optimizer
        self.model = model
        self.validation = validation
        self.interval = interval
        self.warmup_steps = warmup_steps
        self.search = search
        self.max_tau = max_tau
        self.patience = patience
        self.stages: list[FastForwardStage] = []

        self._weights: list[torch.Tensor] = []
        self._previous: Optional[list[torch.Tensor]] = None
        self._in_step = False
        if any(weight.dtype in (torch.bfloat16, torch.float16) for weight in self._trainable_weights()):
            warnings.warn(
                "Some trainable parameters are bfloat16 or float16. Most of a repeated update is rounded away in these "
                "dtypes and Fast Forward will find fewer steps. Keep the trainable parameters in float32, e.g. with "
                "autocast_adapter_dtype=True, the default of get_peft_model."
            )
        optimizer.param_groups[0].setdefault(_STEP_KEY, 0)
        optimizer.param_groups[0].setdefault(_FAILURES_KEY, 0)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        optimizer.fast_forward = self

    @property
    def active(self) -> bool:
        """Whether there will be more stages, i.e. `patience` has not run out."""
        failures = self.optimizer.param_groups[0].get(_FAILURES_KEY, 0)
        return bool(self._hooks) and (self.patience is None or failures < self.patience)

    def remove(self) -> None:
        """Take Fast Forward off the optimizer, which goes on as a plain one, as if it had never been on it."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        for key in (_STEP_KEY, _FAILURES_KEY):
            self.optimizer.param_groups[0].pop(key, None)
        self._hooks, self._weights, self._previous = [], [], None
        self.optimizer.fast_forward = None

    def _trainable_weights(self) -> list[torch.Tensor]:
        of_model = {id(param) for param in self.model.parameters() if param.requires_grad}
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        weights = [param for param in params if id(param) in of_model and param.numel() > 0]
        if any(hasattr(weight, name) for weight in weights for name in _SHARD_ATTRIBUTES):
            raise ValueError(
                "Fast Forward does not support sharded parameters (FSDP, DeepSpeed ZeRO-3, tensor parallelism). Use DDP."
            )
        if not weights:
            raise ValueError(
                "None of the optimizer's parameters is a trainable parameter of the model, there is nothing to fast "
                "forward. Create the optimizer from this model. Optimizers that update their own copies of the "
                "parameters (e.g. with DeepSpeed) are not supported. If another adapter was activated, or this one was "
                "merged or unloaded, call optimizer.fast_forward.remove() first."
            )
        # Tied adapters may be different parameters in the same memory, which must be moved only once.
        return list({(weight.device, weight.data_ptr() or id(weight)): weight for weight in weights}.values())

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # A subclass that calls super().step() may run the hooks twice in one step. The innermost pair counts: after a
        # step that raised there is no telling a second call from a nested one, other than by looking at the stack.
        self._in_step = True
        self._previous = None
        steps = optimizer.param_groups[0].get(_STEP_KEY, 0) + 1 - self.warmup_steps
        if self.active and steps > 0 and steps % self.interval == 0:
            self._weights = self._trainable_weights()
            self._previous = [weight.detach().clone() for weight in self._weights]

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._in_step:
            return
        self._in_step = False
        group = optimizer.param_groups[0]
        # Loading the state of a plain optimizer removes the keys.
        group[_STEP_KEY] = group.get(_STEP_KEY, 0) + 1
        group.setdefault(_FAILURES_KEY, 0)
        weights, previous = self._weights, self._previous
        self._weights, self._previous = [], None
        if previous is not None:
            self._run_stage(weights, previous)

    @torch.no_grad()
    def _run_stage(self, weights: list[torch.Tensor], best: list[torch.Tensor]) -> None:
        delta = torch._foreach_sub(weights, best)
        torch._foreach_copy_(best, weights)
        stage = FastForwardStage(step=self.optimizer.param_groups[0][_STEP_KEY])
        self.stages.append(stage)
        norms = torch._foreach_norm(delta, math.inf)
        largest = torch.stack([norm.to(weights[0].device, torch.float32) for norm in norms]).max().item()
        if largest == 0.0 or not math.isfinite(largest):
            # No update, e.g. because a fused optimizer skipped it when the GradScaler found infs, or a broken one.
            return

        search = _SEARCHES[self.search](self.max_tau)
        tau = next(search)
        best_loss = math.inf
        try:
            with _evaluation_mode(self.model, {weight.device for weight in weights}):
                while True:
                    loss = self._validation_loss(weights[0].device)
                    stage.losses.append((tau, loss))
                    if not math.isfinite(loss):
                        loss = math.inf
                    if loss < best_loss:
                        if tau:  # for tau = 0, best has these weights already
                            torch._foreach_copy_(best, weights)
                        best_loss, stage.tau = loss, tau
                    elif tau == 0:
                        break  # the validation loss is not finite before the first step
                    try:
                        tau = search.send(loss)
                    except StopIteration:
                        break
                    # weights <- best + (tau - tau of best) * delta, without a temporary copy
                    torch._foreach_copy_(weights, delta)
                    torch._foreach_mul_(weights, float(tau - stage.tau))
                    torch._foreach_add_(weights, best)
        finally:
            # Whatever happened: the weights are exactly the best ones that were validated.
            torch._foreach_copy_(weights, best)
        if best_loss < math.inf:
            group = self.optimizer.param_groups[0]
            group[_FAILURES_KEY] = 0 if stage.tau else group.get(_FAILURES_KEY, 0) + 1

    def _validation_loss(self, device: torch.device) -> float:
        torch.clear_autocast_cache()  # it holds casts of weights that have moved since
        total, number = 0.0, 0
        if callable(self.validation):
            total, number = float(self.validation(self.model)), 1
        else:
            shift = not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            for batch in self.validation:
                weight = _number_of_targets(batch, shift)
                if weight == 0:
                    continue
                batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                loss = getattr(self.model(**batch), "loss", None)
                if loss is None:
                    raise ValueError(
                        "The model returned no loss for a validation batch. Add labels to the batches, or pass a "
                        "function that takes the model and returns its loss."
                    )
                total += float(loss) * weight
                number += weight
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # All ranks see the same number and hence take the same decisions; they may validate different examples.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            reduced = torch.tensor([total, number], dtype=dtype, device=device)
            torch.distributed.all_reduce(reduced)
            total, number = reduced.tolist()
        if number == 0:
            raise ValueError("There is no label in the validation batches, all of them are -100.")
        return total / number


def create_fast_forward_optimizer(
    model: PeftModel,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    validation: Validation,
    interval: int = 6,
    warmup_steps: int = 0,
    search: Literal["parabolic", "linear"] = "parabolic",
    max_tau: int = 1024,
    patience: Optional[int] = 3,
    **kwargs,
) -> Optimizer:
    """
    Creates an optimizer with Fast Forward: every `interval` steps, the last update of the trainable parameters is
    repeated for as long as that lowers the loss on a tiny validation set.

    Fast Forwarding Low-Rank Training: https://huggingface.co/papers/2409.04206

    The returned optimizer is an instance of `optimizer_cls` and behaves like it, except that some calls of `step` take
    longer and move further. The training loop, or [`~transformers.Trainer`], does not change. After each `step` the
    model holds plain weights: they can be saved or evaluated at any time, and are never worse on the validation set
    than those of the optimizer's own step. When a stage is interrupted, the best weights so far are restored. The
    optimizer's state (e.g. the moments of Adam), the gradients, the training flags of all modules, and the state of
    PyTorch's random number generators are as if there had been no stage. A step that is skipped by a `GradScaler` is
    followed by no stage.

    During a stage, two copies of the trainable parameters are held, and no gradients or activations are stored. After
    it, nothing is.

    Fast Forward saves steps when the learning rate is small. It saves nothing compared to a learning rate that has
    been tuned; it is meant for the case that there is no time to tune it.

    Args:
        model (`torch.nn.Module`): The model to be optimized, typically a [`PeftModel`].
        optimizer_cls (`type[torch.optim.Optimizer]`): The optimizer class to be used, e.g. `torch.optim.AdamW`.
        lr (`float`): The learning rate to be used for the optimizer.
        validation (`Callable` or `Iterable[dict]`):
            What the loss of a stage is measured on, typically 32 examples that are neither trained on nor reported.
            Either a list of batches that are passed to the model as keyword arguments, which must include what it needs
            to return a loss. The losses of several batches are averaged over all label tokens, so the result does not
            depend on how the examples are batched. Or a function that takes the model and returns the loss; it is
            called with the model in eval mode and without gradients. With several processes (DDP), each may be given
            different examples; the loss is averaged over all of them.
        interval (`int`): The number of optimizer steps from one stage to the next.
        warmup_steps (`int`):
            The number of optimizer steps before the first interval starts, e.g. those of the learning rate's warmup.
        search (`"parabolic"` or `"linear"`):
            How to find the number of repetitions tau. `"linear"` is the search of the paper: one repetition after the
            other, until the loss does not decrease. `"parabolic"` measures tau = 1, 2, 4, ..., until the loss does not
            decrease, and then refines. It needs far fewer validation losses and is less sensitive to noise in them.
        max_tau (`int`): The maximum number of repetitions in one stage.
        patience (`int`, *optional*):
            After this many stages in a row in which not even a single repetition helped, there are no further stages.
            `None` means that there always are.
        kwargs (`dict`): Additional keyword arguments to be passed to the optimizer.

    Returns:
        `torch.optim.Optimizer`: An instance of `optimizer_cls` with an additional attribute `fast_forward`. What each
        stage did is in `optimizer.fast_forward.stages`, a list of `FastForwardStage`.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    trainable_params = [param for param in model.parameters() if param.requires_grad]
    if not trainable_params:
        raise ValueError("create_fast_forward_optimizer did not find any trainable parameters on the model.")

    optimizer = optimizer_cls(trainable_params, lr=lr, **kwargs)
    FastForward(
        optimizer,
        model,
        validation,
        interval=interval,
        warmup_steps=warmup_steps,
        search=search,
        max_tau=max_tau,
        patience=patience,
    )
    return optimizer
