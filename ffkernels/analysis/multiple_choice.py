"""Multiple-choice questions as tokens, and where they come from.

    held out      a task's own test examples: a prompt, how it goes on, and how other examples do
    a JSONL file  {"question": "…", "choices": ["…", "…"], "answer": 1} on every line
    PubMedQA      the 1,000 expert-labelled questions, answered yes, no or maybe, from the Hugging Face hub

A question is what the model is given (the prompt) and two or more continuations (the choices), of which one
is the answer. What is too long is cut: a prompt keeps its end, a choice its beginning.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffkernels.training.examples import IGNORED, Example, start_tokens

__all__ = ["PUBMEDQA", "Question", "from_examples", "load_benchmark"]

PUBMEDQA = "pubmedqa"
PUBMEDQA_SOURCE = ("qiaojin/PubMedQA", "pqa_labeled", "train")
DECISIONS = ("yes", "no", "maybe")
NEEDED = "`question` (a text), `choices` (two or more texts) and `answer` (a number from 0, or its text)"


@dataclass(frozen=True)
class Question:
    """One question in tokens.

    Attributes:
        prompt: what all choices follow; at least one token, because a model says nothing of a first token.
        choices: two or more continuations of at least one token each.
        answer: which of them is right, counted from 0.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int


@dataclass(frozen=True)
class _Text:
    question: str
    choices: tuple[str, ...]
    answer: int


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
    if isinstance(choices, bool) or not isinstance(choices, int) or choices < 2:
        raise ValueError(f"choices={choices!r}: must be an integer of at least 2")
    if not 0 <= opening < 1:
        raise ValueError(f"opening={opening!r}: must be a number from 0 to below 1")
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
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 4:
        raise ValueError(f"max_length={max_length!r}: must be an integer of at least 4")
    texts = _pubmedqa() if source == PUBMEDQA else list(_read(Path(source)))
    if limit is not None and limit < len(texts):
        texts = random.Random(seed).sample(texts, limit)
    start = start_tokens(tokenizer)
    return [_tokens(text, tokenizer.encode, start, max_length) for text in texts]


def _tokens(text: _Text, encode: Callable[..., list[int]], start: list[int], max_length: int) -> Question:
    question = text.question.rstrip()
    gap = text.question[len(question) :]
    choices = []
    for choice in text.choices:
        between = gap or ("" if choice[:1].isspace() else " ")
        choices.append(tuple(encode(between + choice, add_special_tokens=False)[: max_length // 2]))
    room = max_length - len(start) - max(map(len, choices))
    prompt = encode(question, add_special_tokens=False)
    return Question((*start, *prompt[max(0, len(prompt) - room) :]), tuple(choices), text.answer)


def _read(path: Path) -> Iterable[_Text]:
    if not path.is_file():
        raise ValueError(
            f"benchmark {str(path)!r} is not a file; give a JSONL file whose lines have {NEEDED}, "
            f"or {PUBMEDQA!r}"
        )
    found = False
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                record = json.loads(line) if line.strip() else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error}).") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}).") from error
            if line.strip():
                found = True
                yield _question(record, where)
    if not found:
        raise ValueError(f"{path} has no questions; each line must have {NEEDED}.")


def _question(record: Any, where: str) -> _Text:
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a JSON {type(record).__name__}; each line must be an object with {NEEDED}."
        )
    missing = [key for key in ("question", "choices", "answer") if key not in record]
    if missing:
        raise ValueError(f"{where}: has the keys {sorted(record)}, not {missing[0]!r}; needed are {NEEDED}.")
    question, choices, answer = (record[key] for key in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: 'question' is {question!r}; it must be a text that is not empty.")
    good = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not good or len(set(choices)) != len(choices) or len(choices) < 2:
        raise ValueError(f"{where}: 'choices' is {choices!r}; it must be two or more different texts.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}: 'answer' is {answer!r}; it must be a number from 0 to {len(choices) - 1}, or one of "
            "the choices."
        )
    return _Text(question, tuple(choices), answer)


def _pubmedqa() -> list[_Text]:
    """The abstract without its conclusion, the question, and the choices yes, no, maybe."""
    name, configuration, split = PUBMEDQA_SOURCE
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RuntimeError(
            f"PubMedQA is read with datasets: pip install 'ffkernels[tasks]' ({error})"
        ) from error
    try:
        rows = load_dataset(name, configuration, split=split)
    except Exception as error:  # what the hub's client raises differs by version, and by what failed
        first = str(error).strip().split("\n", 1)[0]
        raise RuntimeError(
            f"PubMedQA ({name} on the Hugging Face hub) could not be had ({type(error).__name__}: {first}). "
            "Without a network give a JSONL file (--benchmark FILE), or no --benchmark: then the questions "
            "are made from the task's own test examples"
        ) from error
    return [_pubmedqa_question(row) for row in rows]


def _pubmedqa_question(row: dict[str, Any]) -> _Text:
    abstract = "\n".join(row["context"]["contexts"])
    prompt = f"Abstract: {abstract}\nQuestion: {row['question']}\nAnswer (yes, no or maybe):"
    return _Text(prompt, DECISIONS, DECISIONS.index(row["final_decision"].strip().lower()))
