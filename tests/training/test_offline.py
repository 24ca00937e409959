"""Texts without a download, read as their sources have them, and tasks of them whose splits share nothing."""

import ast
import json
import re
import sys
import time

import pytest

from ffkernels.training import offline
from ffkernels.training.offline import documented_functions
from ffkernels.training.tasks import load_task
from ffkernels.training.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
END = TOKENIZER.eos_token_id


def all_of(task):
    return [*task.train, *task.validation, *task.test]


@pytest.mark.parametrize(("name", "least"), [("instruction", 1000), ("chat", 2900), ("medical", 8000)])
def test_a_task_is_split_as_in_the_paper_and_the_seed_alone_decides_how(name, least):
    def keys(task):
        return sorted((example["input_ids"], example["labels"]) for example in all_of(task))

    task = load_task(name, TOKENIZER)
    assert (len(task.test), len(task.validation)) == (1000, 32) and len(task.train) > least
    examples = all_of(task)
    assert len({tuple(example["input_ids"]) for example in examples}) == len(examples)
    assert load_task(name, TOKENIZER) == task
    other = load_task(name, TOKENIZER, seed=1)
    assert other.test != task.test and keys(other) == keys(task)
    few = load_task(name, TOKENIZER, test_examples=10, validation_examples=3)
    assert (len(few.test), len(few.validation), len(few.train)) == (10, 3, len(task.train) + 1019)
    counted = [example["labels"] == example["input_ids"] for example in examples]
    assert not any(counted) if name == "instruction" else all(counted)
    if name == "instruction":
        assert 0.9 * len(documented_functions()) < len(examples) <= len(documented_functions())
    elif name == "chat":
        assert all(TOKENIZER.decode(example["input_ids"]).startswith("User: ") for example in examples)
    else:
        texts = {passage.encode()[:64] for passage in offline.passages()}
        assert all(bytes(token for token in e["input_ids"] if token < 256) in texts for e in examples)


@pytest.mark.parametrize(
    ("task", "package", "source"),
    [("chat", "chitchat_dataset", "conversations"), ("medical", "simple_icd_10_cm", "passages")],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, task, package, source):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("ffkernels.training.examples._kept", {})
    monkeypatch.setattr(f"ffkernels.training.tasks.{source}", getattr(offline, source).__wrapped__)
    message = rf"task '{task}' needs {package}: pip install 'ffkernels\[tasks\]'"
    with pytest.raises(RuntimeError, match=message):
        load_task(task, TOKENIZER)


# Functions of the standard library


@pytest.mark.parametrize("max_length", [16, 64])
def test_no_example_is_in_two_splits_after_it_was_cut(max_length):
    task = load_task("instruction", TOKENIZER, max_length=max_length, test_examples=300)
    seen = [tuple(example["input_ids"]) for example in all_of(task)]
    assert len(set(seen)) == len(seen)


def test_instruction_pairs_a_docstring_with_its_function(prompt_and_response):
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
    for example in all_of(task):
        ids, labels = example["input_ids"], example["labels"]
        assert len(ids) == len(labels) <= max_length
        start = labels.count(-100)
        assert labels == [-100] * start + ids[start:]
        assert 0 < start <= max_length // 2
        prompts = by_start[bytes(token for token in ids[start:] if token < 256)[: max_length // 2]]
        assert any(prompt.endswith(bytes(ids[:start])) for prompt in prompts)


def test_no_body_stands_in_two_splits(prompt_and_response):
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
            ("Return one thing.", 'def f(self):\n    text = """\nleft"""\n    return text\n'),
            ("Another such function.", "async def g(self):\n    # The comment stays.\n    return 2\n"),
        )
        (tmp_path / "good.py").unlink()
        documented_functions.cache_clear()
        with pytest.raises(RuntimeError, match="holds no source"):
            documented_functions()
    finally:
        documented_functions.cache_clear()


# Passages of ICD-10-CM


def passage(title):
    (found,) = [text for text in offline.passages() if text.startswith(f"{title} (")]
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
    passages = offline.passages()
    assert len(passages) > 9000
    titles = [text.split("\n")[0].rpartition(" (")[0].lower() for text in passages]
    assert len(set(titles)) == len(titles)
    assert not any("encounter" in title for title in titles[:2000])
    for text in passages:
        first, *notes = text.split("\n")
        assert re.fullmatch(r".+ \([A-Z][0-9A-Z]{2}(\.[0-9A-Z]{1,4})?\)", first), first
        assert notes and all(re.fullmatch(r"[A-Z][a-z ]+: \S.*\.", note) for note in notes), text
        assert "  " not in text and ": ," not in text and ":;" not in text


# Conversations of the Chit-Chat Challenge


def packaged(tmp_path, monkeypatch, records):
    """What ``conversations`` makes of a package that holds ``records``."""
    folder = tmp_path / "chitchat_dataset"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "dataset.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "chitchat_dataset", raising=False)
    try:
        return offline.conversations.__wrapped__()
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
    talks = offline.conversations()
    assert len(talks) > 4000
    for talk in talks:
        assert len(talk) >= 2
        assert [role for role, _ in talk] == (["user", "assistant"] * len(talk))[: len(talk)]
        assert all(content and content == content.strip() for _, content in talk)


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
