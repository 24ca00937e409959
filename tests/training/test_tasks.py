"""Labels stand exactly on the response, splits share nothing, and the same call gives the same task."""

from __future__ import annotations

import ast
import bz2
import gzip
import json
import lzma
import time

import pytest
import torch

from ffkernels.training import offline, tasks
from ffkernels.training.offline import documented_functions
from ffkernels.training.tasks import collate, load_file, load_task
from ffkernels.training.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
END = TOKENIZER.eos_token_id


def prompt_and_response(example):
    """The two texts; the labels must be −100 on the first and repeat the tokens of the second."""
    ids, labels = example["input_ids"], example["labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    assert labels == [-100] * start + ids[start:]
    return TOKENIZER.decode(ids[:start]), TOKENIZER.decode(ids[start:])


def lines(tmp_path, *records):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), "utf-8")
    return path


def read(path, **options):
    """All examples of a file in the file's own order, as far as it can be told: sorted."""
    task = load_file(path, TOKENIZER, **{"test_examples": 1, "validation_examples": 1, **options})
    return sorted(task.test + task.validation + task.train, key=lambda example: example["input_ids"])


def test_instruction_is_split_as_in_the_paper():
    task = load_task("instruction", TOKENIZER)
    assert (len(task.test), len(task.validation)) == (1000, 32)
    assert 0.9 * len(documented_functions()) < len(task.train) + 1032 <= len(documented_functions())
    assert len(task.train) > 1000
    small = load_task("instruction", TOKENIZER, test_examples=10, validation_examples=3)
    assert (len(small.test), len(small.validation), len(small.train)) == (10, 3, len(task.train) + 1019)


@pytest.mark.parametrize("max_length", [16, 64])
def test_no_example_is_in_two_splits_after_it_was_cut(max_length):
    task = load_task("instruction", TOKENIZER, max_length=max_length, test_examples=300)
    seen = [tuple(e["input_ids"]) for split in (task.train, task.validation, task.test) for e in split]
    assert len(set(seen)) == len(seen)


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


def test_instruction_pairs_a_docstring_with_its_function():
    task = load_task("instruction", TOKENIZER, max_length=100_000)
    by_source = {source: summary for summary, source in documented_functions()}
    for example in task.test[:200]:
        prompt, response = prompt_and_response(example)
        assert example["input_ids"][-1] == END
        assert prompt == f'"""{by_source[response]}"""\n'
        function = ast.parse(response).body[0]
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        assert ast.get_docstring(function) is None


