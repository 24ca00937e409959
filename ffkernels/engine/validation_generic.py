"""The validation loss of any model: through `model(**batch)`, batches as given, or a function of the user's.

    L = Σ_batches loss(batch) · weight(batch) / Σ weight

The weight is the number of targets over which the model's own mean runs.

For causal language models these are the labels after the shift, `labels[:, 1:] != −100`; encoder-decoder
models, masked and token classification do not shift; labels that are one number or one vector per row
count rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ffkernels.engine.causal_lm import accepts_argument, unwrap
from ffkernels.engine.validation_batches import IGNORE
from ffkernels.engine.validation_gradients import GradientsWhereNeeded

__all__ = ["FunctionLoss", "ModelLoss", "count_targets", "is_loss_function", "size_of"]

_SHIFTING_LOSSES = (None, "ForCausalLM", "ForConditionalGeneration")


def count_targets(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Over how many targets the mean of the model's own loss runs."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.ndim == 0:
        return _rows(batch)
    config = getattr(model, "config", None)
    shifted = (
        labels.ndim == 2
        and "input_ids" in batch
        and not getattr(config, "is_encoder_decoder", False)
        and getattr(model, "loss_type", None) in _SHIFTING_LOSSES
    )
    return int((labels[:, 1:] if shifted else labels).ne(IGNORE).sum())


def _names_labels(model: nn.Module) -> bool:
    """Whether this is a transformers model whose loss comes from an argument called labels."""
    parameters = inspect.signature(type(model).forward).parameters
    return hasattr(model, "config") and "labels" in parameters


def size_of(batch: Mapping[str, Any]) -> int:
    """Elements of the largest tensor of a batch, padding included: what its forward costs, roughly."""
    return max((v.numel() for v in batch.values() if isinstance(v, torch.Tensor)), default=1)


def _rows(batch: Mapping[str, Any]) -> int:
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return value.shape[0]
    return 1


class ModelLoss:
    """Weighted mean of `model(**batch)`'s losses: calling it returns a 0-dim float64 tensor on `device`.

    `scored` targets in `rows` rows; batches without a target are left out.
    """

    def __init__(self, model: nn.Module, batches: list[dict[str, Any]], device: torch.device) -> None:
        inner, _ = unwrap(model)
        # The forward of data-parallel wrappers would talk to the other ranks, which are not here.
        parallel = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        self.model = model.module if parallel else model
        self._run = GradientsWhereNeeded(self.model)
        self.device = device
        for index, batch in enumerate(batches):
            if "labels" not in batch and _names_labels(inner):
                raise ValueError(
                    f"validation batch {index} has no labels, only {sorted(batch)}, and "
                    f"{type(inner).__name__} needs them for a loss"
                )
        weighted = [(batch, count_targets(inner, batch)) for batch in batches]
        self.weights = [weight for _, weight in weighted if weight]
        self.scored = sum(self.weights)
        extra = {}
        if hasattr(inner, "config") and accepts_argument(inner, "use_cache"):
            extra["use_cache"] = False
        self.batches = [
            extra | {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            for batch, weight in weighted
            if weight
        ]
        self.rows = sum(_rows(batch) for batch in self.batches)
        self.for_company: list[dict[str, Any]] = []

    def keep(self, chosen: Sequence[int], forwards: int = 0) -> None:
        """Run only the `chosen` batches from now on, and in `forwards` forwards at least.

        Where each forward waits for other processes, those that have fewer batches run the smallest one for
        company, which counts for nothing.
        """
        smallest = min(self.batches, key=size_of, default={})
        self.batches = [self.batches[i] for i in chosen]
        self.weights = [self.weights[i] for i in chosen]
        self.scored = sum(self.weights)
        self.rows = sum(_rows(batch) for batch in self.batches)
        self.for_company = [smallest] * (forwards - len(chosen))

    def __call__(self) -> torch.Tensor:
        return self.total() / self.scored

    def total(self) -> torch.Tensor:
        """The sum over all targets, 0-dim float64; 0 without batches."""
        return self._run(self._total)

    def _total(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, weight in zip(self.batches, self.weights, strict=True):
            loss = self._loss(self.model(**batch), batch)
            total += loss.detach().to(self.device, torch.float64).reshape(()) * weight
        for batch in self.for_company:
            self.model(**batch)
        return total

    def _loss(self, output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        if isinstance(output, Mapping):
            loss = output.get("loss")
        elif isinstance(output, (tuple, list)):
            loss = output[0] if output else None
        else:
            loss = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise ValueError(
                f"{type(self.model).__name__}(**batch) returned no loss but {found} for a batch with "
                f"{sorted(set(batch) - {'use_cache'})}; give the batches labels, or pass a callable "
                "loss_fn(model) instead of batches"
            )
        return loss


class FunctionLoss:
    """What `function(model)` returns, as a 0-dim float64 tensor on `device`."""

    def __init__(self, function: Callable[[nn.Module], Any], model: nn.Module, device: torch.device) -> None:
        self.function, self.model, self.device = function, model, device
        self._run = GradientsWhereNeeded(model)

    def __call__(self) -> torch.Tensor:
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


def is_loss_function(given: Any) -> bool:
    """Whether this is a function of the model, and nothing that holds examples."""
    return callable(given) and not any(hasattr(given, name) for name in ("__iter__", "__getitem__"))
