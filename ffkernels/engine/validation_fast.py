"""The validation loss without padding to spare and without full logits.

    loss = 1/N · Σ over labelled positions  logsumexp(head(h)) − head(h)[label]        h = backbone(input_ids)

Examples are sorted by length and cut into micro-batches so that little padding is computed. Rows are
padded on the right and no mask is passed: under causal attention real tokens never see what follows them,
and the attention kernel keeps its causal fast path. Hidden states are gathered at the N labelled
positions only; the head and the cross-entropy run over them in chunks, so logits exist for one chunk at a
time. Per-token losses are fp32 (float64 for a float64 model), their sum float64: how examples are grouped
does not show in the result.

All tensors are made once, at fixed addresses; a call reads nothing back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ffkernels.engine.causal_lm import CausalLM, accepts_argument, find_autocast
from ffkernels.engine.maskless_attention import attention_configs, maskless_attention
from ffkernels.engine.validation_batches import IGNORE, Example

__all__ = ["LabelledLoss", "MicroBatch", "plan_micro_batches"]

# What one more forward costs, in tokens of computing: launches and Python on a GPU, Python on a CPU.
_FORWARD_IN_TOKENS = {"cpu": 48}
_FORWARD_IN_TOKENS_ELSEWHERE = 512
# Bytes of one chunk's logits in fp32: enough rows for an efficient matrix product with the head, no more.
_CHUNK_BYTES = {"cpu": 64 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20


@dataclass(frozen=True)
class MicroBatch:
    """Device tensors of one forward; `positions` index the flattened (rows · length) hidden states."""

    input_ids: torch.Tensor  # (rows, length) int64
    positions: torch.Tensor  # (scored,) int64
    targets: torch.Tensor  # (scored,) int64


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, forward_cost: int) -> list[list[int]]:
    """Cut the examples, sorted by length, where Σ (rows · longest + forward_cost) is smallest.

    No micro-batch exceeds `max_tokens` padded tokens unless a single example does. Dynamic programming
    over the sorted order, from short to long; the last group's start never moves back as examples are added.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first n examples, start of their last group
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        choice = (float("inf"), end - 1)
        for start in range(end - 1, best[end - 1][1] - 1, -1):
            padded = (end - start) * longest
            if padded > max_tokens and start < end - 1:
                break
            cost = best[start][0] + padded + forward_cost
            if cost < choice[0]:
                choice = (cost, start)
        best.append(choice)
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


class LabelledLoss:
    """Token-weighted mean NLL of `examples`: calling it runs the forward and returns a 0-dim float64 tensor.

    It does not touch modes or random state; the caller does. Everything between the call and the returned
    tensor is asynchronous on a GPU.
    """

    def __init__(
        self,
        lm: CausalLM,
        examples: Sequence[Example],
        *,
        max_tokens: int,
        device: torch.device,
        chunk_bytes: int | None = None,
        one_batch: bool = False,
    ) -> None:
        self.lm = lm
        self.device = device
        self.scored = sum(example.scored for example in examples)
        budget = chunk_bytes or _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE)
        self.chunk_rows = max(16, budget // (4 * (lm.vocabulary or 1 << 16)))
        self._arguments: dict[str, Any] = {}
        if accepts_argument(lm.backbone, "use_cache"):
            self._arguments["use_cache"] = False
        self._attention_configs = attention_configs(lm.backbone)
        groups = [list(range(len(examples)))]
        if not one_batch:
            cost = _FORWARD_IN_TOKENS.get(device.type, _FORWARD_IN_TOKENS_ELSEWHERE)
            groups = plan_micro_batches([example.computed for example in examples], max_tokens, cost)
        self.micro_batches = [self._micro_batch([examples[i] for i in group]) for group in groups]

    def _micro_batch(self, rows: list[Example]) -> MicroBatch:
        length = max(row.computed for row in rows)
        pad = getattr(self.lm.config, "pad_token_id", None)
        size = self.lm.embeddings or self.lm.vocabulary or 1
        ids = torch.full((len(rows), length), pad if isinstance(pad, int) and 0 <= pad < size else 0)
        targets = torch.full((len(rows), length), IGNORE)
        for i, row in enumerate(rows):
            ids[i, : row.computed] = row.input_ids[: row.computed]
            targets[i, : row.computed] = row.labels[1 : row.computed + 1]
        positions = targets.flatten().ne(IGNORE).nonzero().flatten()
        place = self.device
        return MicroBatch(ids.to(place), positions.to(place), targets.flatten()[positions].to(place))

    def __call__(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with ExitStack() as stack:
            stack.enter_context(maskless_attention(self.lm.backbone, self._attention_configs))
            autocast = find_autocast(self.lm.wrappers)
            if autocast is not None and autocast._enabled:
                stack.enter_context(
                    torch.autocast(autocast.device, dtype=autocast.fast_dtype, cache_enabled=False)
                )
            for batch in self.micro_batches:
                self._add_micro_batch(batch, total)
        return total / self.scored

    def _add_micro_batch(self, batch: MicroBatch, total: torch.Tensor) -> None:
        output = self.lm.backbone(input_ids=batch.input_ids, **self._arguments)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden = hidden.flatten(0, 1).index_select(0, batch.positions.to(hidden.device))
        del output
        for rows, targets in zip(
            hidden.split(self.chunk_rows), batch.targets.split(self.chunk_rows), strict=True
        ):
            total += self._chunk_loss(rows, targets).to(total.device)

    def _chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.lm.head(hidden.unsqueeze(0)).squeeze(0)
        if self.lm.softcap is not None:
            logits = torch.tanh(logits / self.lm.softcap) * self.lm.softcap
        precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=precision)
        losses = F.nll_loss(log_probabilities, targets.to(logits.device), reduction="none")
        return losses.sum(dtype=torch.float64)
