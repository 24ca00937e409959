"""What to train on: tasks as lists of examples, split as in the paper (1,000 test, 32 validation, the rest).

The three splits share no example, also where texts differ only behind the cut, and what falls where depends
on the seed alone. Each task has a source that needs no download and one on the Hugging Face hub, the paper's:

| task | offline | hub | the loss counts |
|---|---|---|---|
| instruction | docstring → function, of the running Python | Magicoder-Evol-Instruct-110K | the response |
| medical | diagnoses and their notes, ICD-10-CM | Meditron's guidelines | everything |
| chat | the Chit-Chat Challenge's conversations | UltraChat 200k | everything |

``load_file`` reads JSON lines of one's own. docs/tasks.md says more.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffkernels.training import hub_data
from ffkernels.training.chitchat import conversations
from ffkernels.training.conversations import COUNTED, conversation
from ffkernels.training.examples import Example, Segment, collate, make_example, start_tokens
from ffkernels.training.icd import passages
from ffkernels.training.jsonl import read_lines, task_name
from ffkernels.training.kept_examples import kept
from ffkernels.training.standard_library import documented_functions
from ffkernels.training.token_statistics import token_statistics

__all__ = ["SOURCES", "TASKS", "Example", "Task", "collate", "load_file", "load_task"]

SOURCES = ("offline", "hub")

# A split that is tokenized on demand is measured in its first examples: all of it would take minutes.
MEASURED_ON_DEMAND = 2000


@dataclass(frozen=True)
class Task:
    """Three disjoint lists of examples; ``train`` may be one that tokenizes on demand."""

    name: str
    train: Sequence[Example]
    validation: list[Example]
    test: list[Example]

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Token counts per split, as ``token_statistics`` describes them."""
        return {
            split: token_statistics(examples, None if isinstance(examples, list) else MEASURED_ON_DEMAND)
            for split, examples in (
                ("train", self.train),
                ("validation", self.validation),
                ("test", self.test),
            )
        }

    def __repr__(self) -> str:
        counts = f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        return f"Task({self.name!r}: {counts})"


def _instruction(tokenizer: Any, chat_loss: str) -> list[tuple[Segment, ...]]:
    return [((f'"""{summary}"""\n', False), (source, True)) for summary, source in documented_functions()]


def _medical(tokenizer: Any, chat_loss: str) -> list[tuple[Segment, ...]]:
    return [((passage, True),) for passage in passages()]


def _chat(tokenizer: Any, chat_loss: str) -> list[tuple[Segment, ...]]:
    talks = ([{"role": role, "content": said} for role, said in talk] for talk in conversations())
    return [
        conversation(messages, tokenizer, f"conversation {number}", counted=chat_loss)
        for number, messages in enumerate(talks)
    ]


TASKS: dict[str, Callable[[Any, str], list[tuple[Segment, ...]]]] = {
    "chat": _chat,
    "instruction": _instruction,
    "medical": _medical,
}


def load_task(
    name: str,
    tokenizer: Any,
    *,
    max_length: int = 64,
    seed: int = 0,
    test_examples: int = 1000,
    validation_examples: int = 32,
    source: str = "offline",
    chat_loss: str = "all",
) -> Task:
    """The task called ``name``, tokenized to at most ``max_length`` tokens per example.

    ``source``: "offline" needs no network, "hub" takes the paper's data set from the Hugging Face hub or
    from the local cache. ``chat_loss``: "all" counts every token of a conversation, as the paper's authors
    do, "assistant" only what the assistant says.

    Raises:
        ValueError: a name or number that is not allowed, or too few examples for the splits.
        RuntimeError: a package or the hub's data set cannot be had; the message says what to do.
    """
    if name not in TASKS:
        raise ValueError(
            f"task {name!r} does not exist; allowed are {', '.join(sorted(TASKS))}. "
            "For a JSONL file of your own use load_file (--data FILE.jsonl)."
        )
    for field, value, allowed in (("source", source, SOURCES), ("chat_loss", chat_loss, COUNTED)):
        if value not in allowed:
            raise ValueError(f"{field}={value!r}; allowed are {', '.join(map(repr, allowed))}.")
    sizes = _sizes(max_length, test_examples, validation_examples)
    if source == "hub":
        splits = hub_data.load_splits(name, tokenizer, seed=seed, chat_loss=chat_loss, **sizes)
        return Task(name, *splits)
    examples = kept(
        (name, max_length, chat_loss),
        tokenizer,
        lambda: _examples(TASKS[name](tokenizer, chat_loss), tokenizer, max_length),
    )
    return _split(name, examples, seed, **sizes)


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

    The file may be compressed (.xz, .gz, .bz2). The loss counts all of a `text`, only the `response`, or only
    what the assistant says. Longer examples than ``max_length`` are cut, never packed. A repeated line is
    taken once, so that no line is in two splits.
    """
    path = Path(path)
    sizes = _sizes(max_length, test_examples, validation_examples)
    sources = dict.fromkeys(read_lines(path, tokenizer))
    return _split(task_name(path), _examples(sources, tokenizer, max_length), seed, **sizes)


def _sizes(max_length: int, test_examples: int, validation_examples: int) -> dict[str, int]:
    for field, value, least in (
        ("max_length", max_length, 4),
        ("test_examples", test_examples, 1),
        ("validation_examples", validation_examples, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{field}={value!r}; it must be a whole number of at least {least}.")
    return {
        "max_length": max_length,
        "test_examples": test_examples,
        "validation_examples": validation_examples,
    }


def _examples(sources: Iterable[Sequence[Segment]], tokenizer: Any, max_length: int) -> list[Example]:
    """An example of each source; one only where different texts are the same tokens once they are cut."""
    start = start_tokens(tokenizer)
    cut = (make_example(source, tokenizer, start, max_length) for source in sources)
    return list({tuple(example["input_ids"]): example for example in cut}.values())


def _split(
    name: str,
    examples: list[Example],
    seed: int,
    *,
    max_length: int,
    test_examples: int,
    validation_examples: int,
) -> Task:
    """The splits of different examples: none is in two of them."""
    held_out = test_examples + validation_examples
    if not examples:
        raise ValueError(f"task {name!r} has no example: its data are empty.")
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
