"""How likely a model finds each choice of a multiple-choice question, in batches.

    score(choice) = Σ log p(token | prompt, the choice's tokens before it)        nats, in float64

Sequences (prompt and one choice) are sorted by length and right-padded: under causal attention nothing to
the left of the padding sees it. Only the logits at the choices' own tokens are normalised, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ffkernels.analysis.multiple_choice import Question
from ffkernels.training.examples import IGNORED, collate
from ffkernels.validation.causal_lm import model_device
from ffkernels.validation.evaluator import evaluation_mode

__all__ = ["choice_scores"]

# Logits of one batch at most: 256 MiB of float32. A vocabulary of 128,000 leaves room for 524 tokens.
LOGITS = 1 << 26

Row = tuple[int, int]  # which question, which of its choices


def choice_scores(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    pad_token_id: int,
    batch_size: int = 64,
) -> list[list[float]]:
    """The log-likelihood of every choice given its prompt, summed over the choice's tokens, in nats.

    Args:
        model: a causal language model whose ``model(input_ids, attention_mask).logits`` has the shape (rows,
            tokens, vocabulary); evaluated in eval mode and left as it was.
        questions: in tokens.
        pad_token_id: stands where it is masked; any token will do.
        batch_size: sequences per forward at most; fewer where their logits would not fit ``LOGITS``.

    Returns:
        One list per question, one score per choice. Divide by ``len(choice)`` for the mean per token.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: must be an integer of at least 1")
    device = model_device(model)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1 << 17
    scores = [[0.0] * len(question.choices) for question in questions]
    with evaluation_mode(model, device):
        for rows in _batches(questions, batch_size, LOGITS // vocabulary):
            batch = collate([_example(questions[q], choice) for q, choice in rows], pad_token_id)
            labels = batch.pop("labels")[:, 1:].to(device)
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits[:, :-1]
            wanted = labels != IGNORED
            nats = F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none").double()
            row_of = wanted.nonzero()[:, 0]
            sums = torch.zeros(len(rows), dtype=torch.float64, device=device).index_add_(0, row_of, nats)
            for (question, choice), total in zip(rows, sums.tolist(), strict=True):
                scores[question][choice] = -total
    return scores


def _example(question: Question, choice: int) -> dict[str, list[int]]:
    prompt, answer = list(question.prompt), list(question.choices[choice])
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def _batches(questions: Sequence[Question], batch_size: int, tokens: int) -> Iterator[list[Row]]:
    """Rows by falling length, so many that neither ``batch_size`` nor ``tokens`` with padding is passed."""

    def length(row: Row) -> int:
        question = questions[row[0]]
        return len(question.prompt) + len(question.choices[row[1]])

    rows = [(q, c) for q, question in enumerate(questions) for c in range(len(question.choices))]
    rows.sort(key=length, reverse=True)
    while rows:
        size = max(1, min(batch_size, tokens // length(rows[0])))
        yield rows[:size]
        rows = rows[size:]
