"""What to train on: tasks as lists of examples, split as in the paper (1,000 test, 32 validation, the rest).

An example is ``{"input_ids": [...], "labels": [...]}``; labels repeat the tokens that the loss counts and
are −100 elsewhere. The three splits share no example, also where texts differ only behind the cut, and what
falls where depends on the seed alone.

``instruction`` pairs docstrings with the functions they describe, cut at run time from the standard library
of the Python that runs, so there is nothing to download. ``load_file`` reads JSON lines of one's own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ffkernels.training.jsonl import Segment, read_lines
from ffkernels.training.standard_library import documented_functions

Example = dict[str, list[int]]

IGNORED = -100


@dataclass(frozen=True)
class Task:
    """Three disjoint lists of examples."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    def __repr__(self) -> str:
        counts = f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        return f"Task({self.name!r}: {counts})"


def _instruction() -> list[tuple[Segment, Segment]]:
    return [((f'"""{summary}"""\n', False), (source, True)) for summary, source in documented_functions()]


TASKS: dict[str, Callable[[], Sequence[Sequence[Segment]]]] = {"instruction": _instruction}


def load_task(
    name: str,
    tokenizer: Any,
    *,
    max_length: int = 64,
    seed: int = 0,
    test_examples: int = 1000,
    validation_examples: int = 32,
) -> Task:
    """The task called ``name``, tokenized to at most ``max_length`` tokens per example."""
    if name not in TASKS:
        raise ValueError(
            f"task {name!r} does not exist; allowed are {', '.join(sorted(TASKS))}. "
            "For a JSONL file of your own use load_file (--data FILE.jsonl)."
        )
    return _split(name, TASKS[name](), tokenizer, max_length, seed, test_examples, validation_examples)


def load_file(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    max_length: int = 64,
    seed: int = 0,
    test_examples: int = 1000,
    validation_examples: int = 32,
) -> Task:
    """A task from a JSONL file whose lines have `text`, or `prompt` and `response`, or `messages`.

    The loss counts all of a `text`, only the `response`, or only what the assistant says. Longer examples
    than ``max_length`` are cut, never packed. A repeated line is taken once, so that no line is in two
    splits.
    """
    path = Path(path)
    sources = list(dict.fromkeys(read_lines(path, tokenizer)))
    return _split(path.stem, sources, tokenizer, max_length, seed, test_examples, validation_examples)


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One right-padded batch: long tensors (examples, longest), padding masked and unlabelled."""
    if not examples:
        raise ValueError("collate needs at least one example.")
    longest = max(len(example["input_ids"]) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        input_ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, :length] = torch.tensor(example["labels"])
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _split(
    name: str,
    sources: Sequence[Sequence[Segment]],
    tokenizer: Any,
    max_length: int,
    seed: int,
    test_examples: int,
    validation_examples: int,
) -> Task:
    for field, value, least in (
        ("max_length", max_length, 4),
        ("test_examples", test_examples, 1),
        ("validation_examples", validation_examples, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{field}={value!r}; it must be a whole number of at least {least}.")
    start = _start(tokenizer)
    cut = (_example(source, tokenizer, start, max_length) for source in sources)
    # Different texts may be the same tokens once they are cut: no example may be in two splits.
    examples = list({tuple(example["input_ids"]): example for example in cut}.values())
    held_out = test_examples + validation_examples
    if len(examples) <= held_out:
        raise ValueError(
            f"task {name!r} has {len(examples)} different examples of at most {max_length} tokens; "
            f"{test_examples} test and {validation_examples} validation examples leave none to train on. "
            "Ask for fewer of them."
        )
    random.Random(seed).shuffle(examples)
    return Task(
        name,
        train=examples[held_out:],
        validation=examples[test_examples:held_out],
        test=examples[:test_examples],
    )


def _start(tokenizer: Any) -> list[int]:
    """The start token, where the tokenizer itself puts one before a text (Llama's does, GPT-NeoX's not)."""
    start = getattr(tokenizer, "bos_token_id", None)
    return (
        [start] if start is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [start] else []
    )


def _example(segments: Sequence[Segment], tokenizer: Any, start: list[int], max_length: int) -> Example:
    """Tokens and labels. The first prompt keeps its end, half the room at most; so some response is left."""
    pieces = [(tokenizer.encode(text, add_special_tokens=False), counted) for text, counted in segments]
    if start and pieces[0][0][:1] == start:  # a chat template wrote it
        pieces[0] = (pieces[0][0][1:], pieces[0][1])
    if not pieces[0][1]:
        room = max_length // 2 - len(start)
        prompt = pieces[0][0]
        pieces[0] = (prompt[max(0, len(prompt) - room) :], False)
    input_ids, labels = list(start), [IGNORED] * len(start)
    for tokens, counted in pieces:
        input_ids += tokens
        labels += tokens if counted else [IGNORED] * len(tokens)
    if pieces[-1][1] and tokenizer.eos_token_id is not None:
        input_ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}
