"""The loss that a Trainer trains by: its model's own, or one that it computes itself.

    the model's       searched by ``ValidationLoss`` or ``ValidationPool``, as fast as they can
    the Trainer's     its ``eval_loss``: what its ``prediction_step`` returns on its own evaluation batches,
                      each weighted by its examples

Where the two are not one, the second is searched, unless the Trainer's evaluation is no ordinary one either
(preference pairs, rewards of generated text, batches without labels): that has to be asked for.
"""

from __future__ import annotations

import copy
from collections import UserDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ffkernels.ops.notices import announce_once
from ffkernels.training.trainer_data import EvaluationData, evaluation_data
from ffkernels.validation.generic import GradientsWhereNeeded
from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.pool import ValidationPool

LOSSES = ("auto", "model", "trainer")


def make_validation(
    trainer: Any, model: nn.Module, given: Any, *, examples: int, pool: int | None, seed: int, loss: str
) -> ValidationLoss:
    """The validation loss of ``FastForwardCallback``, where it is given data or none.

    Raises:
        ValueError: when the Trainer's loss is not its model's and cannot be told from its evaluation.
    """
    why = None if loss == "model" else "asked for" if loss == "trainer" else loss_of_its_own(trainer)
    if why and loss == "auto" and (asked := _evaluates_otherwise(trainer)):
        raise ValueError(_refusal(trainer, why, asked))
    data = evaluation_data(trainer, given, pool or (examples if given is None else None))
    if not why:
        if pool is None:
            return ValidationLoss(model, data.batches)
        source, collator = (data.batches, None) if data.examples is None else (data.examples, data.collator)
        size = trainer.args.eval_batch_size
        return ValidationPool(model, source, size=examples, seed=seed, collator=collator, batch_size=size)
    if pool is not None:
        raise ValueError(
            f"pool={pool}: examples are drawn for a model's own loss only, and this is {_name(trainer)}'s "
            f"({why}); leave pool out, or pass loss='model'"
        )
    if loss == "auto":
        missing = [n for n in trainer.label_names if any(b.get(n) is None for b in data.batches)]
        if missing:
            raise ValueError(_refusal(trainer, why, f"its evaluation batches have no {', '.join(missing)}"))
        announce_once(
            f"trainer-loss-{_name(trainer)}-{why}",
            f"Fast Forward searches {_name(trainer)}'s own eval_loss, as its loss is not its model's: {why}. "
            "That runs its evaluation batches as they are, with full logits; where the model's own loss is "
            "wanted, pass FastForwardCallback(loss='model')",
        )
    own = TrainerLoss(trainer, data)
    validation = ValidationLoss(model, own)
    try:
        validation.evaluator.run_first(partial(GradientsWhereNeeded(model), partial(own.of_batch, model, 0)))
    except (torch.OutOfMemoryError, NoEvaluationLoss):
        raise
    except Exception as error:
        raise own.none(f"raised {type(error).__name__}: {error}") from error
    return validation


def loss_of_its_own(trainer: Any) -> str | None:
    """How this Trainer's loss comes to be another than its model's own, or None."""
    if trainer.compute_loss_func is not None:
        return "compute_loss_func is set"
    if trainer.label_smoother is not None:
        return "label_smoothing_factor is set"
    if "compute_loss" in vars(trainer):
        return "its compute_loss was replaced"
    owner = _owner(trainer, "compute_loss")
    if not _is_sft(owner):
        plain = owner.__module__ == "transformers.trainer"
        return None if plain else f"{owner.__name__}.compute_loss computes it"
    kind = getattr(trainer.args, "loss_type", "nll")
    if not str(kind).endswith("nll"):
        return f"loss_type={kind!r}"
    added = getattr(trainer, "aux_loss_enabled", False)
    return "the routers' auxiliary loss is added to it" if added else None


class NoEvaluationLoss(ValueError):
    """A Trainer's evaluation gives no loss."""


class TrainerLoss:
    """``loss_fn(model)``: the mean of a Trainer's evaluation loss over examples.

    What the Trainer writes down of each batch for its next log is as before afterwards.

    Raises:
        ValueError: when its ``prediction_step`` returns no loss.
    """

    def __init__(self, trainer: Any, data: EvaluationData) -> None:
        self.trainer, self.data = trainer, data
        if not data.batches:
            raise ValueError("the validation set is empty")

    def __call__(self, model: nn.Module) -> torch.Tensor:
        sizes = self.data.sizes
        losses = [self.of_batch(model, index) * size for index, size in enumerate(sizes)]
        return torch.stack(losses).sum() / sum(sizes)

    def of_batch(self, model: nn.Module, index: int) -> torch.Tensor:
        with _books_aside(self.trainer):
            batch = _copied(self.data.batches[index])
            loss, *_ = self.trainer.prediction_step(model, batch, prediction_loss_only=True)
        if loss is None:
            raise self.none("gave none")
        return loss.detach().double().mean()

    def none(self, why: str) -> ValueError:
        """The error that there is no loss, to be raised."""
        batch = self.data.batches[0]
        return NoEvaluationLoss(
            f"{_name(self.trainer)} has no eval_loss: its prediction_step {why}, for batches with "
            f"{sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__} and label_names="
            f"{self.trainer.label_names}. Name the labels in TrainingArguments(label_names=[...]), or pass a "
            "function loss_fn(model) as validation="
        )


def _evaluates_otherwise(trainer: Any) -> str | None:
    """Why this Trainer's evaluation is not transformers' own, of predictions and labels; None where it is."""
    owner = _owner(trainer, "prediction_step")
    if not (owner.__module__.startswith("transformers.") or _is_sft(owner)):
        return f"{owner.__name__} evaluates in a way of its own"
    return None if trainer.label_names else "its evaluation has no labels (label_names)"


def _refusal(trainer: Any, why: str, asked: str) -> str:
    return (
        f"{_name(trainer)}'s loss is not its model's ({why}), and {asked}: by which loss to search has to be "
        "said. Pass FastForwardCallback(loss='trainer') for this Trainer's own eval_loss, or "
        "FastForwardCallback(loss_fn) with a function loss_fn(model) of your own that returns one number"
    )


def _owner(trainer: Any, method: str) -> type:
    return next(cls for cls in type(trainer).__mro__ if method in vars(cls))


def _is_sft(owner: type) -> bool:
    """TRL's SFTTrainer computes its model's loss itself, and keeps books of it."""
    return owner.__name__ == "SFTTrainer" and owner.__module__.startswith("trl.")


def _name(trainer: Any) -> str:
    return type(trainer).__name__


@contextmanager
def _books_aside(trainer: Any) -> Iterator[None]:
    """Let what is written into the Trainer's numbers, dicts and lists be gone afterwards.

    Trainers average over what they have written down between two logs (TRL's ``_metrics``).
    """
    books = {name: value for name, value in vars(trainer).items() if not name.endswith("_dataset")}
    vars(trainer).update({name: _copied(value) for name, value in books.items()})
    try:
        yield
    finally:
        for name in vars(trainer).keys() - books.keys():
            if not name.endswith("_dataset"):
                del vars(trainer)[name]
        vars(trainer).update(books)


def _copied(value: Any) -> Any:
    """Dicts, lists and deques copied to any depth; what else is in them is shared."""
    if isinstance(value, (dict, UserDict, list, deque)):
        copied = copy.copy(value)
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            copied[key] = _copied(item)
        return copied
    return value