@pytest.mark.parametrize("max_length", [17, 64, 256])
def test_prompts_leave_at_least_half_to_the_response(max_length):
    task = load_task("instruction", TOKENIZER, max_length=max_length)
    full = {source: f'"""{summary}"""\n' for summary, source in documented_functions()}
    by_start = {}
    for source, prompt in full.items():
        by_start.setdefault(source.encode()[: max_length // 2], []).append(prompt.encode())
    for example in task.train + task.validation + task.test:
        ids, labels = example["input_ids"], example["labels"]
        assert len(ids) == len(labels) <= max_length
        start = labels.count(-100)
        assert labels == [-100] * start + ids[start:]
        assert 0 < start <= max_length // 2
        prompts = by_start[bytes(token for token in ids[start:] if token < 256)[: max_length // 2]]
        assert any(prompt.endswith(bytes(ids[:start])) for prompt in prompts)


def test_no_body_stands_in_two_splits():
    task = load_task("instruction", TOKENIZER, max_length=100_000)
    bodies = []
    for split in (task.train, task.validation, task.test):
        functions = [ast.parse(prompt_and_response(example)[1]).body[0] for example in split[:1000]]
        bodies.append({ast.unparse(ast.Module(function.body, [])) for function in functions})
        assert len(bodies[-1]) >= 0.99 * len(functions)  # comments are all that may tell two of them apart
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len(bodies[one] & bodies[other]) <= 0.01 * min(len(bodies[one]), 1000)
    sources = [{tuple(e["input_ids"]) for e in split} for split in (task.train, task.validation, task.test)]
    assert not sources[0] & sources[1] and not sources[0] & sources[2] and not sources[1] & sources[2]


def test_the_seed_alone_decides_the_order():
    first, again = (load_task("instruction", TOKENIZER, seed=3) for _ in range(2))
    other = load_task("instruction", TOKENIZER, seed=4)
    assert first == again
    assert first.test != other.test

    def key(example):
        return example["input_ids"], example["labels"]

    assert sorted(map(key, first.train + first.validation + first.test)) == sorted(
        map(key, other.train + other.validation + other.test)
    )


def test_the_standard_library_is_read_the_same_and_fast(monkeypatch):
    kept = documented_functions()
    listing = offline.os.walk

    def backwards(root):
        for directory, below, files in listing(root):
            below.sort(reverse=True)
            yield directory, below, files[::-1]

    monkeypatch.setattr(offline.os, "walk", backwards)
    documented_functions.cache_clear()
    start = time.process_time()
    assert documented_functions() == kept
    assert time.process_time() - start < 15  # far above what it takes: a guard against reading site-packages


def test_the_cut_through_hard_files(tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_bytes(b'def f():\n    """Hello there, world."""\n    return "\xff"\n')
    (tmp_path / "broken.py").write_text('def f(:\n    """Hello there, world."""\n')
    (tmp_path / "nul.py").write_bytes(b'def f():\n    """Hello there, world."""\n    return 0\n\0')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('def t():\n    """Not to be read at all."""\n    return 1\n')
    (tmp_path / "good.py").write_text(
        "class A:\n"
        "    @property\n"
        "    def f(self):\n"
        '        """Return one\n'
        "        \x0cthing.\n"
        "\n"
        '        More of it."""\n'
        '        text = """\n'
        'left"""\n'
        "        return text\n"
        "\n"
        "    if True:\n"
        "        async def g(self):\n"
        '            """Another such function."""\n'
        "            # The comment stays.\n"
        "            return 2\n"
        '    def only(self):\n        """No body but the docstring."""\n'
        '    def line(self): """On the header line."""; return 3\n'
        '    def short(self):\n        """Too brief"""\n        return 4\n'
        '    def twin(self):\n        """Another body like that."""\n        # The comment stays.\n'
        "        return 2\n"
    )
    monkeypatch.setattr(offline.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documented_functions.cache_clear()
    try:
        assert documented_functions() == (
            (
                "Return one thing.",
                'def f(self):\n    text = """\nleft"""\n    return text\n',
            ),
            ("Another such function.", "async def g(self):\n    # The comment stays.\n    return 2\n"),
        )
        (tmp_path / "good.py").unlink()
        documented_functions.cache_clear()
        with pytest.raises(RuntimeError, match="holds no source"):
            documented_functions()
    finally:
        documented_functions.cache_clear()


def test_text_counts_whole(tmp_path):
    path = lines(tmp_path, {"text": "a"}, "\n", {"text": "bé"}, {"text": "c" * 99}, {"text": "bé"})
    assert read(path, max_length=8) == [
        {"input_ids": [97, END], "labels": [97, END]},
        {"input_ids": [98, 0xC3, 0xA9, END], "labels": [98, 0xC3, 0xA9, END]},
        {"input_ids": [99] * 8, "labels": [99] * 8},
    ]


def test_a_prompt_is_cut_at_its_start(tmp_path):
    path = lines(
        tmp_path,
        {"prompt": "Q: ", "response": "yes"},
        {"prompt": "", "response": "none"},
        {"prompt": "0123456789", "response": "abcdefgh"},
    )
    pairs = [prompt_and_response(example) for example in read(path, max_length=8)]
    assert sorted(pairs) == [("", "none"), ("6789", "abcd"), ("Q: ", "yes")]


def test_only_the_assistant_counts(tmp_path):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "Bye"},
    ]
    other = [{"role": "assistant", "content": "I begin."}]
    path = lines(tmp_path, {"messages": talk}, {"messages": other}, {"text": "x"})
    example = max(read(path, max_length=256), key=lambda e: len(e["input_ids"]))
    text = "System: Be brief.\nUser: 1+1?\nAssistant: 2\nUser: ok\nAssistant: Bye\n"
    assert example["input_ids"] == [*text.encode(), END]
    counted = [label for label in example["labels"] if label != -100]
    assert counted == [*b"2\nBye\n", END]
    at = text.index("2\n")
    assert example["labels"][at : at + 2] == list(b"2\n")


class Templated(ByteTokenizer):
    """A tokenizer with a chat template and a start token of its own."""

    chat_template = "given"
    bos_token_id = 1

    def encode(self, text, add_special_tokens=False):
        return [1] * add_special_tokens + list(text.encode())

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert tokenize is False
        turns = "".join(f"<{m['role'][0]}>{m['content']}</>" for m in messages)
        return turns + "<a>" * add_generation_prompt


def test_the_tokenizers_own_template_and_start_token_are_used(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}] * 2
    path = lines(tmp_path, {"messages": talk}, {"text": "x"}, {"text": "y"})
    task = load_file(path, Templated(), max_length=256, test_examples=1, validation_examples=1)
    example = max(task.train + task.test + task.validation, key=lambda e: len(e["input_ids"]))
    assert example["input_ids"] == [1, *b"<u>hi</><a>ho</><u>hi</><a>ho</>", END]
    assert bytes(t for t in example["labels"] if 0 <= t < 256) == b"ho</>ho</>"


def test_a_start_token_that_the_template_writes_is_there_once(tmp_path):
    class Starting(Templated):
        def encode(self, text, add_special_tokens=False):
            return [1] * add_special_tokens + [1 if byte == ord("^") else byte for byte in text.encode()]

        def apply_chat_template(self, *args, **options):
            return "^" + super().apply_chat_template(*args, **options)

    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = lines(tmp_path, {"messages": talk}, {"text": "x"}, {"text": "y"})
    task = load_file(path, Starting(), max_length=256, test_examples=1, validation_examples=1)
    example = max(task.train + task.test + task.validation, key=lambda e: len(e["input_ids"]))
    assert example["input_ids"] == [1, *b"<u>hi</><a>ho</>", END]


def test_a_template_that_refuses_a_role_is_reported_with_its_line(tmp_path):
    class Strict(Templated):
        def apply_chat_template(self, *args, **options):
            raise LookupError("System role not supported")

    talk = [{"role": "system", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with pytest.raises(ValueError, match=r"line 1: .*chat template refuses it \(System role not supported"):
        load_file(lines(tmp_path, {"messages": talk}), Strict())


def test_bytes_that_are_no_text_are_reported_with_their_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fine"}\r\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        load_file(path, TOKENIZER)


def test_a_template_that_rewrites_history_is_refused(tmp_path):
    class Forgetful(Templated):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return super().apply_chat_template(messages[-1:], tokenize, add_generation_prompt)

    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with pytest.raises(ValueError, match=r"line 1: .*rewrites earlier turns, so messages\[1\]"):
        load_file(lines(tmp_path, {"messages": talk}), Forgetful())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad\n", r"line 2: not JSON"),
        ("[1]\n", r"line 2: a JSON list; each line must be an object with `text`"),
        ({"input": 1, "output": 2}, r"line 2: has the keys \['input', 'output'\]; needed are `text`; or"),
        (
            {"prompt": "a"},
            r"line 2: has the keys \['prompt'\]; needed are `text`; or `prompt` and `response`",
        ),
        ({"response": "a", "prompt": None}, r"line 2: has the keys .*, of which prompt are null; needed"),
        ({"text": 3}, r"line 2: 'text' must be a string, not int"),
        ({"messages": []}, r"line 2: 'messages' must be a list of at least one"),
        ({"messages": ["a"]}, r"line 2: messages\[0\] must be an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] needs a string 'content'; it has \['role'\]"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"role 'bot'; allowed are system, user, assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"line 2: no turn of the assistant"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = lines(tmp_path, {"text": "fine"}, line)
    with pytest.raises(ValueError, match=message):
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
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
            {"input_ids": [8], "labels": [8]},
        ],
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
