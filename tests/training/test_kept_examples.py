"""Examples are made once per process and tokenizer, and nobody's changes reach another's."""

from __future__ import annotations

import random

import pytest

from ffkernels.training import examples, tasks
from ffkernels.training.examples import MOST, Example, fingerprint, kept
from ffkernels.training.tasks import load_task
from ffkernels.training.tokenizer import ByteTokenizer


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(examples, "_kept", {})


def counting(calls, *ids):
    def make():
        calls.append(ids)
        return [Example([*ids], [-100, *ids[1:]], cut=True)]

    return make


def test_made_once_and_handed_out_as_copies():
    calls = []
    first = kept(("chat", 64), ByteTokenizer(), counting(calls, 1, 2))
    first[0]["labels"].append(9)
    first.clear()
    (again,) = kept(("chat", 64), ByteTokenizer(), counting(calls, 3, 4))
    assert again == {"input_ids": [1, 2], "labels": [-100, 2]} and again.cut and len(calls) == 1
    (other,) = kept(("chat", 65), ByteTokenizer(), counting(calls, 3, 4))
    assert other["input_ids"] == [3, 4]


def test_the_one_used_longest_ago_goes_first():
    calls = []
    for number in [*range(MOST), 0, MOST, 0, 1]:
        kept((number,), ByteTokenizer(), counting(calls, number))
    assert [ids[0] for ids in calls] == [*range(MOST), MOST, 1]
    assert len(examples._kept) == MOST


def test_what_a_tokenizer_does_is_compared_not_which_it_is():
    def fast(**changes):
        tokenizer = ByteTokenizer().for_transformers()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        return tokenizer

    pytest.importorskip("transformers")
    assert fingerprint(fast()) == fingerprint(fast())
    different = [fast(), fast(chat_template="{{ messages }}"), fast(eos_token="<pad>"), ByteTokenizer()]
    longer = fast()
    longer.add_tokens(["hello"])
    found = [fingerprint(tokenizer) for tokenizer in (*different, longer)]
    assert None not in found and len(set(found)) == 5


def test_of_an_unknown_tokenizer_nothing_is_kept():
    class Own(ByteTokenizer):
        pass

    calls = []
    for _ in range(2):
        kept(("chat",), Own(), counting(calls, 1))
    assert len(calls) == 2 and not examples._kept


def test_a_task_is_tokenized_once_whatever_its_seed_and_sizes(monkeypatch):
    made, real = [], tasks.make_example

    def make(*args, **options):
        made.append(args)
        return real(*args, **options)

    monkeypatch.setattr(tasks, "make_example", make)
    first = load_task("instruction", ByteTokenizer(), seed=1, test_examples=40)
    count = len(made)
    other = load_task("instruction", ByteTokenizer(), seed=2, test_examples=10)
    assert len(made) == count > 1000
    random.Random(0).shuffle(first.test)
    first.train[0]["input_ids"].clear()
    again = load_task("instruction", ByteTokenizer(), seed=2, test_examples=10)
    assert again == other and len(made) == count
    assert len(load_task("instruction", ByteTokenizer(), max_length=32).train) and len(made) > count
