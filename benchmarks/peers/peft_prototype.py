"""The Fast Forward prototype of PEFT's pull request #2693 (commit 224e910), in our own words.

    every step         clone all parameters, the frozen base too
    every 6th step     Δ = all parameters − their clones
      repeat           add Δ to all parameters, one by one
                       loss of 10 validation examples: train mode, autograd on, the sum over their tokens
                       divided by the number of tokens of the present *training* batch
      until            that loss is greater than the one before, or 1000 times

What is wrong with it is kept, as it is part of what the original costs; README.md lists it and the tests show
it.
"""

from __future__ import annotations

from typing import Any

import torch

from ffkernels.validation.flops import count_flops
from ffkernels.validation.restore import keep_random_state

from .face import Peer, held_bytes, require

ROSE = "the loss rose; the step that raised it stays"


class PeftPrototype(Peer):
    """The prototype on a session.

    Args:
        interval: optimizer steps from stage to stage; 6 as there.
        examples: how many of the validation examples it looks at, drawn once, in one batch; 10 as there.
        cap: repetitions per stage at most; 1000 as there.
    """

    name = "peft-prototype"

    def __init__(self, session: Any, *, interval: int = 6, examples: int = 10, cap: int = 1000) -> None:
        super().__init__(session, interval=interval, cap=cap)
        require(examples=(examples, 1))
        rows = session.task.validation
        # The original draws from the global generator; not here, where all methods train on the same dropout.
        draw = torch.Generator().manual_seed(session.config.seed)
        chosen = torch.randperm(len(rows), generator=draw)[:examples].tolist()
        batch = session.collator([rows[i] for i in chosen])
        self.batch = {key: value.to(self.device) for key, value in batch.items()}
        self.weights = [parameter.data for parameter in self.model.parameters()]
        self.moved = sum(weight.numel() for weight in self.weights)
        self.before: list[torch.Tensor] = []
        self.difference: list[torch.Tensor] = []
        self.outputs: Any = None
        self.last_loss: torch.Tensor | None = None
        with keep_random_state(self.device):
            self.forward_flops = count_flops(lambda: self.forward(1))
        self.join()

    def before_step(self) -> None:
        self.wait_for_training()
        with self.moving():
            self.before = [weight.clone() for weight in self.weights]

    def after_step(self) -> None:
        if self.optimizer_steps % self.interval == 0:
            self.stage()

    def stage(self) -> None:
        self.wait_for_training()
        tokens = self.training_tokens()
        with self.moving():
            self.difference = [now - before for now, before in zip(self.weights, self.before, strict=True)]
        losses: list[float] = []
        self.last_loss = None
        stopped = ""
        while not stopped:
            with self.moving():
                for weight, difference in zip(self.weights, self.difference, strict=True):
                    weight += difference
            with self.validating():
                self.outputs = self.forward(tokens)
                loss = self.outputs.loss
                losses.append(loss.item())
                rose = self.last_loss is not None and bool(self.last_loss < loss)
            if rose:
                stopped = ROSE
            elif len(losses) >= self.cap:
                stopped = self.announce_cap(
                    f"the prototype repeated an update {self.cap} times, its own limit, without a loss above "
                    f"the one before (the last: {losses[-1]:.4g}). A loss that is NaN or stays equal does "
                    "this: lower the learning rate"
                )
            if not rose:
                self.last_loss = loss
        self.finish(losses, stopped)

    def forward(self, tokens: int) -> Any:
        """The model's outputs for the ten examples, in whatever mode it is in, recorded by autograd."""
        return self.model(**self.batch, num_items_in_batch=tokens)

    def training_tokens(self) -> int:
        """Tokens of the batch that the present optimizer step trained on, labelled or not."""
        session = self.session
        return sum(len(session.task.train[i]["input_ids"]) for i in session.order(self.optimizer_steps - 1))

    @property
    def held(self) -> int:
        """Bytes of the tensors it holds by name at this moment; the autograd graph comes on top."""
        return held_bytes(self.before, self.difference, apart_from=self.model)

    def release(self) -> None:
        self.before, self.difference = [], []
        self.outputs = self.last_loss = None


def attach(session: Any, **options: Any) -> PeftPrototype:
    """Let the prototype run the stages of ``session``; ``options`` are those of ``PeftPrototype``."""
    return PeftPrototype(session, **options)
