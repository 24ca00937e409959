"""What one training run consists of, made before its first step; and one step in three parts.

    with open_session(config) as session:
        for step in range(session.steps):
            batch = session.load(step)       a pure function of (seed, step)
            session.backward(batch)          gradients in .grad, weighted by labelled tokens
            session.update(step)             learning rate, clipping, optimizer.step(); a stage runs inside

``trainer.train`` is this loop with clock, log and checkpoints. Who wants to look between the parts (at
gradients, at the weights around a stage) drives a session by hand and gets the very same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from ffkernels.engine.fast_forward import FastForward
from ffkernels.reporting.flops import FlopMeter
from ffkernels.reporting.machine import choose_device
from ffkernels.training.config import ADAPTERS, TrainConfig
from ffkernels.training.models import add_adapter, attention_targets, load_model, train_weights
from ffkernels.training.tasks import Example, Task, collate, count_of, load_file, load_task
from ffkernels.validation.evaluator import evaluation_mode
from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.pool import ValidationPool

# Makes what runs the stages instead of FastForward: ``.stages`` (a list of Stage) and ``.detach()``; with
# ``.state_dict()`` and ``.load_state_dict()`` its runs can be resumed.
Attach = Callable[["Session"], Any]


@dataclass(frozen=True)
class Batch:
    """One optimizer step's examples on the device, and how many tokens the loss counts in each micro-batch.

    ``micro_batches``: dicts of long tensors (examples, longest), as ``tasks.collate`` makes them.
    """

    micro_batches: list[dict[str, torch.Tensor]]
    labelled: list[int]


class DataOrder:
    """Which examples make the batch of a step: epoch after epoch in fresh permutations, cut into batches."""

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._epoch, self._permutation = -1, []

    def __call__(self, step: int) -> list[int]:
        first = step * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self.examples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.examples, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[index]


class Session:
    """Model, data and optimizer of one run, up to its first step. Leaving it detaches Fast Forward.

    ``attach(session)`` makes what runs the stages instead of FastForward: an object with ``stages``, a list
    of ``Stage``, and ``detach()``; or None. It is called last, when all else of the session is there.

    Attributes:
        config: the run's settings.
        steps: optimizer steps of the run (``config.steps``, or what ``config.epochs`` comes to).
        device: where it trains.
        model: with its adapter, or with its own weights trainable; in train mode.
        tokenizer, task, collator: the data; ``collator(examples)`` makes one padded batch.
        trainable, names: the tensors that train and their names in ``model``, in the same order.
        optimizer: every group keeps its ratio to the base learning rate.
        lr: the base learning rate of the last update; with ``learning_rate="auto"`` as that update left it.
        order: ``order(step)`` are the indices into ``task.train`` of that step's batch.
        meter: counts FLOPs where its caller tells it to; a session itself counts nothing.
        test: loss on the test examples, charged to nobody; None where there are none.
        validation: loss on the validation examples, or on a draw of them; made when first asked for.
        ff: the FastForward (or a peer of the same face) that runs stages inside ``update``; None without.

    Raises:
        ValueError, RuntimeError: when model, data or settings do not go together; the message says
            what to do.
    """

    def __init__(self, config: TrainConfig, *, attach: Attach | None = None) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.ff: Any = None
        self.lr = config.lr
        self.device = choose_device(config.device)
        self.model, self.tokenizer = _model(config, self.device)
        self.model.train()
        self.task = prepare_task(config, self.tokenizer)
        self.collator = partial(collate, pad_token_id=self.tokenizer.pad_token_id)
        self.steps = config.steps
        if config.epochs is not None:
            self.steps = math.ceil(config.epochs * len(self.task.train) / config.batch_size)
        training = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.names, self.trainable = list(training), list(training.values())
        self.optimizer = _optimizer(config, self.model, self.trainable)
        self._ratios = [group["lr"] / config.lr for group in self.optimizer.param_groups]
        self._try_positions()
        self.order = DataOrder(len(self.task.train), config.batch_size, config.seed)
        self.meter = FlopMeter(sum(p.numel() for p in self.trainable))
        self.test = self._loss(self.task.test) if self.task.test else None
        self.ff = (attach or stages_of)(self)
        try:
            if "validation" in vars(self):
                _ = self.validation.flops  # counted at its first reading: here, outside anybody's clock
        except BaseException:
            self.close()
            raise

    @cached_property
    def validation(self) -> ValidationLoss:
        config, held_out = self.config, self.task.validation
        if config.resample_validation is None:
            return self._loss(held_out)
        return self._loss(held_out, ValidationPool, size=config.validation_examples, seed=config.seed)

    def _loss(self, examples: list[Example], kind: type = ValidationLoss, **options: Any) -> ValidationLoss:
        tokens = self.config.eval_tokens
        return kind(self.model, examples, collator=self.collator, micro_batch_tokens=tokens, **options)

    def load(self, step: int) -> Batch:
        """The batch of optimizer step ``step`` (counted from 0), collated and on the device."""
        return self.batch([self.task.train[i] for i in self.order(step)])

    def batch(self, examples: list[Example]) -> Batch:
        """These examples as a batch: collated, in micro-batches, on the device."""
        size = self.config.micro_batch_size or len(examples)
        micro_batches = [self.collator(examples[i : i + size]) for i in range(0, len(examples), size)]
        micro_batches = [{k: v.to(self.device) for k, v in mb.items()} for mb in micro_batches]
        return Batch(micro_batches, [int((mb["labels"][:, 1:] != -100).sum()) for mb in micro_batches])

    def backward(self, batch: Batch) -> torch.Tensor:
        """Add the gradients of the batch's mean loss over labelled tokens to ``.grad``; return that loss.

        The loss is a detached float tensor of no dimension on the device: reading it is the caller's choice.
        """
        loss = torch.zeros((), device=self.device)
        for micro_batch, tokens in zip(batch.micro_batches, batch.labelled, strict=True):
            if tokens == 0:
                continue  # its mean loss would be nan
            part = self.model(**micro_batch).loss * (tokens / sum(batch.labelled))
            part.backward()
            loss += part.detach()
        return loss

    def learning_rate(self, step: int) -> float:
        """The base learning rate that the schedule gives optimizer step ``step`` (counted from 0)."""
        return self.config.learning_rate(step, self.steps)

    def update(self, step: int) -> None:
        """Optimizer step ``step`` (counted from 0) from the gradients that are there; then they are freed."""
        # Fast Forward may move the rate by itself; it says by how much to multiply ours.
        scheduled = self.learning_rate(step)
        self.lr = lr = scheduled * getattr(self.ff, "lr_scale", 1.0)
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = lr * ratio
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.config.max_grad_norm)
        self.optimizer.step()
        if getattr(self.ff, "learning_rate", None) is not None:
            self.lr = scheduled * self.ff.lr_scale  # it was moved before the update
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, step: int) -> float:
        """Load, backward and update in one; the loss of the batch before the update."""
        loss = self.backward(self.load(step))
        self.update(step)
        return loss.item()

    @property
    def remarks(self) -> list[str]:
        """What was left out of the data, and where data and settings do not go together, in sentences."""
        remarks, examples, size = list(self.task.remarks), len(self.task.train), self.config.batch_size
        if size > examples:
            remarks.append(
                f"A batch of {size} is larger than the {examples} training examples, which it repeats; "
                "lower batch_size (--batch-size)."
            )
        lengths, positions = [len(example["input_ids"]) for example in self._at_hand], self._positions
        beyond = [length for length in lengths if length > positions]
        if beyond:
            remarks.append(
                f"Of {count_of(len(lengths), 'example')} {len(beyond):,}, of up to {max(beyond)} tokens, are "
                f"longer than the {positions} positions that the model was made for; lower max_length "
                "(--max-length)."
            )
        return remarks

    @property
    def _at_hand(self) -> list[Example]:
        """The examples that are tokenized already."""
        splits = (self.task.train, self.task.validation, self.task.test)
        return [example for split in splits if isinstance(split, list) for example in split]

    @property
    def _positions(self) -> float:
        """Those that the model was made for; infinitely many where it does not say."""
        positions = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        return math.inf if positions is None else positions

    def _try_positions(self) -> None:
        """Rotary positions go on behind those that a model was made for; a table of them (GPT-2's) ends."""
        longest = max(self._at_hand, key=lambda example: len(example["input_ids"]))
        length, positions = len(longest["input_ids"]), self._positions
        if length <= positions:
            return
        try:
            with evaluation_mode(self.model, self.device):
                self.model(**self.batch([longest]).micro_batches[0])
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"max_length={self.config.max_length}: must be at most {positions}, the positions that the "
                f"model has; there are examples of {length} tokens ({error})"
            ) from error

    def test_loss(self) -> float:
        """Mean loss over the test examples' labelled tokens, in nats; NaN where there are none."""
        return math.nan if self.test is None else float(self.test())

    def close(self) -> None:
        """Detach what runs the stages and free its buffers; ``ff.stages`` stays readable. Idempotent."""
        if self.ff is not None:
            self.ff.detach()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


