"""A conversation's turns in the one form that chat templates take, made of the forms that files have.

A turn has `role` and `content`, or ShareGPT's `from` and `value`; OpenAI's and ShareGPT's names of roles are
put down to system, user, assistant and tool. The text parts of a content become one text. What datasets fill
up with null is left out, and arguments of tool calls that are JSON in a string become objects, as templates
expect them. A turn of the assistant with `weight` 0 is context that the loss does not count (OpenAI's files).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["ROLES", "NothingToLearn", "is_counted", "turns"]

ROLES = ("system", "user", "assistant", "tool")

ALIASES = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model", "function_call"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool"),
}


class NothingToLearn(ValueError):
    """A line is in order, but what the loss would count of it is empty or white space."""


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
