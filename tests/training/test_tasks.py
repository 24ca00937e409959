"""Labels stand exactly on the response, splits share nothing, and the same call gives the same task."""

import bz2
import gzip
import json
import lzma

import pytest
import torch

from ffkernels.training import tasks
from ffkernels.training.tasks import collate, load_file, load_task
from ffkernels.training.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
END = TOKENIZER.eos_token_id


def lines(tmp_path, *records):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), "utf-8")
    return path


def read(path, **options):
    """All examples of a file in the file's own order, as far as it can be told: sorted."""
    task = load_file(path, TOKENIZER, **{"test_examples": 1, "validation_examples": 1, **options})
    return sorted(task.test + task.validation + task.train, key=lambda example: example["input_ids"])


def test_what_is_left_out_of_a_task_is_counted(monkeypatch):
    texts = [f"{letter * 8}{end}" for letter in "abcdef" for end in ("", "x", "y")]
    monkeypatch.setitem(tasks.TASKS, "medical", lambda *_: [((text, True),) for text in texts])
    monkeypatch.setattr("ffkernels.training.examples._kept", {})
    sizes = {"test_examples": 1, "validation_examples": 1}
    for _ in range(2):  # also where the process has the examples already
        task = load_task("medical", ByteTokenizer(), max_length=8, **sizes)
        assert len(task.train) == 4
        assert task.remarks == (
            "Left out of medical: 12 texts equal to another in all of their first 8 tokens.",
        )
    assert load_task("medical", ByteTokenizer(), max_length=16, **sizes).remarks == ()


def test_text_counts_whole(tmp_path):
    path = lines(tmp_path, {"text": "a"}, "\n", {"text": "bé"}, {"text": "c" * 99}, {"text": "bé"})
    assert read(path, max_length=8) == [
        {"input_ids": [97, END], "labels": [97, END]},
        {"input_ids": [98, 0xC3, 0xA9, END], "labels": [98, 0xC3, 0xA9, END]},
        {"input_ids": [99] * 8, "labels": [99] * 8},
    ]


def test_a_prompt_is_cut_at_its_start(tmp_path, prompt_and_response):
    path = lines(
        tmp_path,
        {"prompt": "Q: ", "response": "yes"},
        {"prompt": "", "response": "none"},
        {"prompt": "0123456789", "response": "abcdefgh"},
    )
    pairs = [prompt_and_response(example) for example in read(path, max_length=8)]
    assert sorted(pairs) == [("", "none"), ("6789", "abcd"), ("Q: ", "yes")]


def test_bytes_that_are_no_text_are_reported_with_their_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fine"}\r\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        load_file(path, TOKENIZER)


def test_bad_requests_are_named(tmp_path):
    allowed = r"'poetry' does not exist; allowed are chat, instruction, medical\. .*--data"
    with pytest.raises(ValueError, match=allowed):
        load_task("poetry", TOKENIZER)
    with pytest.raises(ValueError, match="is not a file"):
        load_file(tmp_path / "none.jsonl", TOKENIZER)
    with pytest.raises(ValueError, match="task 'own' has no example"):
        load_file(lines(tmp_path), TOKENIZER)
    path = lines(tmp_path, {"text": "a"}, {"text": "b"})
    with pytest.raises(
        ValueError, match=r"'own' has 2 different examples of at most 64 tokens; 1000 test and 32 validation"
    ):
        load_file(path, TOKENIZER)
    for wrong in (dict(max_length=3), dict(test_examples=-1), dict(validation_examples=1.5)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            load_task("instruction", TOKENIZER, **wrong)


def test_collate_pads_on_the_right():
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}],
        pad_token_id=256,
    )
    expected = {
        "input_ids": [[5, 6, 7], [8, 256, 256]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert batch.keys() == expected.keys()
    for key, rows in expected.items():
        assert batch[key].dtype == torch.long
        assert batch[key].tolist() == rows
    with pytest.raises(ValueError, match="at least one"):
        collate([], 256)


@pytest.mark.parametrize(("ending", "module"), [(".xz", lzma), (".gz", gzip), (".bz2", bz2)])
def test_compressed_files_are_read_as_they_are(tmp_path, ending, module):
    plain = lines(tmp_path, {"text": "a"}, {"prompt": "Q: ", "response": "é"}, {"text": "c"})
    packed = tmp_path / f"own.jsonl{ending}"
    packed.write_bytes(module.compress(plain.read_bytes()))
    sizes = {"test_examples": 1, "validation_examples": 1}
    assert load_file(packed, TOKENIZER, **sizes) == load_file(plain, TOKENIZER, **sizes)
    assert load_file(packed, TOKENIZER, **sizes).name == "own"


@pytest.mark.parametrize(("ending", "module"), [(".xz", lzma), (".gz", gzip), (".bz2", bz2)])
def test_a_damaged_archive_is_named(tmp_path, ending, module):
    packed = module.compress(b'{"text": "a long enough line"}\n' * 50)
    for name, content in (("short", packed[: len(packed) // 2]), ("plain", b'{"text": "x"}\n')):
        path = tmp_path / f"{name}.jsonl{ending}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.jsonl\{ending} cannot be decompressed"):
            load_file(path, TOKENIZER)
