"""What one validation costs, in optimizer steps: from the tokens that both run through the model.

    price = V / T · 1 / (2 + s)

V are the tokens of one validation, T those of one optimizer step (all its micro-batches, padding included),
s the share of the model's weights that trains (docs/algorithm.md). T is a count of tokens (``TokenCount``),
not a clock: two runs of the same training see the same price. Where tokens cannot be counted (a loss
function, an encoder-decoder model or one without token ids, a compiled or captured training step, which
runs no hooks), V / T is taken as 1. Recomputation under gradient checkpointing is left out: with it a
validation is overpriced.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import nn

from ffkernels.ranks.ranks import PRICE, Ranks
from ffkernels.validation.causal_lm import unwrap
from ffkernels.validation.evaluator import is_training_forward
from ffkernels.validation.loss import ValidationLoss

SAME_GRADIENTS = "every rank must train with the same gradients, as DDP and FSDP2 make them"


class StagePrice:
    """Counts the tokens of training since the last stage, and prices a validation by them.

    Args:
        needed: without it nothing is counted, and no hook is put on the model.

    Attributes:
        tokens, steps: tokens since ``settle`` was called last, and the optimizer steps that they were for.
        hooks: removing them ends the counting. They go with this object, too.
    """

    def __init__(self, model: nn.Module, validation: ValidationLoss, needed: bool = True) -> None:
        self._model, self._validation = model, validation
        self._count, self.steps, self.hooks = TokenCount(), 0, []
        embedding = input_embedding(model) if needed else None
        if embedding is not None:
            self.hooks = [embedding.register_forward_pre_hook(self._count)]
            weakref.finalize(self, self.hooks[0].remove).atexit = False

    @property
    def tokens(self) -> int:
        return self._count.tokens

    def read(self, ranks: Ranks | None, alignment: float | None = None) -> float:
        """The price of one validation; of several processes that of all of them, the same on each.

        They tell each other the alignment that goes with it, which must be the same.

        Raises:
            RanksDisagree: where it is not, so that they would not run the same stages.
        """
        trained = self.tokens / max(1, self.steps)
        if ranks is not None:
            rows = ranks.exchange(PRICE, trained, math.nan if alignment is None else alignment)
            names = {"b": "the alignment of their gradients with the last update"}
            ranks.agree_on_rows(rows, names, SAME_GRADIENTS)
            trained = sum(row.a for row in rows)
        validated = self._validation.computed_tokens
        share = validated / trained if validated and trained else 1.0
        weights = list(self._model.parameters())
        moving = sum(p.numel() for p in weights if p.requires_grad)
        return share / (2 + moving / max(1, sum(p.numel() for p in weights)))

    def settle(self) -> None:
        """Begin to count anew."""
        self._count.tokens = self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count.tokens, self.steps = int(state["tokens"]), int(state["steps"])


class TokenCount:
    """A forward pre-hook for an embedding, which counts what training runs.

    It holds a number and nothing else, so that a model that is copied, pickled or saved takes nothing of
    Fast Forward's along; the copy counts for nobody. In compiled code it does nothing, and breaks no graph.

    Attributes:
        tokens: elements of its input so far, padding included.
    """

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not is_training_forward():
            return
        if inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].is_floating_point():
            self.tokens += inputs[0].numel()

    def __reduce__(self) -> Any:  # deepcopy asks it too
        return TokenCount, ()


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The module that gets a model's token ids; None where there is none to be found."""
    inner, _ = unwrap(model)
    try:
        embedding = inner.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None
