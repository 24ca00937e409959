"""Conversations in each format, with the loss on everything or on the assistant."""

from __future__ import annotations

import pytest

from ffkernels.training.conversations import MARKED, PLAIN, conversation
from ffkernels.training.tokenizer import ByteTokenizer

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "Be brief."}


class Named(ByteTokenizer):
    eos_token = "</s>"


class Templated(ByteTokenizer):
    chat_template = "given"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert tokenize is False
        return "".join(f"<{m['role'][0]}>{m['content']}</>" for m in messages) + "<a>" * add_generation_prompt


def test_the_plain_format():
    assert conversation([SYSTEM, USER, ASSISTANT], ByteTokenizer(), "x") == (
        ("System: Be brief.\nUser: hi\nAssistant: ", False),
        ("ho\n", True),
    )
    assert conversation([USER, ASSISTANT, USER], ByteTokenizer(), "x", counted="all") == (
        ("User: hi\nAssistant: ho\nUser: hi\n", True),
    )


def test_the_marked_format_begins_with_a_system_turn_and_ends_every_turn():
    options = {"fallback": MARKED}
    assert conversation([USER, ASSISTANT], Named(), "x", counted="all", **options) == (
        ("<|system|>\n</s>\n<|user|>\nhi</s>\n<|assistant|>\nho</s>\n", True),
    )
    assert conversation([SYSTEM, USER, ASSISTANT], Named(), "x", **options) == (
        ("<|system|>\nBe brief.</s>\n<|user|>\nhi</s>\n<|assistant|>\n", False),
        ("ho</s>\n", True),
    )


@pytest.mark.parametrize("fallback", [PLAIN, MARKED])
def test_the_tokenizers_own_template_goes_before_both(fallback):
    whole = conversation([USER, ASSISTANT] * 2, Templated(), "x", counted="all", fallback=fallback)
    assert whole == (("<u>", False), ("hi</><a>ho</><u>hi</><a>ho</>", True))
    assert conversation([USER, ASSISTANT], Templated(), "x", fallback=fallback) == (
        ("<u>hi</><a>", False),
        ("ho</>", True),
    )


@pytest.mark.parametrize("first", [USER, {**USER, "content": " s\n"}, {**USER, "content": "Be nice."}])
def test_a_system_prompt_that_the_template_writes_itself_is_not_counted(first):
    class Prompted(Templated):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            trimmed = [{**message, "content": message["content"].strip()} for message in messages]
            return "<s>Be nice.</>" + super().apply_chat_template(trimmed, tokenize, add_generation_prompt)

    whole = conversation([first, ASSISTANT], Prompted(), "x", counted="all")
    assert whole == (("<s>Be nice.</><u>", False), (f"{first['content'].strip()}</><a>ho</>", True))
    assert conversation([first, ASSISTANT], Prompted(), "x")[1] == ("ho</>", True)


def test_a_conversation_without_the_assistant_counts_only_where_all_does():
    assert conversation([USER], ByteTokenizer(), "x", counted="all") == (("User: hi\n", True),)
    with pytest.raises(ValueError, match="row 7: no turn of the assistant"):
        conversation([USER], ByteTokenizer(), "row 7")


def test_a_template_may_rewrite_earlier_turns_where_all_counts():
    class Forgetful(Templated):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return super().apply_chat_template(messages[-1:], tokenize, add_generation_prompt)

    assert conversation([USER, ASSISTANT], Forgetful(), "x", counted="all") == (("<a>ho</>", True),)
    with pytest.raises(ValueError, match=r"x: .*rewrites earlier turns, so messages\[1\]"):
        conversation([USER, ASSISTANT], Forgetful(), "x")
