"""The validation loss of any model: through `model(**batch)`, batches as given, or a function of the user's.

    L = Σ_batches loss(batch) · weight(batch) / Σ weight

The weight is the number of things over which the model's own mean runs, and the model is asked which these
are (`validation.mean`). It is also asked once whether it has a loss for such batches at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ffkernels.ops.notices import announce_once
from ffkernels.ranks.parallelism import fsdp_modules
from ffkernels.validation.batches import IGNORE, chosen_rows, count_rows, on_device
from ffkernels.validation.causal_lm import accepts_argument, unwrap
from ffkernels.validation.evaluator import Loss
from ffkernels.validation.mean import Mean, ask_mean
from ffkernels.validation.restore import attributes

_SHIFTING_LOSSES = ("ForCausalLM", "ForConditionalGeneration")


def size_of(batch: Mapping[str, Any]) -> int:
    """Elements of the largest tensor of a batch, padding included: what its forward costs, roughly."""
    return max((v.numel() for v in batch.values() if isinstance(v, torch.Tensor)), default=1)


class ModelCall:
    """The loss that a model itself returns for a batch; `named` where the last one was called so."""

    named = False

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.inner, _ = unwrap(model)
        # The forward of data-parallel wrappers would talk to the other ranks, which are not here.
        parallel = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        self.model = model.module if parallel else model
        self.device = device
        cached = hasattr(self.inner, "config") and accepts_argument(self.inner, "use_cache")
        self._extra = {"use_cache": False} if cached else {}

    def prepared(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return self._extra | on_device(batch, self.device)

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The loss of a prepared batch, a tensor of one element.

        Raises:
            ValueError: when the model returns none. A tensor without a name is one if it has no dimension;
                what has one is a prediction, even of one element.
        """
        output = self.model(**batch)
        self.named = isinstance(output, Mapping) or hasattr(output, "loss")
        if self.named:
            loss = output.get("loss") if isinstance(output, Mapping) else output.loss
        else:
            loss = (output or (None,))[0] if isinstance(output, (tuple, list)) else output
        if isinstance(loss, torch.Tensor) and (loss.numel() == 1 if self.named else loss.ndim == 0):
            return loss
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise ValueError(f"it returned no loss but {found}")


def ask_model(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    device: torch.device,
    reason: str,
    run: Callable[[Callable[[], torch.Tensor]], torch.Tensor],
) -> Mean:
    """Run the model once on one batch of each kind, and find out what its loss is the mean of.

    Args:
        reason: why it is not on the fast path.
        run: calls each forward, in evaluation mode.

    Raises:
        ValueError: when it returns no loss for such a batch, or raises.
    """
    call = ModelCall(model, device)
    gradients = GradientsWhereNeeded(call.model)

    def loss_of(batch: Mapping[str, Any]) -> torch.Tensor:
        return run(partial(gradients, partial(call, call.prepared(batch)))).detach()

    by_rows = sorted(range(len(batches)), key=lambda index: count_rows(batches[index]))
    for index in {tuple(sorted(map(str, batches[index]))): index for index in by_rows}.values():
        batch = batches[index]
        try:
            loss_of(batch)
            # One row's prediction may have no dimension either; that of two has.
            twice = None if call.named or count_rows(batch) > 1 else chosen_rows(batch, [0, 0])
            if twice is not None:
                loss_of(twice)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raised = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"{type(call.inner).__name__}(**batch) gives no loss for validation batch {index}, which has "
                f"{sorted(batch)}: {raised}{error}. Give the batches what the model makes a loss of (mostly "
                "labels), or pass a callable loss_fn(model) instead of batches. "
                f"The fast path was not taken: {reason}"
            ) from error
    inner, config = call.inner, getattr(call.inner, "config", None)
    guess = getattr(inner, "loss_type", None) in _SHIFTING_LOSSES
    segments = any(getattr(batch.get("labels"), "ndim", 0) == 3 for batch in batches)
    ignored = getattr(config, "semantic_loss_ignore_index", IGNORE) if segments else IGNORE
    return ask_mean(
        loss_of,
        batches,
        shifted=guess and not getattr(config, "is_encoder_decoder", False),
        ignored=ignored,
    )