open_session = Session


def stages_of(session: Session, **how: Any) -> FastForward | None:
    """What runs the stages that the session's settings ask for; ``how`` are FastForward's own arguments."""
    config = session.config.fast_forward
    if config is None:
        return None
    validation = session.validation if config.interval is not None else None
    return FastForward(session.model, session.optimizer, validation, config, **how)


# For ``open_session(config, attach=waiting_stages)``: a stage waits for ``session.ff.run_due_stage()``. In
# between the weights are those of the optimizer's step alone; the run is the same, bit for bit, as long as
# nothing else moves them.
waiting_stages = partial(stages_of, defer=True)


def prepare_task(config: TrainConfig, tokenizer: Any) -> Task:
    """The run's data: train, validation and test examples, disjoint."""
    sizes = {name: getattr(config, name) for name in ("max_length", "seed", "test_examples")}
    sizes["validation_examples"] = config.held_out_examples
    if config.data is not None:
        return load_file(config.data, tokenizer, test_data=config.test_data, **sizes)
    return load_task(config.task, tokenizer, source=config.source, chat_loss=config.chat_loss, **sizes)


def _model(config: TrainConfig, device: torch.device) -> tuple[nn.Module, Any]:
    """The model as it trains, and its tokenizer."""
    dtype = getattr(torch, config.dtype)
    model, tokenizer = load_model(config.model, dtype=dtype, device=str(device), attn=config.attn)
    torch.manual_seed(config.seed)  # the adapter's initialisation, then dropout
    targets = list(config.targets) if config.targets else None
    if config.method in ADAPTERS:
        adapter = {name: getattr(config, name) for name in ("method", "rank", "alpha", "dropout")}
        return add_adapter(model, targets=targets, **adapter), tokenizer
    if config.method == "full":
        return train_weights(model), tokenizer
    targets = targets or attention_targets(model)
    if targets is None:
        raise ValueError(
            f"method={config.method!r}: which modules of {config.model!r} project its attention is not "
            "known here; name them with targets (--target-modules)"
        )
    return train_weights(model, targets), tokenizer


def _optimizer(config: TrainConfig, model: nn.Module, trainable: list[nn.Parameter]) -> torch.optim.Optimizer:
    common = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
    if config.optimizer != "lora-plus":
        return torch.optim.AdamW(trainable, weight_decay=config.weight_decay, **common)
    from peft.optimizers import create_loraplus_optimizer

    common |= {"loraplus_lr_ratio": config.lora_plus_ratio, "loraplus_weight_decay": config.weight_decay}
    return create_loraplus_optimizer(model, torch.optim.AdamW, **common)
