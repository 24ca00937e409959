"""What to train on: tasks as lists of examples, split as in the paper (1,000 test, 32 validation, the rest).

The three splits share no example, also where texts differ only behind the cut, and what falls where depends
on the seed alone. docs/paper.md says which data a task has, and what of it the loss counts.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffkernels.training import hub_data
from ffkernels.training.config import CHAT_LOSSES, SOURCES
from ffkernels.training.conversations import conversation
from ffkernels.training.examples import (
    Example,
    Segment,
    collate,
    kept,
    make_example,
    start_tokens,
    token_statistics,
)
from ffkernels.training.offline import conversations, documented_functions, passages
from ffkernels.training.records import EMPTY, SEVERAL, read_lines, task_name
from ffkernels.training.rules import check, whole

__all__ = ["TASKS", "Example", "Task", "collate", "count_of", "load_file", "load_task"]

# A split that is tokenized on demand is measured in its first examples: all of it would take minutes.
MEASURED_ON_DEMAND = 2000

REPEATED, SAME_START, HELD_OUT, BEYOND = "repeated", "same start", "held out", "beyond"


@dataclass(frozen=True)
class Task:
    """Three disjoint lists of examples; ``train`` may be one that tokenizes on demand.

    ``remarks`` say in sentences what was left out of the data.
    """

    name: str
    train: Sequence[Example]
    validation: list[Example]
    test: list[Example]
    remarks: tuple[str, ...] = ()

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Token counts per split, as ``token_statistics`` describes them."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            split: token_statistics(examples, None if isinstance(examples, list) else MEASURED_ON_DEMAND)
            for split, examples in splits.items()
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
    for field, value, allowed in (("source", source, SOURCES), ("chat_loss", chat_loss, CHAT_LOSSES)):
        if value not in allowed:
            raise ValueError(f"{field}={value!r}; allowed are {', '.join(map(repr, allowed))}.")
    sizes = _sizes(max_length, test_examples, validation_examples)
    if source == "hub":
        return Task(name, *hub_data.load_splits(name, tokenizer, seed=seed, chat_loss=chat_loss, **sizes))
    examples = kept(
        (name, max_length, chat_loss),
        tokenizer,
        lambda: _examples(TASKS[name](tokenizer, chat_loss), tokenizer, max_length),
    )
    counts: Counter[str] = Counter()
    task = _split(name, _different(examples, counts), seed, **sizes)
    return replace(task, remarks=tuple(_remarks(name, counts, max_length, "text")))


def load_file(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    max_length: int = 64,
    seed: int = 0,
    test_examples: int = 1000,
    validation_examples: int = 32,
    test_data: str | os.PathLike[str] | None = None,
) -> Task:
    """A task from a file of JSON lines, or of one JSON array, in any form of ``records.py``.

    The file may be compressed (.xz, .gz, .bz2). The loss counts all of a `text`, only a response, or only
    what the assistant says. Longer examples than ``max_length`` are cut, never packed. A repeated line is
    taken once, so that no line is in two splits. ``test_data`` is a file of the same kind whose examples,
    ``test_examples`` at most, are the test set.

    Raises:
        ValueError: for bad lines, ten of them together, or too few examples for the splits.
    """
    path = Path(path)
    sizes = _sizes(max_length, test_examples, validation_examples)
    examples, counts = _read(path, tokenizer, max_length)
    if test_data is None:
        task = _split(task_name(path), examples, seed, **sizes)
        return replace(task, remarks=tuple(_remarks(path.name, counts, max_length)))
    test_path = Path(test_data)
    test, test_counts = _read(test_path, tokenizer, max_length)
    held_out = {tuple(example["input_ids"]) for example in test}  # also of those that are not tested on
    random.Random(seed).shuffle(test)
    test_counts[BEYOND] = len(test[test_examples:])
    others = [example for example in examples if tuple(example["input_ids"]) not in held_out]
    counts[HELD_OUT] = len(examples) - len(others)
    if not others:
        raise ValueError(f"test_data={str(test_path)!r}: must not have all the lines of {path}")
    task = _split(task_name(path), others, seed, **{**sizes, "test_examples": 0})
    remarks = (*_remarks(path.name, counts, max_length), *_remarks(test_path.name, test_counts, max_length))
    return replace(task, test=test[:test_examples], remarks=remarks)


def count_of(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'s' * (count != 1)}"


def _remarks(name: str, counts: Counter[str], max_length: int, unit: str = "line") -> list[str]:
    """What was not taken of the file or task ``name``, and what was read in one of several ways."""
    reasons = {
        EMPTY: "with nothing to learn from, empty or white space",
        REPEATED: "repeated word for word",
        SAME_START: f"equal to another in all of their first {max_length} tokens",
        HELD_OUT: "equal to one of the file that is tested on",
        BEYOND: "beyond the test examples that were asked for",
    }
    left_out = [f"{count_of(counts[key], unit)} {reason}" for key, reason in reasons.items() if counts[key]]
    remarks = [f"Left out of {name}: {'; '.join(left_out)}."] if left_out else []
    if several := counts[SEVERAL]:
        remarks.append(
            f"{count_of(several, unit)} of {name} {'has' if several == 1 else 'have'} several forms; read is "
            "the first of messages, conversations, prompt, instruction, text."
        )
    return remarks


def _read(path: Path, tokenizer: Any, max_length: int) -> tuple[list[Example], Counter[str]]:
    """The different examples of a file, and how many lines are none of them, by reason."""
    counts: Counter[str] = Counter()
    lines = list(read_lines(path, tokenizer, counts))
    sources = dict.fromkeys(lines)
    counts[REPEATED] = len(lines) - len(sources)
    if not sources:
        left_out = " ".join(_remarks(path.name, counts, max_length))
        raise ValueError(f"task {task_name(path)!r} has no example: its data are empty. {left_out}".rstrip())
    return _different(_examples(sources, tokenizer, max_length), counts), counts


def _sizes(max_length: int, test_examples: int, validation_examples: int) -> dict[str, int]:
    check("max_length", max_length, whole(4))
    check("test_examples", test_examples, whole(0))
    check("validation_examples", validation_examples, whole(1))
    return dict(max_length=max_length, test_examples=test_examples, validation_examples=validation_examples)


def _examples(sources: Iterable[Sequence[Segment]], tokenizer: Any, max_length: int) -> list[Example]:
    start = start_tokens(tokenizer)
    return [make_example(source, tokenizer, start, max_length) for source in sources]


def _different(examples: list[Example], counts: Counter[str]) -> list[Example]:
    """Of examples that are the same tokens once they are cut the last one, the others counted."""
    different = list({tuple(example["input_ids"]): example for example in examples}.values())
    counts[SAME_START] = len(examples) - len(different)
    return different


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
    if len(examples) <= held_out:
        raise ValueError(
            f"task {name!r} has {len(examples)} different examples of at most {max_length} tokens; "
            f"{test_examples} test and {validation_examples} validation examples leave none to train on. "
            "Lower test_examples (--test-examples; 0 tests on none) or validation_examples "
            "(--validation-examples), or test on another file, test_data (--test-data FILE)."
        )
    random.Random(seed).shuffle(examples)
    return Task(name, examples[held_out:], examples[test_examples:held_out], examples[:test_examples])
