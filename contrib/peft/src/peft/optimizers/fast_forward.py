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
This module contains Fast Forward: every few optimizer steps, the last update is repeated for as long as that lowers
the loss on a tiny validation set.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..helpers import DoraCaching
from ..peft_model import PeftModel


Validation = Callable[[nn.Module], Any] | Iterable[Mapping[str, Any]]

# The parabolic search ends when the parabola promises less than this share of the decrease found so far.
_REFINE_TOLERANCE = 5e-4
_GOLDEN = 0.3819660112501051  # (3 - sqrt(5)) / 2
# What must survive a restart is kept in the first parameter group, because that is part of the `state_dict` of every
# optimizer, also of those that override `load_state_dict` (e.g. bitsandbytes).
_STEP, _FAILURES = "fast_forward_step", "fast_forward_failures"


def _linear_search(measure: Callable[[int], float], baseline: float, max_tau: int) -> None:
    """The search of the paper: one repetition after the other until the loss does not decrease."""
    best, tau = baseline, 1
    while tau <= max_tau and (loss := measure(tau)) < best:
        best, tau = loss, tau + 1


def _parabolic_search(measure: Callable[[int], float], baseline: float, max_tau: int) -> None:
    """Doubles tau until the loss does not decrease, then refines inside the bracket a < b < c with parabola vertices,
    or golden sections where the parabola does not keep its promises."""
    losses = {0: baseline}
    a, b, c = 0, 0, 1
    while c > b:
        losses[c] = measure(c)
        if not losses[c] < losses[b]:
            break
        a, b, c = b, c, min(2 * c, max_tau)
    c = max(c, b + 1)  # still decreasing at the limit: a bracket that ends behind it

    vertices = 0
    misses = [math.inf, math.inf]  # by how much the parabola was wrong about the losses
    while c - a > 2 and len(losses) < int(2 * math.log2(max_tau)) + 6:
        fa, fb, fc = losses[a], losses[b], losses.get(c, math.inf)
        left, right = (fb - fa) / (b - a), (fc - fb) / (c - b)
        curvature = (right - left) / (c - a)
        sign, longer_side = (1, c - b) if c - b >= b - a else (-1, b - a)
        golden_section = b + sign * max(1, math.floor(_GOLDEN * longer_side + 0.5))
        tau, predicted = golden_section, math.inf
        if c > max_tau:
            tau = max_tau - 1  # tells whether the minimum has been passed
        elif 0.0 < curvature < math.inf:
            vertex = 0.5 * (a + b) - 0.5 * left / curvature
            nearest = min(max(math.floor(vertex + 0.5), a + 1), c - 1)
            promise = fb - (fb + (nearest - b) * (left + curvature * (nearest - a)))
            if promise + max(misses[-2:]) <= _REFINE_TOLERANCE * (baseline - fb):
                return
            if vertices < 2:  # on the best point, another on the longer side tells whether the parabola is right
                tau = nearest if nearest != b else b + sign * max(1, longer_side // 4)
            vertices += 1
            predicted = fb + (tau - b) * (left + curvature * (tau - a))
        losses[tau] = loss = measure(tau)
        misses.append(abs(loss - predicted) if math.isfinite(loss) else math.inf)
        if loss < fb:  # the former best becomes the end of the bracket on its side
            a, b, c = (b, tau, c) if tau > b else (a, tau, b)
        else:
            a, c = (a, tau) if tau > b else (tau, c)


_SEARCHES = {"parabolic": _parabolic_search, "linear": _linear_search}


@contextmanager
def _evaluation_mode(model: nn.Module, devices: set[torch.device]) -> Iterator[None]:
    """Eval mode that leaves no trace: what is switched off and the RNG states are put back."""
    # Not with `.eval()` and `.train()`: these would also switch modules that the user has put in eval mode.
    switched_on = [(module, "training") for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None):  # in eval mode, transformers models would build a KV cache
        switched_on.append((config, "use_cache"))
    accelerators = [device for device in devices if device.type in ("cuda", "xpu", "npu")]
    device_type = accelerators[0].type if accelerators else "cuda"
    # The weights change between two forward passes, cached weight norms would be outdated.
    with torch.random.fork_rng(accelerators, device_type=device_type), DoraCaching(enabled=False):
        try:
            for owner, name in switched_on:
                setattr(owner, name, False)
            yield
        finally:
            for owner, name in switched_on:
                setattr(owner, name, True)
            torch.clear_autocast_cache()


def _number_of_targets(batch: Mapping[str, Any], shift: bool) -> int:
    """Number of labels that the mean loss of this batch runs over (rows, if there are no token labels)."""
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return int((labels[:, 1:] if shift else labels).ne(-100).sum())
    return next((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim), 1)


@dataclass
class FastForwardStage:
    """What one Fast Forward stage did."""

    step: int  # the optimizer step that it followed, counted from 1
    tau: int = 0  # how many times the update was repeated in the end
    losses: list[tuple[int, float]] = field(default_factory=list)  # each tau that was measured and the loss there


@dataclass(eq=False, repr=False)
class FastForward:
    """Adds Fast Forward to an existing optimizer, e.g. from [`create_loraplus_optimizer`] or prepared by accelerate.

    See [`create_fast_forward_optimizer`]. A copy of the optimizer is a plain one until it is given to this class.
    """

    optimizer: Optimizer
    model: nn.Module
    validation: Validation
    interval: int = 6
    warmup_steps: int = 0
    search: str = "parabolic"
    max_tau: int = 1024
    patience: int | None = 3
    stages: list[FastForwardStage] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not hasattr(self.optimizer, "_optimizer_step_pre_hooks"):  # accelerate's wrapper has no hooks of its own
            self.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer, name = self.optimizer, type(self.optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {name}.")
        if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
            raise ValueError(
                f"{name} is a schedule-free optimizer, it evaluates other weights than it trains. Use another."
            )
        if getattr(optimizer, "fast_forward", None) is not None:
            raise ValueError("This optimizer already does Fast Forward. Create a new one to change the settings.")
        for name, low in (("interval", 1), ("warmup_steps", 0), ("max_tau", 1), ("patience", 1)):
            value = getattr(self, name)
            if (type(value) is not int or value < low) and not (name == "patience" and value is None):
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}.")
        if self.search not in _SEARCHES:
            raise ValueError(f"search must be one of {list(_SEARCHES)}, got {self.search!r}.")
        if not callable(self.validation):
            data = self.validation = list(self.validation)
            if not data or not all(isinstance(b, Mapping) and any(map(torch.is_tensor, b.values())) for b in data):
                raise ValueError(
                    "validation must be a function that takes the model and returns its loss, or a list of at least "
                    f"one batch, a dict of tensors as the data collator returns it; got {data!r:.100}."
                )
        if any(weight.dtype in (torch.bfloat16, torch.float16) for weight in self._trainable_weights()):
            warnings.warn("16-bit dtypes round repeated updates away. Keep the trainable parameters in float32.")
        # Inside of a step: the weights to move and their copies from before it, empty if no stage follows.
        self._before: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.fast_forward = self

    def _trainable_weights(self) -> list[torch.Tensor]:
        of_model = {id(param) for param in self.model.parameters() if param.requires_grad}
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        weights = [param for param in params if id(param) in of_model and param.numel() > 0]
        # attributes of a DTensor (FSDP2, tensor parallelism), and set by DeepSpeed ZeRO-3 and FSDP1
        if any(hasattr(weight, name) for weight in weights for name in ("device_mesh", "ds_id", "_fsdp_flattened")):
            raise ValueError("sharded parameters (FSDP, ZeRO-3, tensor parallelism) are not supported, use DDP.")
        if not weights:
            raise ValueError(
                "None of the optimizer's parameters is a trainable parameter of the model. Create the optimizer from "
                "this model, also anew after its adapter was switched or merged, and not one that updates copies."
            )
        # Tied adapters may be different parameters in the same memory, which must be moved only once.
        return list({(weight.device, weight.data_ptr() or id(weight)): weight for weight in weights}.values())

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # A subclass that calls super().step() may run the hooks twice in one step. The innermost pair counts: after a
        # step that raised there is no telling a second call from a nested one, other than by looking at the stack.
        group = optimizer.param_groups[0]
        steps = group.get(_STEP, 0) + 1 - self.warmup_steps
        given_up = self.patience is not None and group.get(_FAILURES, 0) >= self.patience
        due = steps > 0 and steps % self.interval == 0 and not given_up
        self._before = [(weight, weight.detach().clone()) for weight in self._trainable_weights()] if due else []

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        group = optimizer.param_groups[0]
        group[_STEP] = group.get(_STEP, 0) + 1
        if before:
            self._run_stage(group, [weight for weight, _ in before], [old for _, old in before])

    @torch.no_grad()
    def _run_stage(self, group: dict[str, Any], weights: list[torch.Tensor], best: list[torch.Tensor]) -> None:
        delta = torch._foreach_sub(weights, best)
        torch._foreach_copy_(best, weights)
        stage = FastForwardStage(step=group[_STEP])
        self.stages.append(stage)
        device = weights[0].device
        norms = torch._foreach_norm(delta, math.inf)
        if not 0.0 < torch.stack([norm.to(device, torch.float32) for norm in norms]).max().item() < math.inf:
            return  # nothing to repeat, e.g. a fused optimizer skipped the step, or it is broken

        best_loss = math.inf

        def measure(tau: int) -> float:
            nonlocal best_loss
            if tau:  # weights <- best + (tau - tau of best) * delta, without a temporary copy
                torch._foreach_copy_(weights, delta)
                torch._foreach_mul_(weights, float(tau - stage.tau))
                torch._foreach_add_(weights, best)
            loss = self._validation_loss(device)
            stage.losses.append((tau, loss))
            if -math.inf < loss < best_loss:
                torch._foreach_copy_(best, weights)
                best_loss, stage.tau = loss, tau
            return loss if math.isfinite(loss) else math.inf

        try:
            with _evaluation_mode(self.model, {weight.device for weight in weights}):
                baseline = measure(0)  # the weights after the optimizer's own step
                if baseline < math.inf:
                    _SEARCHES[self.search](measure, baseline, self.max_tau)
        finally:
            # Whatever happened: the weights are exactly the best ones that were validated.
            torch._foreach_copy_(weights, best)
        if baseline < math.inf:
            group[_FAILURES] = 0 if stage.tau else group.get(_FAILURES, 0) + 1

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
                loss = self.model(**batch).loss
                if loss is None:
                    raise ValueError("The model returned no loss for a validation batch. Add labels to the batches.")
                total += float(loss) * weight
                number += weight
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # All ranks see the same number and hence take the same decisions; they may validate different examples.
            reduced = torch.tensor([total, number], dtype=torch.float64, device=device)
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
    search: str = "parabolic",
    max_tau: int = 1024,
    patience: int | None = 3,
    **kwargs,
) -> Optimizer:
    """
    Creates an optimizer with Fast Forward: every `interval` steps, the last update of the trainable parameters is
    repeated for as long as that lowers the loss on a tiny validation set.

    Fast Forwarding Low-Rank Training: https://huggingface.co/papers/2409.04206

    The optimizer behaves like one of `optimizer_cls`, except that some calls of `step` take longer and move further.
    After each, the weights are never worse on the validation set than after the optimizer's own step, also when it was
    interrupted. The optimizer's state, gradients, training flags, and RNG are as if there had been no stage. The
    `state_dict` resumes exactly. During a stage, two copies of the trainable parameters are held. Steps are saved when
    the learning rate is small; there is no gain over a learning rate that has been tuned.

    Args:
        model (`torch.nn.Module`): The model to be optimized, typically a [`PeftModel`].
        optimizer_cls (`type[torch.optim.Optimizer]`): The optimizer class to be used, e.g. `torch.optim.AdamW`.
        lr (`float`): The learning rate to be used for the optimizer.
        validation (`Callable` or `Iterable[dict]`):
            Batches that the model returns a loss for (averaged over all label tokens), or a function that takes the
            model, in eval mode and without gradients, and returns its loss. Typically of 32 examples that are neither
            trained on nor reported. With several processes (DDP), each may be given different ones.
        interval (`int`): The number of optimizer steps from one stage to the next.
        warmup_steps (`int`): The number of optimizer steps before the first interval, e.g. the learning rate's warmup.
        search (`str`):
            `"linear"`, the search of the paper, takes one repetition after the other until the loss does not decrease.
            `"parabolic"` tries 1, 2, 4, ... and refines. It needs far fewer losses and is less sensitive to noise.
        max_tau (`int`): The maximum number of repetitions in one stage.
        patience (`int`, *optional*): After how many stages in a row without a single repetition there are no more.
        kwargs (`dict`): Additional keyword arguments to be passed to the optimizer.

    Returns:
        `torch.optim.Optimizer`: An instance of `optimizer_cls`. `optimizer.fast_forward.stages` tells what was done.
    """
    trainable_params = [param for param in model.parameters() if param.requires_grad]
    optimizer = optimizer_cls(trainable_params, lr=lr, **kwargs)
    FastForward(optimizer, model, validation, interval, warmup_steps, search, max_tau, patience)
    return optimizer
