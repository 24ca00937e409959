"""One record of a data file as segments (text, counted), in the forms that people's files have.

| fields | the loss counts |
|---|---|
| `messages`, or `conversations` (ShareGPT) | what the assistant says |
| `prompt` and `response` or `completion`, as text | the response |
| `prompt` and `completion`, as lists of turns (TRL) | what the assistant says in the completion |
| `instruction`, `output` and perhaps `input` (Alpaca) | the output |
| `instruction`, `response` and perhaps `context` (Dolly) | the response |
| `text` | everything |

A field that is null is not there. Of a record with several of these forms the first of the table is read.
`tools` (a list, or JSON in a string) and `system` beside a conversation go to its chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ffkernels.training.conversations import conversation
from ffkernels.training.examples import Segment
from ffkernels.training.turns import NothingToLearn, turns

__all__ = ["ALLOWED", "forms_of", "segments_of"]

ALLOWED = (
    "`text`; or `prompt` and `response` or `completion`; or `messages`, or `conversations`; or `instruction` "
    "and `output` or `response`"
)

Record = Mapping[str, Any]
Segments = tuple[Segment, ...]

# Stanford Alpaca's prompts, which Dolly's records are trained with as well.
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{}\n\n{}### Response:\n"
)
PAIRED = ", paired with an input that provides further context"


def forms_of(record: Record) -> list[tuple[str, ...]]:
    """The forms that the record has, by their fields; the first is the one that is read."""
    return [fields for fields in FORMS if all(record.get(field) is not None for field in fields)]


def segments_of(record: Any, tokenizer: Any, where: str) -> Segments:
    """The segments of a record; ``where`` says in errors which it is.

    Raises:
        ValueError: when it has none of the forms, or a field is of the wrong kind.
        NothingToLearn: when what the loss would count is empty or white space.
    """
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a JSON {type(record).__name__}; each line must be an object with {ALLOWED}."
        )
    forms = forms_of(record)
    if not forms:
        null = [key for key in record if record[key] is None]
        also = f", of which {', '.join(null)} are null" if null else ""
        raise ValueError(f"{where}: has the keys {sorted(record)}{also}; needed are {ALLOWED}.")
    segments = FORMS[forms[0]](record, forms[0], tokenizer, where)
    try:
        for text, _ in segments:
            text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {error.object[error.start]!r} is half of a character (a lone surrogate), of which no "
            "text can be made."
        ) from error
    return segments


def _conversation(record: Record, fields: tuple[str, ...], tokenizer: Any, where: str) -> Segments:
    return _told(turns(record[fields[0]], where, fields[0]), record, tokenizer, where)


def _pair(record: Record, fields: tuple[str, ...], tokenizer: Any, where: str) -> Segments:
    prompt, response = (record[field] for field in fields)
    if isinstance(prompt, list) and isinstance(response, list):
        context = [{**turn, "weight": 0} for turn in turns(prompt, where, fields[0])] if prompt else []
        return _told([*context, *turns(response, where, fields[1])], record, tokenizer, where)
    prompt, response = (_string(record, field, where) for field in fields)
    return (prompt, False), (_filled(response, fields[1], where), True)


def _told(messages: list[dict[str, Any]], record: Record, tokenizer: Any, where: str) -> Segments:
    system = record.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return conversation(messages, tokenizer, where, tools=_tools(record, where))


def _instruction(record: Record, fields: tuple[str, ...], tokenizer: Any, where: str) -> Segments:
    more = "input" if fields[1] == "output" else "context"
    instruction, response = (_string(record, field, where) for field in fields)
    context = _string(record, more, where) if record.get(more) is not None else ""
    shown = (PAIRED, instruction, f"### Input:\n{context}\n\n") if context.strip() else ("", instruction, "")
    return (ALPACA.format(*shown), False), (_filled(response, fields[1], where), True)


def _text(record: Record, fields: tuple[str, ...], tokenizer: Any, where: str) -> Segments:
    return ((_filled(_string(record, "text", where), "text", where), True),)


FORMS: dict[tuple[str, ...], Callable[[Record, tuple[str, ...], Any, str], Segments]] = {
    ("messages",): _conversation,
    ("conversations",): _conversation,
    ("prompt", "response"): _pair,
    ("prompt", "completion"): _pair,
    ("instruction", "output"): _instruction,
    ("instruction", "response"): _instruction,
    ("text",): _text,
}


def _tools(record: Record, where: str) -> list[Any] | None:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"{where}: 'tools' is not JSON ({error}).") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: 'tools' must be a list, not {type(tools).__name__}.")
    return tools


def _string(record: Record, key: str, where: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} must be a string, not {type(record[key]).__name__}.")
    return record[key]


def _filled(text: str, key: str, where: str) -> str:
    if not text.strip():
        raise NothingToLearn(
            f"{where}: {key!r} is empty or white space, so there is nothing to learn from it."
        )
    return text
