"""Examples: what is cut where and counted, made once per process and tokenizer, and their statistics."""

import copy
import json
import pickle
import random

import pytest
import tokenizers
import transformers

from ffkernels.training import examples, tasks
from ffkernels.training.examples import (
    CHARACTERS,
    MOST,
    Example,
    fingerprint,
    first_tokens,
    kept,
    make_example,
    start_tokens,
    token_statistics,
)
from ffkernels.training.tasks import load_file, load_task
from ffkernels.training.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
END = TOKENIZER.eos_token_id


class Words(ByteTokenizer):
    """A token per word with the space before it; remembers how much text it was given."""

    bos_token_id = 1

    def __init__(self):
        self.given = 0

    def encode(self, text, add_special_tokens=False):
        self.given += len(text)
        return [1] * add_special_tokens + [1000 + len(word) for word in text.split(" ") if word]


def test_an_example_is_a_dict_that_knows_whether_it_was_cut():
    whole, cut = (make_example([("abcdef", True)], TOKENIZER, [], n) for n in (7, 5))
    assert whole == {"input_ids": [*b"abcdef", END], "labels": [*b"abcdef", END]}
    assert cut == {"input_ids": [*b"abcde"], "labels": [*b"abcde"]}
    assert (whole.cut, cut.cut) == (False, True)
    for copied in (copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
        assert copied == cut and type(copied) is Example and copied.cut


def test_a_text_that_fits_without_its_end_token_is_not_cut():
    example = make_example([("abcdef", True)], TOKENIZER, [], 6)
    assert example["input_ids"] == [*b"abcdef"] and not example.cut


@pytest.mark.parametrize(
    ("whole_prompt", "ids", "cut"), [(False, b"6789abcd", True), (True, b"0123456789"[:8], True)]
)
def test_a_prompt_is_cut_at_its_start_unless_it_is_wanted_whole(whole_prompt, ids, cut):
    segments = [("0123456789", False), ("abcdefgh", True)]
    example = make_example(segments, TOKENIZER, [], 8, whole_prompt=whole_prompt)
    assert (bytes(example["input_ids"]), example.cut) == (ids, cut)
    whole = make_example(segments, TOKENIZER, [], 19, whole_prompt=True)
    assert whole["input_ids"] == [*b"0123456789abcdefgh", END] and not whole.cut
    assert whole["labels"] == [-100] * 10 + [*b"abcdefgh", END]
    # A prompt of more than half loses its start even where all would fit.
    assert make_example(segments, TOKENIZER, [], 19).cut


def test_the_start_token_stands_once_and_is_not_counted():
    tokenizer = Words()
    assert start_tokens(tokenizer) == [1] and start_tokens(TOKENIZER) == []
    example = make_example([("to be", False), (" or not", True)], tokenizer, [1], 99)
    assert example == {
        "input_ids": [1, 1002, 1002, 1002, 1003, END],
        "labels": [-100] * 3 + [1002, 1003, END],
    }


def test_an_end_token_that_the_text_brings_is_not_doubled():
    class Ending(ByteTokenizer):
        def encode(self, text, add_special_tokens=False):
            return [END if byte == ord("$") else byte for byte in text.encode()]

    for text in ("hi$", "hi$\n"):
        ids = make_example([(text, True)], Ending(), [], 99)["input_ids"]
        assert ids.count(END) == 1 and len(ids) == len(text)
    assert make_example([("$hi", True)], Ending(), [], 99)["input_ids"] == [END, *b"hi", END]


def test_long_texts_are_tokenized_as_far_as_they_are_kept():
    tokenizer, text = Words(), "word " * 10_000
    example = make_example([(text, True)], tokenizer, [], 50)
    assert example["input_ids"] == [1004] * 50 and example.cut
    assert tokenizer.given <= CHARACTERS * 51
    # Words so long that the beginning holds too few of them: then all of the text is looked at.
    tokenizer, text = Words(), ("x" * 99 + " ") * 40
    assert len(first_tokens(text, tokenizer, 20)) == 40
    assert tokenizer.given > len(text)


def test_the_first_tokens_are_those_of_the_whole_text():
    text = "fever and chills.\n\n  a b, fever  and\nchills " * 200
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=["?"])
    tokenizer.train_from_iterator([text], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    whole = fast.encode(text, add_special_tokens=False)
    for count in (1, 2, 5, 17, 64, 200):
        assert first_tokens(text, fast, count)[:count] == whole[:count]


# Made once


@pytest.fixture
def nothing_kept(monkeypatch):
    monkeypatch.setattr(examples, "_kept", {})


def counting(calls, *ids):
    def make():
        calls.append(ids)
        return [Example([*ids], [-100, *ids[1:]], cut=True)]

    return make


def test_made_once_and_handed_out_as_copies(nothing_kept):
    calls = []
    first = kept(("chat", 64), ByteTokenizer(), counting(calls, 1, 2))
    first[0]["labels"].append(9)
    first.clear()
    (again,) = kept(("chat", 64), ByteTokenizer(), counting(calls, 3, 4))
    assert again == {"input_ids": [1, 2], "labels": [-100, 2]} and again.cut and len(calls) == 1
    (other,) = kept(("chat", 65), ByteTokenizer(), counting(calls, 3, 4))
    assert other["input_ids"] == [3, 4]


def test_the_one_used_longest_ago_goes_first(nothing_kept):
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

    assert fingerprint(fast()) == fingerprint(fast())
    different = [fast(), fast(chat_template="{{ messages }}"), fast(eos_token="<pad>"), ByteTokenizer()]
    longer = fast()
    longer.add_tokens(["hello"])
    found = [fingerprint(tokenizer) for tokenizer in (*different, longer)]
    assert None not in found and len(set(found)) == 5


def test_of_an_unknown_tokenizer_nothing_is_kept(nothing_kept):
    class Own(ByteTokenizer):
        pass

    calls = []
    for _ in range(2):
        kept(("chat",), Own(), counting(calls, 1))
    assert len(calls) == 2 and not examples._kept


def test_a_task_is_tokenized_once_whatever_its_seed_and_sizes(nothing_kept, monkeypatch):
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


# Statistics


def example(length, prompt=0, cut=False):
    ids = list(range(length))
    return Example(ids, [-100] * prompt + ids[prompt:], cut)


def test_counts_and_lengths():
    some = [example(4), example(10, prompt=6), example(1), example(7, prompt=1, cut=True)]
    assert token_statistics(some) == {
        "examples": 4,
        "measured": 4,
        "tokens": 22,
        # An example's first token cannot be predicted: 3 of 4, 4, none, 6.
        "labelled_tokens": 13,
        "share_cut": 0.25,
        "length": {"min": 1, "median": 4, "p95": 10, "max": 10},
    }


def test_percentiles_are_nearest_ranks():
    length = token_statistics([example(n) for n in range(100, 0, -1)])["length"]
    assert length == {"min": 1, "median": 50, "p95": 95, "max": 100}
    assert token_statistics([example(n) for n in range(1, 22)])["length"]["p95"] == 20


def test_only_the_first_are_measured():
    found = token_statistics([example(2), example(3), example(50)], limit=2)
    assert (found["examples"], found["measured"], found["tokens"]) == (3, 2, 5)


def test_nothing_and_plain_dicts():
    assert token_statistics([])["length"] == {"min": 0, "median": 0, "p95": 0, "max": 0}
    assert token_statistics([{"input_ids": [1, 2], "labels": [1, 2]}])["share_cut"] == 0.0


def test_a_tasks_statistics(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"text": "abcdefgh"[:n]}) for n in range(1, 9)))
    found = load_file(
        path, ByteTokenizer(), max_length=5, test_examples=1, validation_examples=1
    ).statistics()
    assert {split: numbers["examples"] for split, numbers in found.items()} == {
        # Cut to 5 bytes, the texts of 6, 7 and 8 are the one of 5.
        "train": 3,
        "validation": 1,
        "test": 1,
    }
    assert sum(numbers["tokens"] for numbers in found.values()) == 2 + 3 + 4 + 5 + 5
    assert json.loads(json.dumps(found)) == found
