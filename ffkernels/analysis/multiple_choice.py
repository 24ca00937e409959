"""Multiple-choice questions as tokens, where they come from, and how likely a model finds each choice.

    score(choice) = Σ log p(token | prompt, the choice's tokens before it)        nats, in float64

What is too long is cut: a prompt keeps its end, a choice its beginning. Sequences (prompt and one choice) are
right-padded; only the logits at the choices' own tokens are normalised, in float32.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ffkernels.training.examples import IGNORED, Example, collate, start_tokens
from ffkernels.training.records import BOM, parsed
from ffkernels.training.requirements import first_line, require
from ffkernels.training.rules import FRACTION, check, whole
from ffkernels.validation.causal_lm import model_device
from ffkernels.validation.evaluator import evaluation_mode

PUBMEDQA = "pubmedqa"
PUBMEDQA_SOURCE = ("qiaojin/PubMedQA", "pqa_labeled", "train")
DECISIONS = ("yes", "no", "maybe")
# Logits of one batch at most: 256 MiB of float32. A vocabulary of 128,000 leaves room for 524 tokens.
LOGITS = 1 << 26
NEEDED = "`question` (a text), `choices` (two or more texts) and `answer` (a number from 0, or its text)"


@dataclass(frozen=True)
class Question:
    """One question in tokens."""

    prompt: tuple[int, ...]  # at least one token: a model says nothing of a first token
    choices: tuple[tuple[int, ...], ...]  # two or more continuations of at least one token each
    answer: int  # which of them is right, counted from 0


_Text = tuple[str, tuple[str, ...], int]  # a question in words: question, choices, answer


def from_examples(
    examples: Sequence[Example],
    *,
    choices: int = 4,
    opening: float = 0.5,
    limit: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """Questions from a task's own examples: how does this go on?

    ``opening`` is the share of what the loss counts (a response, or a text) that is given with the prompt; at
    0 the question is which response belongs to a prompt. The wrong choices are what is left of other
    examples, drawn by ``seed``. A choice is cut to half of the longest example.

    Raises:
        ValueError: when an argument is out of range, or there are not so many different continuations.
    """
    check("choices", choices, whole(2))
    check("opening", opening, FRACTION)
    pairs = [_cut(example, opening) for example in examples]
    room = max((len(example["input_ids"]) for example in examples), default=0) // 2
    pairs = [(prompt, response[:room]) for prompt, response in pairs if prompt and response[:room]]
    responses = list(dict.fromkeys(response for _, response in pairs))
    if len(responses) < choices:
        raise ValueError(
            f"{len(examples)} held-out examples have {len(responses)} different continuations; questions "
            f"of {choices} choices need as many. Hold out more test examples or ask for fewer choices."
        )
    draw = random.Random(seed)
    questions = []
    for prompt, response in pairs[:limit]:
        wrong: list[tuple[int, ...]] = []
        while len(wrong) < choices - 1:
            other = responses[draw.randrange(len(responses))]
            if other != response and other not in wrong:
                wrong.append(other)
        answer = draw.randrange(choices)  # where the answer stands says nothing about it
        questions.append(Question(prompt, (*wrong[:answer], response, *wrong[answer:]), answer))
    return questions


def _cut(example: Example, opening: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What comes before the first counted tokens, with their opening, and the rest of them."""
    tokens, labels = example["input_ids"], example["labels"]
    begin = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    end = next((i for i in range(begin, len(labels)) if labels[i] == IGNORED), len(labels))
    middle = begin + int(opening * (end - begin))
    return tuple(tokens[:middle]), tuple(tokens[middle:end])


