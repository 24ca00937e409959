"""One's own data: JSON lines with `text`, or `prompt` and `response`, or `messages`.

A line becomes segments (text, counted): the loss counts a `text` whole, of a pair only the `response`, of a
conversation only what the assistant says. Conversations use the tokenizer's chat template where it has one;
else every turn is ``Role: content`` on a line of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Segment = tuple[str, bool]

ROLES = ("system", "user", "assistant")
ALLOWED = "`text`, or `prompt` and `response`, or `messages`"


def read_lines(path: Path, tokenizer: Any) -> Iterator[tuple[Segment, ...]]:
    """The segments of each line; empty lines are passed over, a bad one is a ValueError that says where."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a JSONL file whose lines have {ALLOWED}.")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error}).") from error
            if line.strip():
                yield tuple(_segments(line, where, tokenizer))


def _segments(line: str, where: str, tokenizer: Any) -> list[Segment]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a JSON {type(record).__name__}; each line must be an object with {ALLOWED}."
        )
    if "messages" in record:
        return _conversation(record["messages"], where, tokenizer)
    if "prompt" in record or "response" in record:
        prompt, response = (_string(record, key, where) for key in ("prompt", "response"))
        return [(prompt, False), (_filled(response, "response", where), True)]
    if "text" in record:
        return [(_filled(_string(record, "text", where), "text", where), True)]
    raise ValueError(f"{where}: has the keys {sorted(record)}; needed are {ALLOWED}.")


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise ValueError(
            f"{where}: the key {key!r} is missing; it has {sorted(record)}, needed are {ALLOWED}."
        )
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} must be a string, not {type(record[key]).__name__}.")
    return record[key]


def _filled(text: str, key: str, where: str) -> str:
    if not text:
        raise ValueError(f"{where}: {key!r} is empty, so there is nothing to learn from it.")
    return text


def _conversation(messages: Any, where: str, tokenizer: Any) -> list[Segment]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list of at least one {{'role', 'content'}}.")
    for turn, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: messages[{turn}] must be an object with 'role' and 'content'.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(
                    f"{where}: messages[{turn}] needs a string {key!r}; it has {sorted(message)}."
                )
        if message["role"] not in ROLES:
            raise ValueError(
                f"{where}: messages[{turn}] has the role {message['role']!r}; allowed are {', '.join(ROLES)}."
            )
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise ValueError(f"{where}: no turn of the assistant, so there is nothing to learn from it.")
    templated = getattr(tokenizer, "chat_template", None) is not None
    spans = _templated(messages, where, tokenizer) if templated else _plain(messages)
    return _merged(spans)


def _plain(messages: list[dict[str, str]]) -> Iterator[Segment]:
    for message in messages:
        yield f"{message['role'].capitalize()}: ", False
        yield f"{message['content']}\n", message["role"] == "assistant"


def _templated(messages: list[dict[str, str]], where: str, tokenizer: Any) -> Iterator[Segment]:
    """What each turn adds to the rendered conversation; the assistant's header belongs to the prompt."""

    def render(count: int, header: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=header
            )
        except Exception as error:  # jinja's, of templates that refuse a role or an order of roles
            raise ValueError(f"{where}: the tokenizer's chat template refuses it ({error}).") from error

    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(turn, header=True) if turn else done, render(turn + 1)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                f"{where}: the tokenizer's chat template rewrites earlier turns, so messages[{turn}] "
                "cannot be told from its prompt. Give `prompt` and `response` instead."
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after


def _merged(spans: Iterator[Segment]) -> list[Segment]:
    """Neighbours of one kind made one, so that the first segment is the whole first prompt."""
    merged: list[Segment] = []
    for text, counted in spans:
        if merged and merged[-1][1] == counted:
            merged[-1] = (merged[-1][0] + text, counted)
        elif text:
            merged.append((text, counted))
    return merged
