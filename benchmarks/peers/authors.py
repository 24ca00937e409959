"""The Fast Forward loop of the paper's authors (github.com/AdirRahamim/Fast-Forward), in our own words.

    steps 5, 6 of 6    clone every tensor with 'lora' in its name, out of a whole state_dict()
    stage              Δ = the difference of the last two clones, tensor by tensor in a pool of threads
      repeat           a new dict W + Δ (pool of threads); load_state_dict(strict=False)
                       the mean of the validation batches' mean losses
      until            that loss is greater than the one before

What is wrong with it is kept, as it is part of what the original costs; README.md lists it and the tests show
it. One thing is added: a cap, because the original may never end.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from ffkernels.ops.notices import announce_once
from ffkernels.validation.evaluator import evaluation_mode
from ffkernels.validation.flops import count_flops

from .face import Peer, held_bytes, require

ROSE = "the loss rose; the step that raised it stays"


class AuthorsLoop(Peer):
    """The authors' loop on a session.

    Args:
        interval: counted optimizer steps from stage to stage, of which it keeps the last two; 6 as there.
        eval_batch_size: validation examples per forward; 2 as there.
        stabilization: micro-batches before anything is counted. There 50, which at their 512 micro-batches
            per optimizer step is none; so 0 here.
        evaluate_every: optimizer steps between the loop's own test evaluations, which leave the model in eval
            mode; there every step. 0 leaves testing to whoever trains, who charges it to nobody.
        cap: repetitions per stage at most. There is none in the original.
    """

    name = "authors"

    def __init__(
        self,
        session: Any,
        *,
        interval: int = 6,
        eval_batch_size: int = 2,
        stabilization: int = 0,
        evaluate_every: int = 0,
        cap: int = 1000,
    ) -> None:
        super().__init__(session, interval=interval, cap=cap)
        require(
            interval=(interval, 2),
            eval_batch_size=(eval_batch_size, 1),
            stabilization=(stabilization, 0),
            evaluate_every=(evaluate_every, 0),
        )

        def loader(examples: list) -> DataLoader:
            return DataLoader(examples, batch_size=eval_batch_size, collate_fn=session.collator)

        self.validation, self.test = loader(session.task.validation), loader(session.task.test)
        self.stabilization, self.evaluate_every = stabilization, evaluate_every
        config = session.config
        self.micro_batches = math.ceil(config.batch_size / (config.micro_batch_size or config.batch_size))
        self.counted, self.next_stage = 0, interval
        self.names = [name for name, _ in session.model.named_parameters() if "lora" in name]
        self.moved = sum(p.numel() for name, p in session.model.named_parameters() if "lora" in name)
        # The second dictionary resets the first one after a stage: with its own lists, never with new ones.
        self.collected: dict[str, Any] = {name: [] for name in self.names}
        self.blank: dict[str, Any] = {name: [] for name in self.names}
        self.difference: dict[str, torch.Tensor] = {}
        if not self.names:
            announce_once(
                "authors-nothing-to-move",
                "no parameter has 'lora' in its name, so the authors' loop moves nothing, its loss never "
                f"rises and each stage runs into the cap of {cap}; train with method lora or dora",
            )
        with evaluation_mode(self.model, self.device):
            self.forward_flops = count_flops(lambda: self.evaluate(self.validation))
        self.join()

    def after_step(self) -> None:
        if self.evaluate_every and self.optimizer_steps % self.evaluate_every == 0:
            self.evaluate(self.test)
        # It looks behind the first micro-batch of the next step; where each is a step, behind its own.
        seen = self.optimizer_steps * self.micro_batches - (self.micro_batches == 1)
        if seen < self.stabilization:
            return
        self.counted += 1
        if self.counted >= self.next_stage - 1:
            self.collect(stack=self.counted == self.next_stage)
        if self.counted == self.next_stage:
            self.stage()
            self.next_stage = self.counted + self.interval

    def collect(self, *, stack: bool) -> None:
        """Append a clone of each tensor to its list; before a stage, stack the lists: all they ever got."""
        self.wait_for_training()
        with self.moving():
            present = self.model.state_dict()
            for name in self.names:
                self.collected[name].append(present[name].detach().clone())
                if stack:
                    self.collected[name] = torch.stack(self.collected[name])

    def stage(self) -> None:
        with self.moving(), ThreadPoolExecutor() as pool:
            self.difference = dict(pool.map(self._difference, self.names))
        losses: list[float] = []
        previous = None
        while True:
            with self.moving():
                further = partial(self._further, self.model.state_dict())
                with ThreadPoolExecutor() as pool:
                    moved = pool.map(further, self.names)
                self.collected.update(moved)
                self.model.load_state_dict(self.collected, strict=False)
            with self.validating():
                losses.append(self.evaluate(self.validation))
                self.model.train()
            if previous is not None and losses[-1] > previous:
                stopped = ROSE
                break
            if len(losses) >= self.cap:
                stopped = self.announce_cap(
                    f"the authors' loop repeated an update {self.cap} times without a loss above the one "
                    f"before (the last: {losses[-1]:.4g}); the original has no end for that, this one has a "
                    "cap. A loss that is NaN or stays equal does this: lower the learning rate"
                )
                break
            previous = losses[-1]
        self.collected.update(self.blank)
        self.finish(losses, stopped)

    def _difference(self, name: str) -> tuple[str, torch.Tensor]:
        return name, self.collected[name][-1] - self.collected[name][-2]

    def _further(self, present: dict[str, torch.Tensor], name: str) -> tuple[str, torch.Tensor]:
        return name, present[name] + self.difference[name]

    def evaluate(self, batches: DataLoader) -> float:
        """The mean of the batches' mean losses. Leaves the model in eval mode."""
        with torch.no_grad():
            self.model.eval()
            losses = []
            for batch in batches:
                batch = {key: value.to(self.device) for key, value in batch.items()}
                losses.append(self.model(**batch).loss.unsqueeze(0))
            mean = torch.mean(torch.cat(losses))
            torch.exp(mean).item()  # the perplexity: a second wait for the device
            return mean.item()

    @property
    def held(self) -> int:
        """Bytes of the tensors it holds at this moment, the model's own not counted."""
        return held_bytes(self.collected, self.blank, self.difference, apart_from=self.model)

    def release(self) -> None:
        self.collected, self.blank, self.difference = {}, {}, {}


def attach(session: Any, **options: Any) -> AuthorsLoop:
    """Let the authors' loop run the stages of ``session``; ``options`` are those of ``AuthorsLoop``."""
    return AuthorsLoop(session, **options)
