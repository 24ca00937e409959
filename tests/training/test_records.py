"""Data in the forms that people have, each against the text that it stands for and what the loss counts."""

from __future__ import annotations

import json

import pytest

from ffkernels.training.conversations import NothingToLearn
from ffkernels.training.records import forms_of, segments_of
from ffkernels.training.tasks import load_file
from ffkernels.training.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SIZES = {"test_examples": 1, "validation_examples": 1, "max_length": 256}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
)
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
    "### Input:\n1, 2\n\n### Response:\n"
)
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL_TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_calls": None},
    {"role": "assistant", "content": "two"},
]


def says(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("record", "segments"),
    [
        ({"prompt": "1+1=", "completion": "2"}, [("1+1=", False), ("2", True)]),
        ({"instruction": "Add.", "input": "", "output": "3"}, [(ALPACA, False), ("3", True)]),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [(PAIRED, False), ("3", True)]),
        ({"instruction": "Add.", "context": "1, 2", "response": "3"}, [(PAIRED, False), ("3", True)]),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            [("User: hi\nAssistant: ", False), ("ho\n", True)],
        ),
        (
            {"system": "Be brief.", "conversations": [says("user", "hi"), says("assistant", "ho")]},
            [("System: Be brief.\nUser: hi\nAssistant: ", False), ("ho\n", True)],
        ),
        (
            {"messages": [says("developer", "Be."), says("system", "Brief."), says("model", "ho")]},
            [("System: Be.\nSystem: Brief.\nAssistant: ", False), ("ho\n", True)],
        ),
        (
            {
                "messages": [
                    says("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                    says("assistant", ["c"]),
                ]
            },
            [("User: a\nb\nAssistant: ", False), ("c\n", True)],
        ),
        (
            {"messages": TOOL_TURNS},
            [
                ("User: 1+1?\nAssistant: ", False),
                ('{"name": "add", "arguments": {"a": 1}}\n', True),
                ("Tool: 2\nAssistant: ", False),
                ("two\n", True),
            ],
        ),
        (
            {
                "messages": [
                    says("assistant", "hi", weight=0),
                    says("user", "a"),
                    says("assistant", "b", weight=1),
                ]
            },
            [("Assistant: hi\nUser: a\nAssistant: ", False), ("b\n", True)],
        ),
        (
            {
                "prompt": [says("assistant", "hi"), says("user", "a")],
                "completion": [says("assistant", "b")],
            },
            [("Assistant: hi\nUser: a\nAssistant: ", False), ("b\n", True)],
        ),
        (
            {
                "system": "Be brief.",
                "prompt": [says("user", "a")],
                "completion": [says("assistant", "b")],
            },
            [("System: Be brief.\nUser: a\nAssistant: ", False), ("b\n", True)],
        ),
        ({"text": "read", "messages": None, "prompt": None}, [("read", True)]),
        ({"text": "not", "prompt": "read", "response": "this"}, [("read", False), ("this", True)]),
    ],
)
def test_every_form_is_its_text(record, segments):
    assert segments_of(record, BYTES, "x") == tuple(segments)