def load_benchmark(
    source: str | os.PathLike[str],
    tokenizer: Any,
    *,
    max_length: int,
    limit: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """The questions of a JSONL file, or with ``"pubmedqa"`` those of PubMedQA, in tokens.

    ``limit`` takes so many of them, drawn by ``seed``. A prompt and its longest choice together have at most
    ``max_length`` tokens, a choice at most half as many. A space is put between question and choice where
    neither has white space there; white space at the question's end is counted as the choice's, because
    tokenizers merge it with what follows.

    Raises:
        ValueError: naming the file and the line, where something is missing or wrong.
        RuntimeError: when PubMedQA cannot be fetched.
    """
    check("max_length", max_length, whole(4))
    texts = _pubmedqa() if source == PUBMEDQA else _read(Path(source))
    if limit is not None and limit < len(texts):
        texts = random.Random(seed).sample(texts, limit)
    start = start_tokens(tokenizer)
    return [_tokens(text, tokenizer.encode, start, max_length) for text in texts]


def _tokens(text: _Text, encode: Callable[..., list[int]], start: list[int], max_length: int) -> Question:
    words, texts, answer = text
    question = words.rstrip()
    gap = words[len(question) :]
    choices = []
    for choice in texts:
        between = gap or ("" if choice[:1].isspace() else " ")
        choices.append(tuple(encode(between + choice, add_special_tokens=False)[: max_length // 2]))
    room = max_length - len(start) - max(map(len, choices))
    prompt = encode(question, add_special_tokens=False)
    return Question((*start, *prompt[max(0, len(prompt) - room) :]), tuple(choices), answer)


def _read(path: Path) -> list[_Text]:
    if not path.is_file():
        raise ValueError(
            f"benchmark {str(path)!r} is not a file; give a JSONL file whose lines have {NEEDED}, "
            f"or {PUBMEDQA!r}"
        )
    lines = [(f"{path}, line {n}", line) for n, line in enumerate(path.read_bytes().splitlines(), start=1)]
    texts = [_question(parsed(line, where), where) for where, line in lines if line.removeprefix(BOM).strip()]
    if not texts:
        raise ValueError(f"{path} has no questions; each line must have {NEEDED}.")
    return texts


def _question(record: Any, where: str) -> _Text:
    def need(good: object, complaint: str) -> None:
        if not good:
            raise ValueError(f"{where}: {complaint}.")

    need(
        isinstance(record, dict), f"a JSON {type(record).__name__}; each line must be an object with {NEEDED}"
    )
    missing = [key for key in ("question", "choices", "answer") if key not in record]
    need(
        not missing,
        f"has the keys {sorted(record)}, not {', '.join(map(repr, missing))}; needed are {NEEDED}",
    )
    question, choices, answer = (record[key] for key in ("question", "choices", "answer"))
    asked = isinstance(question, str) and question.strip()
    need(asked, f"'question' is {question!r}; it must be a text that is not empty")
    good = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    several = good and 2 <= len(choices) == len(set(choices))
    need(several, f"'choices' is {choices!r}; it must be two or more different texts")
    right = choices.index(answer) if isinstance(answer, str) and answer in choices else answer
    counted = isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(choices)
    last = len(choices) - 1
    need(counted, f"'answer' is {answer!r}; it must be a number from 0 to {last}, or one of the choices")
    return question, tuple(choices), right


def _pubmedqa() -> list[_Text]:
    """The abstract without its conclusion, the question, and the choices yes, no, maybe."""
    name, configuration, split = PUBMEDQA_SOURCE
    datasets = require("datasets", "PubMedQA is read with datasets", "tasks")
    try:
        rows = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # what the hub's client raises differs by version, and by what failed
        raise RuntimeError(
            f"PubMedQA ({name} on the Hugging Face hub) could not be had ({type(error).__name__}: "
            f"{first_line(error)}). "
            "Without a network give a JSONL file (--benchmark FILE), or no --benchmark: then the questions "
            "are made from the task's own test examples"
        ) from error
    texts = []
    for row in rows:
        abstract, question = "\n".join(row["context"]["contexts"]), row["question"]
        prompt = f"Abstract: {abstract}\nQuestion: {question}\nAnswer (yes, no or maybe):"
        texts.append((prompt, DECISIONS, DECISIONS.index(row["final_decision"].strip().lower())))
    return texts


def choice_scores(
    model: nn.Module, questions: Sequence[Question], *, pad_token_id: int, batch_size: int = 64
) -> list[list[float]]:
    """The log-likelihood of every choice given its prompt, summed over the choice's tokens, in nats.

    Args:
        model: a causal language model whose ``model(input_ids, attention_mask).logits`` has the shape (rows,
            tokens, vocabulary); evaluated in eval mode and left as it was.
        pad_token_id: stands where it is masked; any token will do.
        batch_size: sequences per forward at most; fewer where their logits would not fit ``LOGITS``.

    Returns:
        One list per question, one score per choice. Divide by ``len(choice)`` for the mean per token.
    """
    check("batch_size", batch_size, whole(1))
    device = model_device(model)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1 << 17
    scores = [[0.0] * len(question.choices) for question in questions]
    with evaluation_mode(model, device):
        for rows in _batches(questions, batch_size, LOGITS // vocabulary):
            texts = [(questions[q].prompt, questions[q].choices[c]) for q, c in rows]
            examples = [Example([*p, *answer], [IGNORED] * len(p) + [*answer]) for p, answer in texts]
            batch = collate(examples, pad_token_id)
            labels = batch.pop("labels")[:, 1:].to(device)
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits[:, :-1]
            wanted = labels != IGNORED
            nats = F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none").double()
            row_of = wanted.nonzero()[:, 0]
            sums = torch.zeros(len(rows), dtype=torch.float64, device=device).index_add_(0, row_of, nats)
            for (question, choice), total in zip(rows, sums.tolist(), strict=True):
                scores[question][choice] = -total
    return scores


def _batches(questions: Sequence[Question], batch_size: int, tokens: int) -> Iterator[list[tuple[int, int]]]:
    """(question, choice) by falling length; a batch passes neither ``batch_size`` nor padded ``tokens``."""
    lengths = {
        (q, c): len(question.prompt) + len(choice)
        for q, question in enumerate(questions)
        for c, choice in enumerate(question.choices)
    }
    rows = sorted(lengths, key=lengths.get, reverse=True)
    while rows:
        size = max(1, min(batch_size, tokens // lengths[rows[0]]))
        yield rows[:size]
        rows = rows[size:]
