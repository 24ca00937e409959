"""The paper's data sets, from the Hugging Face hub by way of `datasets`, tokenized when they are asked for.

`datasets` maps a data set from its cache, so neither a start nor memory grows with it: only the held-out
examples are tokenized at the start, the others one by one as they are trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ffkernels.ops.notices import announce_once
from ffkernels.training.conversations import MARKED, conversation
from ffkernels.training.examples import IGNORED, Example, Segment, make_example, start_tokens
from ffkernels.training.requirements import first_line, require_for_task

# The format of the paper's instruction task: the Alpaca preamble, and keys that mark the parts.
PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
INSTRUCTION, RESPONSE, END = "### Instruction:", "### Response:", "### End"


@dataclass(frozen=True)
class HubSource:
    """Where a task's rows are, and what of a row is learned.

    ``drop_long``: examples longer than the limit are left out, as the paper's authors do, instead of cut.
    """

    repository: str
    columns: tuple[str, ...]
    segments: Callable[[dict[str, Any], Any, str, str], tuple[Segment, ...]]
    train: str = "train"
    held_out: str = "train"
    drop_long: bool = False


def _guideline(row: dict[str, Any], *_: Any) -> tuple[Segment, ...]:
    return ((row["clean_text"] or "", True),)


def _instruction(row: dict[str, Any], *_: Any) -> tuple[Segment, ...]:
    prompt = f"{PREAMBLE}\n\n{INSTRUCTION}\n{row['instruction']}\n\n{RESPONSE}\n"
    return (prompt, False), (f"{row['response']}\n\n{END}", True)


def _chat(row: dict[str, Any], tokenizer: Any, where: str, chat_loss: str) -> tuple[Segment, ...]:
    return conversation(row["messages"], tokenizer, where, counted=chat_loss, fallback=MARKED)


HUB = {
    "medical": HubSource("epfl-llm/guidelines", ("clean_text",), _guideline),
    "instruction": HubSource(
        "ise-uiuc/Magicoder-Evol-Instruct-110K", ("instruction", "response"), _instruction, drop_long=True
    ),
    "chat": HubSource(
        "HuggingFaceH4/ultrachat_200k", ("messages",), _chat, train="train_sft", held_out="test_sft"
    ),
}


class HubExamples(Sequence[Example]):
    """Rows of a data set in a shuffled order, each made an example when it is asked for.

    A row that makes none (nothing to learn from, refused by the chat template, too long for a source that
    drops such, or a repetition of a held-out example) is replaced by the next that does, so an index always
    gives the same example and the length is known beforehand.
    """

    def __init__(self, order: Sequence[int], make: Callable[[int], Example | None]) -> None:
        self._order, self._make = order, make

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        for row in (self._order[(position + ahead) % len(self)] for ahead in range(len(self))):
            if (example := self._make(row)) is not None:
                return example
        raise ValueError("no row of this data set makes an example; raise max_length.")


def load_splits(
    task: str,
    tokenizer: Any,
    *,
    max_length: int,
    seed: int,
    test_examples: int,
    validation_examples: int,
    chat_loss: str,
) -> tuple[HubExamples, list[Example], list[Example]]:
    """(train, validation, test) of ``task``.

    Raises RuntimeError where `datasets` is missing or the data set cannot be had, ValueError where too few
    examples fit.
    """
    source = HUB[task]
    held_rows = _rows(task, source, source.held_out)
    shared = source.train == source.held_out
    train_rows = held_rows if shared else _rows(task, source, source.train)

    refused = ""

    def example(rows: Any, split: str, row: int) -> Example | None:
        where = f"{source.repository}, {split}, row {row}"
        try:
            segments = source.segments(rows[row], tokenizer, where, chat_loss)
        except ValueError as error:  # of a conversation: one odd row must not end a run of hours
            nonlocal refused
            refused = f" Of those left out, one for this reason: {error}"
            announce_once(f"hub row of {source.repository}", f"{error} Such rows are passed over.")
            return None
        if not any(counted and text.strip() for text, counted in segments):
            return None
        made = make_example(segments, tokenizer, start, max_length, whole_prompt=source.drop_long)
        if made.cut and source.drop_long:
            return None
        return made if any(label != IGNORED for label in made["labels"][1:]) else None

    start = start_tokens(tokenizer)
    order, needed = _shuffled(len(held_rows), seed), test_examples + validation_examples
    held_out: dict[tuple[int, ...], Example] = {}
    taken = 0
    while len(held_out) < needed and taken < len(order):
        if (made := example(held_rows, source.held_out, order[taken])) is not None:
            held_out.setdefault(tuple(made["input_ids"]), made)
        taken += 1
    rest = order[taken:] if shared else _shuffled(len(train_rows), seed)
    if len(held_out) < needed or not rest:
        longer = " Longer ones are left out here, as the authors do: raise max_length (--max-length)."
        raise ValueError(
            f"{source.repository} has {len(held_out)} different examples that fit, of {len(held_rows)}; "
            f"{test_examples} test and {validation_examples} validation examples leave none to train on. "
            "Lower test_examples (--test-examples) or validation_examples (--validation-examples)."
            f"{longer * source.drop_long}{refused}"
        )

    def train_example(row: int) -> Example | None:
        made = example(train_rows, source.train, row)
        return None if made is None or tuple(made["input_ids"]) in held_out else made

    examples = list(held_out.values())
    return HubExamples(rest, train_example), examples[test_examples:], examples[:test_examples]


def _rows(task: str, source: HubSource, split: str) -> Any:
    datasets = require_for_task(task, "datasets")
    try:
        rows = datasets.load_dataset(source.repository, split=split)
    except Exception as error:  # datasets, the hub's client and its HTTP library raise what they like
        raise RuntimeError(
            f"task {task!r} from the hub is the data set {source.repository}, and neither the hub nor the "
            f"local cache of `datasets` gave its split {split!r} ({first_line(error)}). With a network: "
            "unset HF_HUB_OFFLINE, and `hf auth login` where the hub asks for it. Without one: copy the "
            "cache (HF_HOME) of a machine that has loaded it, or take --source offline, or give a JSONL file "
            "of your own (--data FILE.jsonl)."
        ) from error
    missing = [column for column in source.columns if column not in rows.column_names]
    if missing:
        raise RuntimeError(
            f"{source.repository}, {split}: has no column {', '.join(map(repr, missing))}, only "
            f"{sorted(rows.column_names)}; the data set has changed since this was written. "
            "Save it as JSONL and give that: --data FILE.jsonl."
        )
    return rows.select_columns(list(source.columns))


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
