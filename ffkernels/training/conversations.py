"""Conversations as text: rendered turn by turn, with what the loss counts.

The tokenizer's own chat template is used where it has one. Else ``PLAIN`` writes a turn as ``Role: content``
on a line of its own, and ``MARKED`` as ``<|role|>``, a line break, the content and the end token, behind an
empty system turn where there is none: the format that the paper's authors give every model.

What a template writes before the first turn's content is never counted: many begin with a system prompt of
their own, the same in every conversation, and learning it by heart is no progress on the task.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ffkernels.training.examples import Segment
from ffkernels.training.turns import NothingToLearn, is_counted, turns

PLAIN, MARKED = "plain", "marked"

COUNTED = ("all", "assistant")

# Stands for a content that no template contains, shortens or takes for empty.
PROBE = "\x00content\x00"


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