@pytest.fixture(scope="module")
def templated():
    """A real chat template, with functions and turns of tools, as Hugging Face's are."""
    pytest.importorskip("jinja2")
    tokenizer = ByteTokenizer().for_transformers()
    tokenizer.chat_template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endif %}{{ m.content }}</>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    "shaped", [json.dumps, lambda tools: tools], ids=["as JSON in a string", "as a list"]
)
def test_a_template_gets_tools_and_calls_as_objects(templated, shaped):
    tools = shaped([{"type": "function", "function": {"name": "add"}}])
    segments = segments_of({"messages": TOOL_TURNS, "tools": tools}, templated, "x")
    assert segments == (
        ("[add]<user>1+1?</><assistant>", False),
        ('add{"a": 1}</>', True),
        ("<tool>2</><assistant>", False),
        ("two</>", True),
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [says("user", [{"type": "image", "image": "a.png"}])]}, r"part of type 'image'; only"),
        (
            {"messages": [says("assistant", None, tool_calls=[{"name": "add"}])]},
            r"each of 'tool_calls' must be",
        ),
        ({"messages": [says("assistant", None, tool_calls=5)]}, r"each of 'tool_calls' must be"),
        ({"prompt": [says("user", "a")], "completion": [5]}, r"completion\[0\] must be an object"),
        ({"conversations": "hi"}, "'conversations' must be a list of at least one"),
        ({"messages": [says("user", "a"), says("assistant", "b", weight=0)]}, "no turn of the assistant"),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            r"conversations\[0\] has the role 'narrator'; allowed are system",
        ),
        ({"messages": [says("assistant", "a")], "tools": "{"}, "'tools' is not JSON"),
        ({"messages": [says("assistant", "a")], "tools": {"a": 1}}, "'tools' must be a list, not dict"),
        ({"prompt": "a", "completion": [says("assistant", "a")]}, "'completion' must be a string, not list"),
        ({"instruction": "a", "input": 1, "output": "b"}, "'input' must be a string, not int"),
        ({"prompt": "a", "response": "caf\ud83d"}, r"x: '\\ud83d' is half of a character"),
        ({"messages": [says("user", "\udc00"), says("assistant", "a")]}, r"x: '\\udc00' is half"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(record, message):
    with pytest.raises(ValueError, match=rf"^x: .*{message}" if not message.startswith("x") else message):
        segments_of(record, BYTES, "x")


@pytest.mark.parametrize(
    "record",
    [
        {"text": " \n"},
        {"prompt": "a", "response": "\t"},
        {"instruction": "a", "output": ""},
        {"messages": [says("user", "a"), says("assistant", " ")]},
    ],
)
def test_white_space_is_nothing_to_learn(record):
    with pytest.raises(NothingToLearn):
        segments_of(record, BYTES, "x")


def test_forms_are_those_whose_fields_are_all_there():
    assert forms_of({"prompt": "a", "messages": [], "response": None}) == [("messages",)]
    assert forms_of({"instruction": "a", "output": "b", "text": "c"}) == [
        ("instruction", "output"),
        ("text",),
    ]


def written(path, *records):
    path.write_text("\n".join(map(json.dumps, records)), "utf-8")
    return path


@pytest.mark.parametrize("before", ["", "\ufeff", "\n \n"])
def test_one_array_is_read_as_its_lines_are(tmp_path, before):
    records = [{"text": letter} for letter in "abcd"]
    (tmp_path / "own.json").write_text(before + json.dumps(records, indent=1), "utf-8")
    as_lines = load_file(written(tmp_path / "own.jsonl", *records), BYTES, **SIZES)
    assert load_file(tmp_path / "own.json", BYTES, **SIZES) == as_lines
    (tmp_path / "own.json").write_text(json.dumps([*records, {"text": 1}]), "utf-8")
    with pytest.raises(ValueError, match=r"own\.json, item 5: 'text' must be a string"):
        load_file(tmp_path / "own.json", BYTES, **SIZES)


def test_what_is_left_out_is_counted(tmp_path):
    same = {"text": "a" * 8 + "b"}, {"text": "a" * 8 + "c"}
    records = [{"text": t} for t in "defghi"]
    several = {"text": "t", "prompt": "p", "response": "r"}
    blank = [{"text": " "}, {"prompt": "x", "response": ""}]
    path = written(tmp_path / "own.jsonl", *records, *records[:3], *same, several, *blank)
    task = load_file(path, BYTES, test_examples=1, validation_examples=1, max_length=8)
    assert len(task.train) == 6 + 1 + 1 - 2
    assert task.remarks == (
        "Left out of own.jsonl: 2 lines with nothing to learn from, empty or white space; 3 lines repeated "
        "word for word; 1 line equal to another in all of their first 8 tokens.",
        "1 line of own.jsonl has several forms; read is the first of messages, conversations, prompt, "
        "instruction, text.",
    )
    assert load_file(written(path, *records), BYTES, **SIZES).remarks == ()
    with pytest.raises(
        ValueError, match=r"has no example: its data are empty\. Left out of own\.jsonl: 2 lines"
    ):
        load_file(written(path, *blank), BYTES, **SIZES)


def test_another_file_is_tested_on_and_shares_nothing(tmp_path):
    train = written(tmp_path / "own.jsonl", *({"text": t} for t in "abcdef"))
    test = written(tmp_path / "held.jsonl", *({"text": t} for t in "efxy"))
    task = load_file(train, BYTES, **{**SIZES, "test_examples": 9}, test_data=test)
    texts = [{chr(e["input_ids"][0]) for e in split} for split in (task.train, task.validation, task.test)]
    assert texts[2] == set("efxy") and texts[0] | texts[1] == set("abcd") and len(task.validation) == 1
    assert task.remarks == ("Left out of own.jsonl: 2 lines equal to one of the file that is tested on.",)
    few = load_file(train, BYTES, **{**SIZES, "test_examples": 3}, test_data=test)
    assert len(few.test) == 3
    assert few.remarks[0] == task.remarks[0] and sorted(map(str, few.train)) == sorted(map(str, task.train))
    with pytest.raises(
        ValueError, match=r"^test_data='.*own\.jsonl': must not have all the lines of .*own\."
    ):
        load_file(train, BYTES, **SIZES, test_data=train)
    assert few.remarks[-1] == "Left out of held.jsonl: 1 line beyond the test examples that were asked for."


def test_no_test_examples(tmp_path):
    path = written(tmp_path / "own.jsonl", *({"text": t} for t in "abc"))
    task = load_file(path, BYTES, **{**SIZES, "test_examples": 0})
    assert (len(task.train), len(task.validation), task.test) == (2, 1, [])
    with pytest.raises(
        ValueError, match=r"Lower test_examples \(--test-examples; 0 tests on none\) or .*--test-data"
    ):
        load_file(path, BYTES, **{**SIZES, "test_examples": 2})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "\\ud800"}', r"line 2: '\\ud800' is half of a character"),
        ('{"text": ' + "1" * 5000 + "}", "line 2: not JSON"),
        ('{"text": ' + "[" * 200_000 + "}", "line 2: not JSON"),
        ("[1]", "line 2: a JSON list"),
    ],
)
def test_whatever_cannot_be_read_is_told_with_its_line(tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", "utf-8")
    with pytest.raises(ValueError, match=message):
        load_file(path, BYTES, **SIZES)


@pytest.mark.parametrize(("bad", "told"), [(2, 2), (10, 10), (42, 10)])
def test_bad_lines_are_reported_together(tmp_path, bad, told):
    path = written(
        tmp_path / "own.jsonl", {"text": "fine"}, *({"text": n} for n in range(bad)), {"text": "ok"}
    )
    with pytest.raises(ValueError) as error:
        load_file(path, BYTES, **SIZES)
    first, *lines = str(error.value).splitlines()
    assert first == f"{path}: {bad} lines cannot be read:"
    expected = [f"  {path}, line {2 + n}: 'text' must be a string, not int." for n in range(told)]
    assert lines == expected + [f"  … and {bad - told} more."] * (bad > told)
