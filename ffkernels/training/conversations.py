"""Conversations: turns in the forms that files have, as text with what the loss counts.

The tokenizer's own chat template is used where it has one. Else ``PLAIN`` writes a turn as ``Role: content``
on a line of its own, and ``MARKED`` as ``<|role|>``, a line break, the content and the end token, behind an
empty system turn where there is none: the format that the paper's authors give every model.

What a template writes before the first turn's content is never counted: many begin with a system prompt of
their own, the same in every conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ffkernels.training.examples import Segment

PLAIN, MARKED = "plain", "marked"

# Stands for a content that no template contains, shortens or takes for empty.
PROBE = "\x00content\x00"

ROLES = ("system", "user", "assistant", "tool")

ALIASES = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool"),
}


class NothingToLearn(ValueError):
    """A line is in order, but what the loss would count of it is empty or white space."""


def conversation(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    where: str,
    *,
    counted: str = "assistant",
    fallback: str = PLAIN,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Segment, ...]:
    """The segments of ``messages``, in any form of ``turns``: all counted, or what the assistant says.

    ``where`` says in errors which conversation it is; ``fallback`` (PLAIN or MARKED) is the format for a
    tokenizer without a chat template. A template is told of ``tools``, as functions' JSON schemas.

    Raises:
        ValueError: when it is not a conversation, or the template refuses it.
        NothingToLearn: when all that the assistant says is white space.
    """
    messages = turns(messages, where)
    if counted == "assistant":
        _check(messages, where)
    if getattr(tokenizer, "chat_template", None) is not None:
        template = _Template(tokenizer, where, tools)
        return _merged((_after_preamble if counted == "all" else _templated)(messages, template))
    marked = fallback == MARKED
    spans = _marked(messages, getattr(tokenizer, "eos_token", None)) if marked else _plain(messages)
    return _merged((text, kept or counted == "all") for text, kept in spans)


def _check(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    spoken = [m for m in messages if is_counted(m)]
    if not spoken:
        raise ValueError(f"{where}: no turn of the assistant, so there is nothing to learn from it.")
    if not any(_said(m).strip() for m in spoken):
        raise NothingToLearn(f"{where}: the assistant says nothing, so there is nothing to learn from it.")


def _said(message: Mapping[str, Any]) -> str:
    """What a turn says where no template writes its tool calls: them as JSON, a line each."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def _plain(messages: Iterable[Mapping[str, Any]]) -> Iterator[Segment]:
    for message in messages:
        yield f"{message['role'].capitalize()}: ", False
        yield f"{_said(message)}\n", is_counted(message)


def _marked(messages: Sequence[Mapping[str, Any]], end: str | None) -> Iterator[Segment]:
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield f"{_said(message)}{end or ''}\n", is_counted(message)


class _Template:
    """The tokenizer's chat template; what it raises is told with the line."""

    def __init__(self, tokenizer: Any, where: str, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._tokenizer, self.where = tokenizer, where
        self._tools = {"tools": list(tools)} if tools else {}

    def __call__(self, messages: Sequence[Mapping[str, Any]], header: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=header, **self._tools
            )
        except Exception as error:  # jinja's, of templates that refuse a role or an order of roles
            raise ValueError(f"{self.where}: the tokenizer's chat template refuses it ({error}).") from error


def _after_preamble(messages: Sequence[Mapping[str, Any]], template: _Template) -> tuple[Segment, Segment]:
    """The rendered conversation, cut where its first content begins."""
    probe = [{**messages[0], "content": PROBE}, *messages[1:]]
    preamble, found, _ = template(probe).partition(PROBE)
    text = template(messages)
    begin = len(preamble) if found and text.startswith(preamble) else 0
    return (text[:begin], False), (text[begin:], True)


def _templated(messages: Sequence[Mapping[str, Any]], template: _Template) -> Iterator[Segment]:
    """What each turn adds to the rendered conversation; the assistant's header belongs to the prompt."""
    done = ""
    for turn, message in enumerate(messages):
        if not is_counted(message):
            continue
        before = template(messages[:turn], header=True) if turn else done
        after = template(messages[: turn + 1])
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                f"{template.where}: the tokenizer's chat template rewrites earlier turns, so "
                f"messages[{turn}] cannot be told from its prompt. Give `prompt` and `response` instead."
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after


def _merged(spans: Iterable[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one kind made one, so that the first segment is the whole first prompt."""
    merged: list[Segment] = []
    for text, counted in spans:
        if merged and merged[-1][1] == counted:
            merged[-1] = (merged[-1][0] + text, counted)
        elif text:
            merged.append((text, counted))
    return tuple(merged)


def turns(messages: Any, where: str, field: str = "messages") -> list[dict[str, Any]]:
    """``messages`` as turns with a `role` of ``ROLES`` and a `content` that is one string.

    Other fields of a turn, such as `tool_calls` and `name`, stay, for the chat template. ``field`` is where
    they stand in the file, for errors.

    Raises:
        ValueError: beginning with ``where``, when it is not a conversation of text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{where}: {field!r} must be a list of at least one {{'role', 'content'}}.")
    return [_turn(message, f"{where}: {field}[{number}]") for number, message in enumerate(messages)]


def is_counted(turn: Mapping[str, Any]) -> bool:
    """Whether the loss counts this turn where it counts what the assistant says."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def _turn(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object with 'role' and 'content'.")
    turn = {key: value for key, value in message.items() if value is not None}
    for key, other in (("role", "from"), ("content", "value")):
        if key not in turn and other in turn:
            turn[key] = turn.pop(other)
    if "tool_calls" in turn:
        calls = turn["tool_calls"]
        turn["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
        turn.setdefault("content", "")
    if isinstance(turn.get("content"), list):
        turn["content"] = _text(turn["content"], where)
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            raise ValueError(f"{where} needs a string {key!r}; it has {sorted(message)}.")
    turn["role"] = ALIASES.get(turn["role"], turn["role"])
    if turn["role"] not in ROLES:
        raise ValueError(
            f"{where} has the role {turn['role']!r}; allowed are {', '.join((*ROLES, *ALIASES))}."
        )
    return turn


def _text(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where} has a part of type {kind!r}; only parts of text can be read here.")
        texts.append(text)
    return "\n".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError(f"{where}: each of 'tool_calls' must be {{'function': {{'name', 'arguments'}}}}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            pass  # a template can show any text
    return {**call, "function": {**function, "arguments": arguments}}
