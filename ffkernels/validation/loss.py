"""The validation loss of Fast Forward: one number, the token-weighted mean NLL over all labelled tokens.

    L(W) = Σ NLL over labelled tokens / their number        not a mean of batch means

Three ways to that number, chosen at construction and kept in `path` with the `reason`:

- fast      a causal language model on ordinary batches: trimmed micro-batches, logits at labelled positions
            only (`validation.fast`), compared once with the model's own loss;
- generic   any model whose `model(**batch)` returns a loss: the batches as given, weighted by what that loss
            is the mean of (`validation.generic`);
- callable  `loss_fn(model)`, whatever it computes.

The fast path has the loss of each example too (`validation.micro_batches`). In a job of several processes
each runs its share of the examples and all get the same numbers (`validation.shared`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ffkernels.ops.notices import announce_once
from ffkernels.ranks.digests import digest
from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.ranks.parallelism import training_group
from ffkernels.ranks.ranks import Ranks, several_processes, together
from ffkernels.validation.batches import (
    Example,
    check_causal_batches,
    micro_batch_limit,
    read_batches,
    read_examples,
)
from ffkernels.validation.causal_lm import CausalLM, FastPathRefused, find_causal_lm, model_device, unwrap
from ffkernels.validation.check import disagreement
from ffkernels.validation.evaluator import Evaluator, uncached_autocast
from ffkernels.validation.fast import LabelledLoss
from ffkernels.validation.flops import count_flops, say_uncounted
from ffkernels.validation.generic import FunctionLoss, ModelLoss, ask_model, is_loss_function
from ffkernels.validation.maskless_attention import could_be_given_a_mask
from ffkernels.validation.mean import Mean
from ffkernels.validation.restore import keep_random_state
from ffkernels.validation.shared import (
    SharedLoss,
    shared_function,
    shared_labelled_loss,
    shared_model_loss,
)

__all__ = ["ValidationLoss"]


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
        version: rises whenever the tensors that an evaluation reads its examples from are made anew.
        tokens: targets the mean runs over; 0 for a callable.
        ranks: the processes that share the examples; None where it is one.
        evaluator: runs it.
        before_ranks: it was made before the job had a process group of several.

    Raises:
        ValueError: when the model returns no loss for such batches, or they have nothing to score.
        RanksDisagree: when the ranks were given different examples, or came to different paths.
    """

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
        self._device, self._mean = model_device(model), _mean
        self._max_tokens = micro_batch_limit(micro_batch_tokens, self._device)
        self.model = model
        self.path, self.reason = "generic", ""
        self.examples = self.tokens = self.version = 0
        self.evaluator = Evaluator(model, self._device, batches if is_loss_function(batches) else None)
        self._check, self._process_group = check, process_group
        self._flops: int | None = None
        self._lm: CausalLM | None = None
        self._rows: list[Example] = []
        self._batches: list[dict[str, Any]] = []

        self.before_ranks = not several_processes()
        self.ranks = Ranks.present(self._device, process_group or training_group(model))
        if self.ranks is not None:
            self.ranks.forward_is_collective = self.evaluator.is_collective
        with together(self.ranks):
            self._read(batches, collator)
        if self.ranks is not None:
            self.ranks.agree(
                {
                    "whether the validation loss is a callable": self.path == "callable",
                    "the number of validation batches": len(self._batches),
                    "the validation examples (their hash)": digest(self._batches),
                    "micro_batch_tokens": self._max_tokens,
                },
                "give every rank the same, whole validation set; the ranks share it among themselves",
            )
        with together(self.ranks, forwards=True):
            self._prepare(check)
        if self.ranks is not None:
            facts = {"the path of the validation loss": self.path, "what it is the mean of": str(self._mean)}
            self.ranks.agree(facts, f"here: {self.reason}")

    def _read(self, batches: Any, collator: Callable[..., Any] | None) -> None:
        if is_loss_function(batches):
            if collator is not None:
                raise TypeError("collator goes with a dataset, not with a callable loss_fn(model)")
            self.path, self.reason = "callable", "the loss is a callable"
            self._function = batches
            return
        # Shuffling loaders and masking collators draw random numbers.
        with keep_random_state(self._device):
            self._batches = read_batches(batches, collator, self._max_tokens)

    def _prepare(self, check: bool) -> None:
        """Choose the path and make what an evaluation runs."""
        if self.path != "callable":
            self._choose_path(check)
        if self.path == "generic" and self._mean is None:
            run = self.evaluator.run_first
            self._mean = ask_model(self.model, self._batches, self._device, self.reason, run)
        self._loss: Callable[[], torch.Tensor] = self._build()
        if self.path == "callable":
            return
        if self.path == "fast":
            self.examples, self.tokens = len(self._rows), self._loss.scored
            self._batches = []
        else:
            self.examples, self.tokens = self._loss.rows, self._loss.scored
        if self.tokens == 0:
            raise ValueError(
                "no labelled token in the whole validation set: all labels are -100, or only a row's first "
                "token has one, which nothing predicts"
            )
        if self.path == "generic":
            name = type(unwrap(self.model)[0]).__name__
            said = f"ValidationLoss runs {name} with full logits, without losses by example: {self.reason}"
            announce_once(f"validation: {said}", said, stacklevel=3)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def causal_lm(self) -> CausalLM | None:
        """The two halves of the model that the fast path runs; None on the other paths."""
        return self._lm

    @property
    def labelled(self) -> LabelledLoss | None:
        """What the fast path runs, in a job of one process; None on the other paths and in several."""
        return self._loss if isinstance(self._loss, LabelledLoss) else None

    @property
    def rows(self) -> list[Example]:
        """The examples of the fast path; another list after each exchange."""
        return self._rows

    @property
    def example_tokens(self) -> torch.Tensor | None:
        """n, labelled tokens by example, (rows,) float64 on the device; None where `measure` gives no S.

        In the order of S. After a `swap_batch` in place it is the same tensor, and 0 where a row holds none.
        """
        return getattr(self._loss, "example_tokens", None)

    @property
    def example_counts(self) -> list[int] | None:
        """The same numbers on the host."""
        return getattr(self._loss, "example_counts", None)

    @property
    def computed_tokens(self) -> int:
        """Tokens in one evaluation, of all processes, without padding; 0 where there are none to count."""
        if self.path == "fast":
            return sum(row.computed for row in self._rows)
        ids = [batch.get("input_ids") for batch in self._batches]
        return sum(x.numel() for x in ids) if all(isinstance(x, torch.Tensor) for x in ids) else 0

    @property
    def flops(self) -> int:
        """Forward FLOPs of one evaluation, measured by one more, run eagerly, at first access.

        Matrix products, convolutions and attention, which counts all query-key pairs of a micro-batch. Of
        several processes it is this one's share. 0, announced, where an evaluation cannot be counted.
        """
        if self._flops is None:
            own = self._loss.local if isinstance(self._loss, SharedLoss) else self._loss
            try:
                self._flops = count_flops(lambda: self.run(own))
            except Exception as error:
                self._flops = 0
                say_uncounted("the validation loss", error)
        return self._flops

    def __call__(self) -> torch.Tensor:
        self.follow()
        return self.run(self._loss)

    def evaluate(self) -> torch.Tensor:
        """The forward alone, for callers that hold the model in `evaluation_mode` themselves."""
        return self.evaluator.forward(self._loss)

    def measure(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, the number that calling this gives, and what it is the mean of, from one forward.

        Returns:
            the loss, and S, the sums of NLL by example, (rows,) float64 on the device; None in its place on
            the generic path and for a callable. Of several processes each gets the sums of all, in one order.
        """
        self.follow()
        if self.example_tokens is None:
            return self(), None
        return self.run(self._loss.measure)

    def evaluate_with_sums(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `measure`, and the forward alone, as `evaluate`."""
        if self.example_tokens is None:
            return self.evaluate(), None
        return self.evaluator.forward(self._loss.measure)

    def run(self, measure: Callable[[], Any]) -> Any:
        """Call ``measure`` as the loss itself is: in evaluation mode, and leaving no trace."""
        return self.evaluator.run(measure)

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
        if self.path == "callable" or is_loss_function(batches):
            raise TypeError(
                "swap_batch exchanges examples and a callable has none that it could know; change what the "
                "callable reads, or make a new ValidationLoss"
            )
        self.follow()
        if self.ranks is None:
            with keep_random_state(self._device):
                batches, collator = read_batches(batches, collator, self._max_tokens), None
            if self._swap_in_place(batches):
                return True
        with uncached_autocast(self._device.type, self.evaluator.autocast):
            fresh = ValidationLoss(
                self.model,
                batches,
                collator=collator,
                micro_batch_tokens=self._max_tokens,
                check=self._check,
                process_group=self._process_group,
                _mean=self._mean,
            )
        with interrupt_later():
            vars(self).update(vars(fresh), version=self.version + 1, evaluator=self.evaluator)
        return False

    def _swap_in_place(self, batches: list[dict[str, Any]]) -> bool:
        if self._lm is None or self.path != "fast":
            return False
        check_causal_batches(batches, self._lm.vocabulary, self._lm.embeddings)
        try:
            rows = read_examples(batches)
        except FastPathRefused:
            return False
        # The comparison with the model's own loss has to see padding on the left where there is any.
        new_kind = any(row.left_padded for row in rows) and not any(row.left_padded for row in self._rows)
        if new_kind or not rows:
            return False
        with interrupt_later():
            if not self._loss.swap(rows):
                return False
            self._rows, self.examples, self.tokens = rows, len(rows), self._loss.scored
        return True

    def __repr__(self) -> str:
        return f"ValidationLoss(path={self.path!r}, examples={self.examples}, tokens={self.tokens})"

    def _choose_path(self, check: bool) -> None:
        try:
            lm = find_causal_lm(self.model)
            check_causal_batches(self._batches, lm.vocabulary, lm.embeddings)
            rows = read_examples(self._batches)
            if rows:
                lm.check_length(max(row.input_ids.numel() for row in rows))
        except FastPathRefused as refusal:
            self.reason = str(refusal)
            return
        self.path, self.reason = "fast", "a causal language model on plain batches"
        self._lm, self._rows = lm, rows
        if check and rows:
            difference = self._disagreement(lm, rows)
            if difference is not None:
                self.path, self.reason = "generic", difference
                self._lm, self._rows = None, []
            else:
                self.reason += ", equal to the model's own loss"

    def _disagreement(self, lm: CausalLM, rows: list[Example]) -> str | None:
        """Why the fast path must not be used; None where it may be, as ``_lm`` then says."""
        candidates = [replace(lm, given_mask=True), lm] if could_be_given_a_mask(lm) else [lm]

        def compare() -> str | None:
            for self._lm in candidates:
                difference = disagreement(self._lm, self.model, rows, self._device)
                if difference is None:
                    break
            return difference

        return self.evaluator.run_first(compare)

    def _build(self) -> Callable[[], torch.Tensor]:
        ranks, device = self.ranks, self._device
        if self.path == "callable":
            function = FunctionLoss(self._function, self.model, device)
            return function if ranks is None else shared_function(ranks, function, device)
        if self._lm is None:
            if ranks is not None:
                return shared_model_loss(ranks, self.model, self._batches, device, self._mean)
            return ModelLoss(self.model, self._batches, device, self._mean)
        if ranks is not None:
            return shared_labelled_loss(ranks, self._lm, self._rows, self._max_tokens, device)
        return LabelledLoss(self._lm, self._rows, max_tokens=self._max_tokens, device=device)

    def follow(self) -> None:
        """Rebuild what belongs to a device or an output embedding that the model has left.

        Raises:
            RuntimeError: when the model is no longer what the fast path computes.
        """
        device = model_device(self.model)
        if device == self._device and (self._lm is None or self._lm.is_current()):
            return
        self._device = self.evaluator.device = device
        if self.path == "callable":
            self._loss = self._build()
            return
        if self._lm is not None:
            try:
                self._lm = replace(find_causal_lm(self.model), given_mask=self._lm.given_mask)
            except FastPathRefused as refusal:
                raise RuntimeError(
                    f"the model changed since its ValidationLoss was made: {refusal}; make a new one"
                ) from refusal
        self._loss = self._build()
        self._flops = None
        self.version += 1
