"""What one validation costs, in optimizer steps: from the tokens that both run through the model.

    price = V / T · 1 / (2 + s)

V are the tokens of one validation, T those of one optimizer step (all its micro-batches, padding included),
s the share of the model's weights that trains. A step is a forward, a backward of the same size through the
activations, and one through the weights that train: 2 + s forwards. The optimizer itself, the head at
unlabelled positions and recomputation under gradient checkpointing are left out: they make a step dearer, so
that a validation is rather overpriced.

T is counted by a hook on the input embedding, wherever gradients are enabled. It is a count of tokens, not a
clock: two runs of the same training see the same price. Where tokens cannot be counted (a loss function, a
model without token ids, a compiled or captured training step, which runs no hooks), V / T is taken as 1: a
validation set as large as a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ffkernels.engine.causal_lm import unwrap
from ffkernels.engine.distributed import PRICE, Ranks
from ffkernels.engine.validation import ValidationLoss

__all__ = ["StagePrice"]


class StagePrice:
    """Counts the tokens of training since the last stage, and prices a validation by them.

    Attributes:
        tokens, steps: tokens and optimizer steps since ``settle`` was called last.
        hooks: removing them ends the counting.
    """

    def __init__(self, model: nn.Module, validation: ValidationLoss) -> None:
        self._validation = validation
        self.tokens = self.steps = 0
        weights = list(model.parameters())
        trained = sum(p.numel() for p in weights if p.requires_grad)
        self._forwards = 2 + trained / max(1, sum(p.numel() for p in weights))
        embedding = _input_embedding(model)
        self.hooks = [] if embedding is None else [embedding.register_forward_pre_hook(self._count)]

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if inputs and isinstance(inputs[0], torch.Tensor):
            self.tokens += inputs[0].numel()

    def read(self, ranks: Ranks | None) -> float:
        """The price of one validation; of several processes that of all of them, the same on each."""
        trained = self.tokens / max(1, self.steps)
        if ranks is not None:
            trained = sum(row.a for row in ranks.exchange(PRICE, trained))
        validated = self._validation.computed_tokens
        share = validated / trained if validated and trained else 1.0
        return share / self._forwards

    def settle(self) -> None:
        """Begin to count anew."""
        self.tokens = self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.steps = int(state.get("tokens", 0)), int(state.get("steps", 0))


def _input_embedding(model: nn.Module) -> nn.Module | None:
    inner, _ = unwrap(model)
    try:
        embedding = inner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None
