"""Examples: what is cut where, what is counted, and that long texts are not tokenized to their end."""

from __future__ import annotations

import copy
import pickle

import pytest

from ffkernels.training.examples import CHARACTERS, Example, first_tokens, make_example, start_tokens
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
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    text = "fever and chills.\n\n  a b, fever  and\nchills " * 200
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=["?"])
    tokenizer.train_from_iterator([text], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    whole = fast.encode(text, add_special_tokens=False)
    for count in (1, 2, 5, 17, 64, 200):
        assert first_tokens(text, fast, count)[:count] == whole[:count]