class ModelLoss(Loss):
    """Weighted mean of `model(**batch)`'s losses; batches without a target are left out.

    `mean` is what `ask_model` found.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[dict[str, Any]],
        device: torch.device,
        mean: Mean,
    ) -> None:
        self.call, self.device = ModelCall(model, device), device
        self._run = GradientsWhereNeeded(self.call.model)
        weighed = [(batch, *mean.weigh(batch)) for batch in batches]
        self._use([(self.call.prepared(batch), *weight) for batch, *weight in weighed if weight[1]])
        self.for_company: list[dict[str, Any]] = []
        ids = [batch.get("input_ids") for batch in batches]
        known = all(isinstance(x, torch.Tensor) for x in ids)
        self.computed_tokens = sum(x.numel() for x in ids) if known else 0

    def _use(self, weighed: Sequence[tuple[dict[str, Any], int, int]]) -> None:
        """Run these batches, each with what its loss is multiplied by and how many targets that adds up."""
        self.weighed = list(weighed)
        self.tokens = sum(count for _, _, count in weighed)
        self.examples = sum(count_rows(batch) for batch in self.batches)

    @property
    def batches(self) -> list[dict[str, Any]]:
        return [batch for batch, _, _ in self.weighed]

    def keep(self, chosen: Sequence[int], forwards: int = 0) -> None:
        """Run only the `chosen` batches from now on, and in `forwards` forwards at least.

        Where each forward waits for other processes, those that have fewer batches run the smallest one for
        company, which counts for nothing.
        """
        smallest = min(self.batches, key=size_of, default={})
        self._use([self.weighed[i] for i in chosen])
        self.for_company = [smallest] * (forwards - len(chosen))

    def evaluate(self) -> torch.Tensor:
        return self.total() / self.tokens

    def total(self) -> torch.Tensor:
        """The sum over all targets, 0-dim float64; 0 without batches."""
        return self._run(self._total)

    def _total(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, factor, _ in self.weighed:
            total += self.call(batch).detach().to(self.device, torch.float64).reshape(()) * factor
        for batch in self.for_company:
            self.call.model(**batch)
        return total


class FunctionLoss(Loss):
    """What `function(model)` returns, as a 0-dim float64 tensor on `device`."""

    def __init__(self, function: Callable[[nn.Module], Any], model: nn.Module, device: torch.device) -> None:
        self.function, self.model, self.device = function, model, device
        self._run = GradientsWhereNeeded(model)

    def evaluate(self) -> torch.Tensor:
        return self._run(self._value)

    def _value(self) -> torch.Tensor:
        loss = self.function(self.model)
        if isinstance(loss, torch.Tensor):
            loss = loss.detach()
        try:
            value = torch.as_tensor(loss, dtype=torch.float64, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"loss_fn(model) returned {type(loss).__name__}: one number is needed") from error
        if value.numel() != 1:
            raise ValueError(
                f"loss_fn(model) returned a tensor of shape {tuple(value.shape)}: one number is needed"
            )
        return value.reshape(())


class GradientsWhereNeeded:
    """Calls the forward of one loss: without gradients, unless it differentiates inside (forces, penalties).

    One that fails without them and works with them has them from then on, and leaves none behind.

    Attributes:
        on: whether it was seen to differentiate.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.on = self._worked = False

    def __call__(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.on:
            return self._with_gradients(forward)
        try:
            found = forward()
        except RuntimeError as error:
            first = not self._worked and not torch.is_grad_enabled() and "grad" in str(error)
            # Where a forward is collective, the ranks would not all begin it anew.
            if not first or fsdp_modules(self.model):
                raise
            cause = error
        else:
            self._worked = True
            return found
        try:
            found = self._with_gradients(forward)
        except Exception:
            raise cause from None
        self.on = True
        announce_once(
            "validation-differentiates",
            f"the validation loss of {type(unwrap(self.model)[0]).__name__} differentiates inside, so it is "
            "computed with gradients on and keeps what a backward pass needs; to save that memory, put "
            "torch.enable_grad() around the part that differentiates",
        )
        return found

    def _with_gradients(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        # Gradients that come up inside, as by `backward()`, do not add to those that training has.
        training = [(p, "grad", None) for p in self.model.parameters() if p.requires_grad]
        with torch.enable_grad(), attributes(training):
            return forward()
