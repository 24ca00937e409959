"""What one contender after the other trains: a model, its data and its first weights."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch

from benchmarks import timing
from benchmarks.learning_rate.methods import ALL_METHODS
from benchmarks.learning_rate.models import loaded
from benchmarks.learning_rate.workloads import LENGTH, MODELS, RANK, Method, Workload
from ffkernels.reporting.flops import ADAM_FLOPS, FlopMeter, Flops
from ffkernels.training.config import TrainConfig
from ffkernels.training.models import attention_targets, train_weights
from ffkernels.training.requirements import require
from ffkernels.training.session import DataOrder, prepare_task
from ffkernels.training.tasks import Example, collate
from ffkernels.validation.loss import ValidationLoss


class Bench:
    """A model, its data and its first weights, on which one contender after the other begins anew.

    Attributes:
        trainable: the weights that train; ``names`` their names in the model.
        validation: loss on the 32 validation examples.
        start: test loss before training.
    """

    def __init__(
        self, workload: Workload, seed: int, test_examples: int | None = None, device: str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            torch.set_num_threads(1)
        dtype, tests = MODELS[workload.model]
        self.seed = seed
        config = TrainConfig(
            task=workload.task, seed=seed, max_length=LENGTH, test_examples=test_examples or tests
        )
        model, tokenizer = loaded(workload, dtype)
        if on_cpu and workload.model != "tiny":  # a third faster than fused attention at 64 tokens there
            model.set_attn_implementation("eager")
        # Moved when all is drawn, so that every device begins with the same weights.
        self.model = adapted(model, ALL_METHODS[workload.method], seed).to(self.device)
        task = prepare_task(config, tokenizer)
        splits = [task.train, task.validation, task.test]
        if workload.permuted:
            splits = [[permuted(example) for example in split] for split in splits]
        self._train, validation, test = splits
        self._collate = partial(collate, pad_token_id=tokenizer.pad_token_id)
        training = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.names, self.trainable = [name for name, _ in training], [p for _, p in training]
        self._first = [p.detach().clone() for p in self.trainable]
        self._order = DataOrder(len(self._train), workload.batch, seed)
        self._meter = FlopMeter(sum(p.numel() for p in self.trainable))
        self._costs: dict[int, Flops] = {}
        self.validation, self._test, self._few = (
            ValidationLoss(self.model, examples, collator=self._collate)
            for examples in (validation, test, test[: max(1, len(test) // 4)])
        )
        self.start = self.test_loss()

    def reset(self) -> None:
        """Weights, gradients, mode and random numbers as at the beginning."""
        with torch.no_grad():
            for weight, first in zip(self.trainable, self._first, strict=True):
                weight.copy_(first)
                weight.grad = None
        self.model.train()
        torch.manual_seed(self.seed)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of optimizer step ``step``, from 0."""
        batch = self._collate([self._train[i] for i in self._order(step)])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def wait(self) -> None:
        """Until the device has done what it was given."""
        timing.wait(self.device)

    def flops(self, step: int) -> int:
        """FLOPs of optimizer step ``step``, Adam's included."""
        return self.gradient_flops(step) + ADAM_FLOPS * self._meter.trainable_numel

    def gradient_flops(self, step: int) -> int:
        """FLOPs of a forward and a backward on the batch of optimizer step ``step``."""
        return self._cost(step).measured

    def forward_flops(self, step: int) -> int:
        """FLOPs of a forward alone on that batch."""
        return self._cost(step).paper // 3  # the paper's convention is three forwards

    def _cost(self, step: int) -> Flops:
        # Kept: whoever charges something after every step asks for all steps again.
        if step not in self._costs:
            self._costs[step] = self._meter.training_step(self.model, self.batch(step))
        return self._costs[step]

    def test_loss(self, *, few: bool = False) -> float:
        """``few``: on a quarter of the examples, for curves."""
        return float(self._few() if few else self._test())


def adapted(model: Any, method: Method, seed: int) -> Any:
    """The model with what trains of it; first weights by the seed."""
    if method.config is None:
        return train_weights(model)
    peft = require("peft")
    config = getattr(peft, method.config)
    ours = {"target_modules": attention_targets(model), "r": RANK, "projection_prng_key": seed}
    if method.config == "TrainableTokensConfig":  # its targets are embeddings
        del ours["target_modules"]
    options = {name: value for name, value in ours.items() if name in config.__dataclass_fields__}
    options |= method.options
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT asks for it under its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return peft.get_peft_model(model, config(task_type="CAUSAL_LM", **options))


def permuted(example: Example) -> Example:
    """The example with every byte another; the same permutation always."""
    ids, labels = (
        [_PERMUTATION[token] if 0 <= token < 256 else token for token in example[key]]
        for key in ("input_ids", "labels")
    )
    return Example(ids, labels, example.cut)


_PERMUTATION = torch.randperm(256, generator=torch.Generator().manual_seed(256)).tolist()
