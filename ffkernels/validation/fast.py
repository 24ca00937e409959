"""The validation loss without padding to spare and without full logits.

    loss = 1/N · Σ over labelled positions  logsumexp(head(h)) − head(h)[label]        h = backbone(input_ids)

Rows are padded on the right and no mask is passed: under causal attention real tokens never see what
follows them. Hidden states are gathered at the N labelled positions only; the head and the cross-entropy
run over them in chunks. Per-token losses are fp32 (float64 for a float64 model), their sum float64: how
examples are grouped does not show in the result.

A model whose forward must be run as a whole, since it gathers its parameters there (FSDP2), is run as a
whole: a hook in front of the head picks the labelled positions, and the logits of one micro-batch's exist
at once.

All tensors are made once, at fixed addresses; a call reads nothing back to the host and decides nothing by
values. So a call can be captured in a CUDA graph, and `swap` can put other examples where the first were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.validation.batches import IGNORE, Example, check_causal_batches, read_examples
from ffkernels.validation.causal_lm import CausalLM, FastPathRefused, accepts_argument, find_autocast
from ffkernels.validation.evaluator import Loss
from ffkernels.validation.forward_price import forward_price
from ffkernels.validation.maskless_attention import (
    attends_eagerly,
    attention_configs,
    causal_mask,
    maskless_attention,
)
from ffkernels.validation.micro_batches import (
    MicroBatch,
    assign,
    counts_by_example,
    lay_out,
    plan_micro_batches,
    sums_by_example,
)

# Bytes of one chunk's logits in fp32: enough rows for an efficient matrix product with the head, no more.
_CHUNK_BYTES = {"cpu": 64 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20
# So many chunks of logits may exist at once where the head cannot be run in chunks.
_CHUNKS_AT_ONCE = 4
# Log-probabilities are made for a quarter of a chunk, though not for fewer rows than a GPU has processors.
_PARTS = 4
_LEAST_ROWS_OF_A_PART = {"cpu": 16}
_LEAST_ROWS_OF_A_PART_ELSEWHERE = 128


def token_limit(lm: CausalLM, max_tokens: int, device: torch.device) -> int:
    """Padded tokens per forward at most, so that the logits of one forward fit where they exist at once."""
    return max_tokens if lm.through is None else min(max_tokens, _CHUNKS_AT_ONCE * _chunk_rows(lm, device))


def _chunk_rows(lm: CausalLM, device: torch.device) -> int:
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE)
    return max(16, budget // (4 * (lm.vocabulary or 1 << 16)))


class LabelledLoss(Loss):
    """Token-weighted mean NLL of ``rows``. An evaluation is asynchronous on a GPU until its result is read.

    Attributes:
        before_head: called in each forward, when all is launched but the head and what follows it.
    """

    before_head: Callable[[], None] | None = None

    def __init__(
        self,
        lm: CausalLM,
        rows: Sequence[Example],
        *,
        max_tokens: int,
        device: torch.device,
        one_batch: bool = False,
    ) -> None:
        self.lm, self.rows, self.device = lm, rows, device
        self.chunk_rows = _chunk_rows(lm, device)
        least = _LEAST_ROWS_OF_A_PART.get(device.type, _LEAST_ROWS_OF_A_PART_ELSEWHERE)
        self.part_rows = max(least, -(-self.chunk_rows // _PARTS))
        self._arguments: dict[str, Any] = {}
        if accepts_argument(lm.backbone, "use_cache"):
            self._arguments["use_cache"] = False
        self._attention_configs = attention_configs(lm.backbone)
        size = lm.embeddings or lm.vocabulary or 1
        pad = getattr(lm.config, "pad_token_id", None)
        self._pad = pad if isinstance(pad, int) and 0 <= pad < size else 0
        groups = [list(range(len(rows)))]
        if not one_batch:
            lengths, limit = [row.computed for row in rows], token_limit(lm, max_tokens, device)
            groups = plan_micro_batches(lengths, limit, forward_price(lm, device))
        laid_out = [lay_out([rows[i] for i in group], self._pad) for group in groups]
        self.micro_batches = [batch.to(device) for batch in laid_out]
        self.example_counts = counts_by_example(laid_out)
        self.example_tokens = torch.tensor(self.example_counts, dtype=torch.float64, device=device)
        self._divisor = torch.tensor(self.tokens, dtype=torch.float64, device=device)
        self._masks: dict[int, torch.Tensor] = {}
        if lm.given_mask:
            dtype = lm.embedding_dtype
            for length in {batch.input_ids.shape[1] for batch in self.micro_batches}:
                self._masks[length] = causal_mask(length, dtype, device)

    @property
    def examples(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        return sum(row.scored for row in self.rows)

    @property
    def computed_tokens(self) -> int:
        return sum(row.computed for row in self.rows)

    def swap(self, batches: list[dict[str, Any]]) -> bool:
        """Put their examples in place of the present ones, at the same addresses.

        Raises:
            ValueError: where they hold token ids that the model has not.
        """
        check_causal_batches(batches, self.lm.vocabulary, self.lm.embeddings)
        try:
            rows = read_examples(batches)
        except FastPathRefused:
            return False
        # The comparison with the model's own loss has to see padding on the left where there is any.
        new_kind = any(row.left_padded for row in rows) and not any(row.left_padded for row in self.rows)
        return bool(rows) and not new_kind and self._place(rows)

    def _place(self, examples: Sequence[Example]) -> bool:
        rooms = [(*batch.input_ids.shape, batch.positions.numel()) for batch in self.micro_batches]
        placed = assign(examples, rooms)
        if placed is None:
            return False
        new = [
            lay_out(group, self._pad, rows=rows, length=length, scored=labels)
            for group, (rows, length, labels) in zip(placed, rooms, strict=True)
        ]
        with interrupt_later():
            for mine, other in zip(self.micro_batches, new, strict=True):
                mine.copy_(other)
            self.example_counts = counts_by_example(new)
            self.example_tokens.copy_(torch.tensor(self.example_counts, dtype=torch.float64))
            self.rows = examples
            self._divisor.fill_(self.tokens)
        return True

    def evaluate(self) -> torch.Tensor:
        return self._mean(lambda index, losses: None)

    def measure(self) -> tuple[torch.Tensor, torch.Tensor]:
        parts: list[list[torch.Tensor]] = [[] for _ in self.micro_batches]
        mean = self._mean(lambda index, losses: parts[index].append(losses))
        return mean, sums_by_example(self.micro_batches, parts, self.device)

    def _mean(self, take: Callable[[int, torch.Tensor], None]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)

        def add(index: int, losses: torch.Tensor) -> None:
            total.add_(losses.sum(dtype=torch.float64).to(total.device))
            take(index, losses)

        self.run(add)
        return total / self._divisor

    def run(self, take: Callable[[int, torch.Tensor], None]) -> None:
        """Run all micro-batches; `take(i, losses)` gets the token losses of each part of the i-th, in order.

        `losses` is 1-dim, fp32 or float64, in the order of the micro-batch's `positions`.
        """
        # Whoever changes the attention implementation later needs other masks or none.
        masks = self._masks if attends_eagerly(self._attention_configs) else {}
        with ExitStack() as stack:
            stack.enter_context(maskless_attention(self.lm.backbone, self._attention_configs))
            autocast = find_autocast(self.lm.wrappers)
            if autocast is not None:
                stack.enter_context(
                    torch.autocast(autocast.device, dtype=autocast.fast_dtype, cache_enabled=False)
                )
            for index, batch in enumerate(self.micro_batches):
                mask = masks.get(batch.input_ids.shape[1])
                extra = {} if mask is None else {"attention_mask": mask}
                self._run_micro_batch(batch, partial(take, index), extra)

    def _run_micro_batch(
        self, batch: MicroBatch, take: Callable[[torch.Tensor], None], extra: dict[str, Any]
    ) -> None:
        if self.lm.through is not None:
            return self._take_losses(self._logits_of_the_whole(batch, extra), batch.targets, None, take)
        output = self.lm.backbone(input_ids=batch.input_ids, **self._arguments, **extra)
        if self.before_head is not None:
            self.before_head()
        hidden = _labelled(output if isinstance(output, torch.Tensor) else output[0], batch.positions)
        del output
        for rows, targets in zip(
            hidden.split(self.chunk_rows), batch.targets.split(self.chunk_rows), strict=True
        ):
            self._take_losses(self.lm.head(rows.unsqueeze(0)).squeeze(0), targets, self.lm.softcap, take)

    def _logits_of_the_whole(self, batch: MicroBatch, extra: dict[str, Any]) -> torch.Tensor:
        def pick(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_labelled(inputs[0], batch.positions).unsqueeze(0), *inputs[1:])

        hook = self.lm.head.register_forward_pre_hook(pick)
        try:
            output = self.lm.through(input_ids=batch.input_ids, **self._arguments, **extra)
        finally:
            hook.remove()
        logits = getattr(output, "logits", None)
        return (output[0] if logits is None else logits).squeeze(0)

    def _take_losses(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        softcap: float | None,
        take: Callable[[torch.Tensor], None],
    ) -> None:
        precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
        targets = targets.to(logits.device)
        for rows, wanted in zip(logits.split(self.part_rows), targets.split(self.part_rows), strict=True):
            if softcap is not None:
                rows = torch.tanh(rows / softcap) * softcap
            log_probabilities = F.log_softmax(rows, dim=-1, dtype=precision)
            losses = F.nll_loss(log_probabilities, wanted, reduction="none", ignore_index=IGNORE)
            del rows, log_probabilities  # else they live on while the next part's are made
            take(losses)


def _labelled(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(scored, width) of hidden states (rows, length, width)."""
    return hidden.flatten(0, 1).index_select(0, positions.to(hidden.device))
