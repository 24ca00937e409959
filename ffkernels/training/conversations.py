"""Conversations as text: rendered turn by turn, with what the loss counts.

The tokenizer's own chat template is used where it has one. Else ``PLAIN`` writes a turn as ``Role: content``
on a line of its own, and ``MARKED`` as ``<|role|>``, a line break, the content and the end token, behind an
empty system turn where there is none: the format that the paper's authors give every model.

What a template writes before the first turn's content is never counted: many begin with a system prompt of
their own, the same in every conversation, and learning it by heart is no progress on the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ffkernels.training.examples import Segment

ROLES = ("system", "user", "assistant")

PLAIN, MARKED = "plain", "marked"

COUNTED = ("all", "assistant")

# Stands for a content that no template contains, shortens or takes for empty.
PROBE = "\x00content\x00"


def conversation(
    messages: Sequence[dict[str, str]],
    tokenizer: Any,
    where: str,
    *,
    counted: str = "assistant",
    fallback: str = PLAIN,
) -> tuple[Segment, ...]:
    """The segments of ``messages`` ({'role', 'content'} each): all counted, or what the assistant says.

    ``where`` says in errors which conversation it is; ``fallback`` (PLAIN or MARKED) is the format for a
    tokenizer without a chat template.
    """
    _check(messages, where, counted)
    if getattr(tokenizer, "chat_template", None) is not None:
        split = _after_preamble if counted == "all" else _templated
        return _merged(split(messages, tokenizer, where))
    marked = fallback == MARKED
    spans = _marked(messages, getattr(tokenizer, "eos_token", None)) if marked else _plain(messages)
    return _merged((text, kept or counted == "all") for text, kept in spans)


def _check(messages: Any, where: str, counted: str) -> None:
    if not isinstance(messages, list | tuple) or not messages:
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
    if counted == "assistant" and not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise ValueError(f"{where}: no turn of the assistant, so there is nothing to learn from it.")


def _plain(messages: Iterable[dict[str, str]]) -> Iterator[Segment]:
    for message in messages:
        yield f"{message['role'].capitalize()}: ", False
        yield f"{message['content']}\n", message["role"] == "assistant"


def _marked(messages: Sequence[dict[str, str]], end: str | None) -> Iterator[Segment]:
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield f"{message['content']}{end or ''}\n", message["role"] == "assistant"


def _after_preamble(
    messages: Sequence[dict[str, str]], tokenizer: Any, where: str
) -> tuple[Segment, Segment]:
    """The rendered conversation, cut where its first content begins."""
    probe = [{**messages[0], "content": PROBE}, *messages[1:]]
    preamble, found, _ = _rendered(probe, tokenizer, where).partition(PROBE)
    text = _rendered(messages, tokenizer, where)
    begin = len(preamble) if found and text.startswith(preamble) else 0
    return (text[:begin], False), (text[begin:], True)


def _templated(messages: Sequence[dict[str, str]], tokenizer: Any, where: str) -> Iterator[Segment]:
    """What each turn adds to the rendered conversation; the assistant's header belongs to the prompt."""
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:turn], tokenizer, where, header=True) if turn else done
        after = _rendered(messages[: turn + 1], tokenizer, where)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                f"{where}: the tokenizer's chat template rewrites earlier turns, so messages[{turn}] "
                "cannot be told from its prompt. Give `prompt` and `response` instead."
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after


def _rendered(messages: Sequence[dict[str, str]], tokenizer: Any, where: str, header: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=header)
    except Exception as error:  # jinja's, of templates that refuse a role or an order of roles
        raise ValueError(f"{where}: the tokenizer's chat template refuses it ({error}).") from error


def _merged(spans: Iterable[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one kind made one, so that the first segment is the whole first prompt."""
    merged: list[Segment] = []
    for text, counted in spans:
        if merged and merged[-1][1] == counted:
            merged[-1] = (merged[-1][0] + text, counted)
        elif text:
            merged.append((text, counted))
    return tuple(merged)
