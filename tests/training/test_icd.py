"""Passages read as the tabular list has them, and the task made of them keeps its splits apart."""

from __future__ import annotations

import re
import sys

import pytest

from ffkernels.training import offline as icd
from ffkernels.training.tasks import load_task
from ffkernels.training.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def passage(title):
    (found,) = [text for text in icd.passages() if text.startswith(f"{title} (")]
    return found.split("\n")


def test_a_passage_says_what_the_entry_says():
    title, includes, elsewhere, further, kinds = passage("Type 2 diabetes mellitus")
    assert title == "Type 2 diabetes mellitus (E11)"
    assert includes == (
        "Includes: diabetes (mellitus) due to insulin secretory defect; diabetes NOS; "
        "insulin resistant diabetes (mellitus)."
    )
    assert elsewhere.startswith("Coded elsewhere: ") and "gestational diabetes (O24.4-);" in elsewhere
    assert further.startswith("Use additional code: to identify control using: ")
    assert "insulin (Z79.4); oral antidiabetic drugs (Z79.84)" in further
    assert kinds.startswith("Kinds: Type 2 diabetes mellitus with hyperosmolarity; ")


def test_a_diagnosis_without_kinds_has_no_such_line():
    assert passage("Rectal abscess") == [
        "Rectal abscess (K61.1)",
        "Includes: Perirectal abscess.",
        "Coded elsewhere: ischiorectal abscess (K61.39).",
    ]


def test_passages_are_texts_and_none_is_there_twice():
    passages = icd.passages()
    assert len(passages) > 9000
    titles = [text.split("\n")[0].rpartition(" (")[0].lower() for text in passages]
    assert len(set(titles)) == len(titles)
    assert not any("encounter" in title for title in titles[:2000])
    for text in passages:
        first, *notes = text.split("\n")
        assert re.fullmatch(r".+ \([A-Z][0-9A-Z]{2}(\.[0-9A-Z]{1,4})?\)", first), first
        assert notes and all(re.fullmatch(r"[A-Z][a-z ]+: \S.*\.", note) for note in notes), text
        assert "  " not in text and ": ," not in text and ":;" not in text


def test_the_task_is_split_as_in_the_paper_and_counts_everything():
    task = load_task("medical", TOKENIZER, max_length=64)
    assert (len(task.test), len(task.validation)) == (1000, 32)
    assert len(task.train) > 8000
    examples = [*task.train, *task.validation, *task.test]
    assert len({tuple(example["input_ids"]) for example in examples}) == len(examples)
    assert all(example["labels"] == example["input_ids"] for example in examples)
    texts = {passage.encode()[:64] for passage in icd.passages()}
    assert all(bytes(token for token in e["input_ids"] if token < 256) in texts for e in examples)
    assert load_task("medical", TOKENIZER) == task
    assert load_task("medical", TOKENIZER, seed=1).test != task.test


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    kept = icd.passages
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    monkeypatch.setattr("ffkernels.training.examples._kept", {})
    monkeypatch.setattr("ffkernels.training.tasks.passages", kept.__wrapped__)
    message = r"task 'medical' needs simple_icd_10_cm: pip install 'ffkernels\[tasks\]'"
    with pytest.raises(RuntimeError, match=message):
        load_task("medical", TOKENIZER)
