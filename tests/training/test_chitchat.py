"""Two people's lines become turns of user and assistant, and the task made of them keeps its splits apart."""

from __future__ import annotations

import json
import sys

import pytest

from ffkernels.training import offline as chitchat
from ffkernels.training.tasks import load_task
from ffkernels.training.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def packaged(tmp_path, monkeypatch, records):
    """What ``conversations`` makes of a package that holds ``records``."""
    folder = tmp_path / "chitchat_dataset"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "dataset.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "chitchat_dataset", raising=False)
    try:
        return chitchat.conversations.__wrapped__()
    finally:
        sys.modules.pop("chitchat_dataset", None)


def said(sender, *texts):
    return [{"sender": sender, "text": text, "timestamp": "2018-04-20T01:57:41"} for text in texts]


def test_lines_of_one_speaker_are_one_turn(tmp_path, monkeypatch):
    records = {
        "1": {"messages": [said("a", "Hi", " there "), said("b", "Hé  you"), said("a", "ok")]},
        "alone": {"messages": [said("a", "Hello?"), said("a", "Anybody?")]},
        "2": {"messages": [said("x", "One"), said("x", "Two"), said("y", "", "Three\nFour")]},
        "unheard": {"messages": [said("x", "One"), said("y", " ")]},
        "interrupted": {"messages": [said("x", "One"), said("y", ""), said("x", "Two"), said("y", "3")]},
    }
    assert packaged(tmp_path, monkeypatch, records) == (
        (("user", "Hi there"), ("assistant", "Hé you"), ("user", "ok")),
        (("user", "One Two"), ("assistant", "Three Four")),
        (("user", "One Two"), ("assistant", "3")),
    )


def test_the_packages_conversations_alternate():
    talks = chitchat.conversations()
    assert len(talks) > 4000
    for talk in talks:
        assert len(talk) >= 2
        assert [role for role, _ in talk] == (["user", "assistant"] * len(talk))[: len(talk)]
        assert all(content and content == content.strip() for _, content in talk)


def test_the_task_is_split_as_in_the_paper_and_counts_everything():
    task = load_task("chat", TOKENIZER)
    assert (len(task.test), len(task.validation)) == (1000, 32)
    assert len(task.train) > 2900
    examples = [*task.train, *task.validation, *task.test]
    assert len({tuple(example["input_ids"]) for example in examples}) == len(examples)
    assert all(example["labels"] == example["input_ids"] for example in examples)
    assert all(TOKENIZER.decode(example["input_ids"]).startswith("User: ") for example in examples)
    assert load_task("chat", TOKENIZER) == task
    assert load_task("chat", TOKENIZER, seed=1).test != task.test


def test_the_loss_may_count_the_assistant_only():
    whole, part = (load_task("chat", TOKENIZER, max_length=256, chat_loss=c) for c in ("all", "assistant"))
    shorter = 0
    for one, other in zip(whole.test, part.test, strict=True):
        counted = [label for label in other["labels"] if label != -100]
        assert 0 < len(counted) < len(one["input_ids"])
        shorter += one["input_ids"] != other["input_ids"]  # a long first turn keeps its end: a prompt's rule
    assert shorter < 0.2 * len(whole.test)
    example = min(part.test, key=lambda e: len(e["input_ids"]))
    text = TOKENIZER.decode([label for label in example["labels"] if label != -100])
    assert f"Assistant: {text}" in TOKENIZER.decode(example["input_ids"])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "chitchat_dataset", None)
    monkeypatch.setattr("ffkernels.training.examples._kept", {})
    monkeypatch.setattr("ffkernels.training.tasks.conversations", chitchat.conversations.__wrapped__)
    message = r"task 'chat' needs chitchat_dataset: pip install 'ffkernels\[tasks\]'"
    with pytest.raises(RuntimeError, match=message):
        load_task("chat", TOKENIZER)
