"""From text to an example: tokens, and labels on those that the loss counts.

A source is segments (text, counted). An example is ``{"input_ids": [...], "labels": [...]}``; labels repeat
the counted tokens and are −100 elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ffkernels.training.tokenizer import ByteTokenizer

Segment = tuple[str, bool]

IGNORED = -100

# Tokens of ordinary text are three to five characters, of byte vocabularies one: a text's first
# `CHARACTERS * n` are nearly always n tokens, and where they are not, more of the text is looked at.
CHARACTERS = 6

MOST = 3  # kept: one for each task, so that a measurement which goes through all of them finds each again

_kept: dict[Hashable, tuple[Example, ...]] = {}


class Example(dict[str, list[int]]):
    """The dict that collators take; ``cut`` says whether something of its text was left out."""

    __slots__ = ("cut",)

    def __init__(self, input_ids: list[int], labels: list[int], cut: bool = False) -> None:
        super().__init__(input_ids=input_ids, labels=labels)
        self.cut = cut


def start_tokens(tokenizer: Any) -> list[int]:
    """The start token, where the tokenizer itself puts one before a text (Llama's does, GPT-NeoX's not)."""
    start = getattr(tokenizer, "bos_token_id", None)
    return (
        [start] if start is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [start] else []
    )


def make_example(
    segments: Sequence[Segment],
    tokenizer: Any,
    start: Sequence[int],
    max_length: int,
    *,
    whole_prompt: bool = False,
) -> Example:
    """``segments`` as at most ``max_length`` tokens, behind ``start``.

    A prompt (a first segment that is not counted) keeps its end, half the room at most, so some response is
    left; with ``whole_prompt`` it is not cut, and the response gets what it leaves. An end token follows a
    counted last segment that does not bring its own.
    """
    start = list(start)
    input_ids, labels, cut = list(start), [IGNORED] * len(start), False
    for index, (text, counted) in enumerate(segments):
        room = max_length - len(input_ids)
        if index == 0 and not counted and not whole_prompt:
            tokens = tokenizer.encode(text, add_special_tokens=False)
            kept = max_length // 2 - len(start)
        else:
            tokens = first_tokens(text, tokenizer, room + 1)  # one more than fits shows that there is more
            kept = len(tokens)
        if index == 0 and start and tokens[: len(start)] == start:  # a chat template wrote it
            tokens = tokens[len(start) :]
        if len(tokens) > kept:
            tokens, cut = tokens[len(tokens) - kept :], True
        input_ids += tokens
        labels += tokens if counted else [IGNORED] * len(tokens)
        if len(input_ids) > max_length:
            return Example(input_ids[:max_length], labels[:max_length], True)
    end = tokenizer.eos_token_id
    # A chat template ends with the end token, perhaps followed by a line break.
    if segments[-1][1] and end is not None and end not in input_ids[-2:]:
        input_ids.append(end)
        labels.append(end)
    return Example(input_ids[:max_length], labels[:max_length], cut)


def first_tokens(text: str, tokenizer: Any, count: int) -> list[int]:
    """At least the first ``count`` tokens of ``text``, or all; without tokenizing the rest of a long text."""
    length = CHARACTERS * count
    while len(text) > length:
        # Tokens reach no further than to the end of a word, so those before the last space are final.
        tokens = tokenizer.encode(text[:length].rpartition(" ")[0], add_special_tokens=False)
        if len(tokens) > count:
            return tokens
        length *= 4
    return tokenizer.encode(text, add_special_tokens=False)


def collate(examples: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One right-padded batch: long tensors (examples, longest), padding masked and unlabelled."""
    if not examples:
        raise ValueError("collate needs at least one example.")
    ids, labels = ([torch.LongTensor(one[key]) for one in examples] for key in ("input_ids", "labels"))
    rows = {"input_ids": (ids, pad_token_id), "attention_mask": ([torch.ones_like(row) for row in ids], 0)}
    rows["labels"] = labels, IGNORED
    return {key: pad_sequence(of, True, padding_value=value) for key, (of, value) in rows.items()}


def kept(key: tuple[Hashable, ...], tokenizer: Any, make: Callable[[], Iterable[Example]]) -> list[Example]:
    """What ``make()`` gives, made once per ``key`` and tokenizer; copies, which a caller may change."""
    known = fingerprint(tokenizer)
    if known is None:
        return list(make())
    examples = _kept.pop((*key, known), None)
    if examples is None:
        while len(_kept) >= MOST:
            del _kept[next(iter(_kept))]  # the one whose last use is longest ago
        examples = tuple(make())
    _kept[(*key, known)] = examples
    return [Example([*one["input_ids"]], [*one["labels"]], one.cut) for one in examples]


def fingerprint(tokenizer: Any) -> Hashable | None:
    """The same for tokenizers that make the same tokens of everything; None where that cannot be told."""
    if type(tokenizer) is ByteTokenizer:
        return ByteTokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return None
    told = (backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map)
    return type(tokenizer), hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).digest()


PERCENTILES = {"min": 0, "median": 50, "p95": 95, "max": 100}


def token_statistics(examples: Sequence[dict[str, list[int]]], limit: int | None = None) -> dict[str, Any]:
    """Plain numbers on one split; ``limit``: measure so many examples at most (the first), None means all.

    ``examples``: how many there are; ``measured``: how many the other numbers are of. ``tokens`` and
    ``labelled_tokens`` are sums, the latter counting what a causal loss can: an example's first token has
    nothing before it. ``share_cut``: the fraction of examples of which something was left out. Lengths are
    in tokens; percentiles are lengths that occur (nearest rank).
    """
    measured = list(examples if limit is None else examples[:limit])
    lengths = sorted(len(example["input_ids"]) for example in measured)
    return {
        "examples": len(examples),
        "measured": len(lengths),
        "tokens": sum(lengths),
        "labelled_tokens": sum(label != IGNORED for one in measured for label in one["labels"][1:]),
        "share_cut": sum(getattr(one, "cut", False) for one in measured) / max(1, len(measured)),
        "length": {name: _percentile(lengths, percent) for name, percent in PERCENTILES.items()},
    }


def _percentile(ascending: Sequence[int], percent: int) -> int:
    """Nearest rank: the least value that at least ``percent`` % of all do not exceed."""
    if not ascending:
        return 0
    return ascending[max(0, -(-percent * len(ascending) // 100) - 1)]
