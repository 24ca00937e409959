"""Token counts, by hand."""

from __future__ import annotations

import json

from ffkernels.training.examples import Example, token_statistics
from ffkernels.training.tasks import load_file
from ffkernels.training.tokenizer import ByteTokenizer


def example(length, prompt=0, cut=False):
    ids = list(range(length))
    return Example(ids, [-100] * prompt + ids[prompt:], cut)


def test_counts_and_lengths():
    examples = [example(4), example(10, prompt=6), example(1), example(7, prompt=1, cut=True)]
    assert token_statistics(examples) == {
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
