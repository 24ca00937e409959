"""The validation loss of Fast Forward: one number, the token-weighted mean NLL over all labelled tokens.

    L(W) = Σ NLL over labelled tokens / their number        not a mean of batch means

What is given is read once (`batches`), one of three ways to that number is chosen (`choice`), and what that
way runs, a `Loss`, is held here and run by an `Evaluator`, as if nobody had evaluated (`evaluator`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ffkernels.ranks.digests import digest
from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.ranks.parallelism import training_group
from ffkernels.ranks.ranks import Ranks, several_processes, together
from ffkernels.validation.batches import Example, is_loss_function, micro_batch_limit, read, read_batches
from ffkernels.validation.causal_lm import CausalLM, model_device
from ffkernels.validation.choice import choose
from ffkernels.validation.evaluator import Evaluator, uncached_autocast
from ffkernels.validation.fast import LabelledLoss
from ffkernels.validation.mean import Mean
from ffkernels.validation.restore import keep_random_state


def _of_what_is_run(name: str) -> Any:
    return property(attrgetter(f"_loss.{name}"))


class ValidationLoss:
    """Calling it returns the loss of the model's weights as they are, a 0-dim float64 tensor on its device.

    A call leaves no trace: per-module train/eval flags, grad mode, random generators, buffers, gradients and
    autocast's cache are as before, also when it raises. Nothing of the weights is kept between calls. The
    model must not be restructured (adapters added or removed, wrapped anew) during the life of this object.

    It runs under the autocast that is active; where none is, under that of the last training forward, which a
    FastForward listens for, and before there was one, under that in which it was made.

    In a job of several processes, making and calling it is collective: on every rank, with the same whole set
    of examples on each, which the ranks share among themselves. What a callable returns is averaged over the
    ranks.

    Args:
        model: a transformers model, plain or in PEFT, DDP or `torch.compile` wrappers, or any module whose
            `model(**batch)` returns a loss.
        batches: an iterable of dicts with `input_ids`, `attention_mask` and `labels` as a collator makes
            them; a dataset or list of examples, with `collator`; or a callable `loss_fn(model)` returning one
            number. Iterables are read once, here.
        collator: makes a batch of a list of examples.
        micro_batch_tokens: padded tokens per forward at most (one longer example is still one forward). By
            default 2,048 on a CPU, 16,384 elsewhere. The generic path applies it only with `collator`; there
            the loss depends on it where examples of a batch see each other (CLIP): pass batches.
        check: compare the fast path once with the model's own loss; without it structure alone decides.
        process_group: the processes that train this model together. By default the group of a DDP model, else
            all processes of the job.

    Attributes:
        path, reason: "fast", "generic" or "callable", and why.
        examples: rows that are run (rows with nothing to score are not, on the fast path); 0 for a callable.
        tokens: targets the mean runs over; 0 for a callable.
        computed_tokens: in one evaluation, without padding; 0 where there are none to count. All three of all
            processes together.
        version: rises whenever what an evaluation runs, and reads its examples from, is made anew.
        causal_lm: the two halves of the model that the fast path runs; None on the other paths.
        rows: the examples of the fast path, none on the others; another list after each exchange.
        example_tokens: n, labelled tokens by example, (rows,) float64 on the device, in the order of S; None
            where `measure` gives no S. After a `swap_batch` in place the same tensor, 0 for rows without one.
        example_counts: the same numbers on the host.
        ranks: the processes that share the examples; None where it is one.
        evaluator: runs it.
        before_ranks: it was made before the job had a process group of several.

    Raises:
        ValueError: when the model returns no loss for such batches, or they have nothing to score.
        RanksDisagree: when the ranks were given different examples, or came to different paths.
    """

    examples: int = _of_what_is_run("examples")
    tokens: int = _of_what_is_run("tokens")
    causal_lm: CausalLM | None = _of_what_is_run("lm")
    rows: Sequence[Example] = _of_what_is_run("rows")
    example_tokens: torch.Tensor | None = _of_what_is_run("example_tokens")
    example_counts: list[int] | None = _of_what_is_run("example_counts")
    computed_tokens: int = _of_what_is_run("computed_tokens")

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        *,
        collator: Callable[..., Any] | None = None,
        micro_batch_tokens: int | None = None,
        check: bool = True,
        process_group: Any = None,
        _mean: Mean | None = None,
    ) -> None:
        device = model_device(model)
        self.model, self.version = model, 0
        tokens = micro_batch_limit(micro_batch_tokens, device)
        self._settings = {"micro_batch_tokens": tokens, "check": check, "process_group": process_group}
        self.evaluator = Evaluator(model, device, batches if is_loss_function(batches) else None)
        self.before_ranks = not several_processes()
        self.ranks = Ranks.present(device, process_group or training_group(model))
        if self.ranks is not None:
            self.ranks.forward_is_collective = self.evaluator.is_collective
        with together(self.ranks):
            given = read(model, batches, collator, tokens, device)
        if self.ranks is not None:
            self.ranks.agree(
                {
                    "whether the validation loss is a callable": given.function is not None,
                    "the number of validation batches": len(given.batches),
                    "the validation examples (their hash)": digest(given.batches),
                    "micro_batch_tokens": tokens,
                },
                "give every rank the same, whole validation set; the ranks share it among themselves",
            )
        with together(self.ranks, forwards=True):
            chosen = choose(given, model, self.evaluator, self.ranks, tokens, check=check, mean=_mean)
        self.path, self.reason, self._make, self._loss, self._mean = chosen
        if self.ranks is not None:
            facts = {"the path of the validation loss": self.path, "what it is the mean of": str(self._mean)}
            self.ranks.agree(facts, f"here: {self.reason}")

    @property
    def device(self) -> torch.device:
        return self.evaluator.device

    @property
    def labelled(self) -> LabelledLoss | None:
        """What the fast path runs, in a job of one process; None on the other paths and in several."""
        return self._loss if isinstance(self._loss, LabelledLoss) else None

    @property
    def flops(self) -> int:
        """Forward FLOPs of one evaluation, measured by one more, run eagerly, at first access.

        Matrix products, convolutions and attention, which counts all query-key pairs of a micro-batch. Of
        several processes it is this one's share. 0, announced, where an evaluation cannot be counted.
        """
        return self.evaluator.flops(self._loss)

    def __call__(self) -> torch.Tensor:
        self.follow()
        return self.evaluator.run(self._loss.evaluate)

    def evaluate(self) -> torch.Tensor:
        """The forward alone, for callers that hold the model in `evaluation_mode` themselves."""
        return self.evaluator.forward(self._loss.evaluate)

    def measure(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, the number that calling this gives, and what it is the mean of, from one forward.

        Returns:
            the loss, and S, the sums of NLL by example, (rows,) float64 on the device; None in its place on
            the generic path and for a callable. Of several processes each gets the sums of all, in one order.
        """
        self.follow()
        return self.evaluator.run(self._loss.measure)

    def evaluate_with_sums(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `measure`, and the forward alone, as `evaluate`."""
        return self.evaluator.forward(self._loss.measure)

    def swap_batch(self, batches: Any, collator: Callable[..., Any] | None = None) -> bool:
        """Validate on other examples from now on.

        Where they fit, they are copied over the present ones: no more rows, no longer ones, no more labels in
        a micro-batch. Nothing changes its address then, and graphs that were captured stay valid.
        Otherwise everything is made anew, as by a new `ValidationLoss`, and `version` rises. Losses before
        and after are of different examples and do not compare.

        Args:
            batches, collator: as at construction, except that there is no callable.

        Returns:
            True where they were copied in place, False where everything was made anew.

        Raises:
            TypeError: for a callable, old or new.
            ValueError, TypeError: as at construction, for data that cannot be used. The present examples
                stay in force.
        """
        if not self.examples or is_loss_function(batches):
            raise TypeError(
                "swap_batch exchanges examples and a callable has none that it could know; change what the "
                "callable reads, or make a new ValidationLoss"
            )
        self.follow()
        if self.ranks is None:
            with keep_random_state(self.device):
                batches = read_batches(batches, collator, self._settings["micro_batch_tokens"])
                collator = None
            if self._loss.swap(batches):
                return True
        with uncached_autocast(self.device.type, self.evaluator.autocast):
            fresh = ValidationLoss(self.model, batches, collator=collator, **self._settings, _mean=self._mean)
        with interrupt_later():
            vars(self).update(vars(fresh), version=self.version + 1, evaluator=self.evaluator)
        return False

    def __repr__(self) -> str:
        return f"ValidationLoss(path={self.path!r}, examples={self.examples}, tokens={self.tokens})"

    def follow(self) -> None:
        """Rebuild what belongs to a device or an output embedding that the model has left.

        Raises:
            RuntimeError: when the model is no longer what the fast path computes.
        """
        device, lm = model_device(self.model), self.causal_lm and self.causal_lm.current()
        if device == self.device and lm is self.causal_lm:
            return
        self._loss = self._make(lm, self.rows, device)
        self.evaluator.device = device
        self.version += 1
