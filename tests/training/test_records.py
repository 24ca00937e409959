"""Data in the forms that people have, each against the text that it stands for and what the loss counts."""

import json

import pytest

from ffkernels.training.conversations import MARKED, PLAIN, NothingToLearn, conversation
from ffkernels.training.records import forms_of, segments_of
from ffkernels.training.tasks import load_file
from ffkernels.training.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SIZES = {"test_examples": 1, "validation_examples": 1, "max_length": 256}
BELOW = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
ALPACA = f"{BELOW}. {WRITE}### Response:\n"
PAIRED = (
    f"{BELOW}, paired with an input that provides further context. {WRITE}### Input:\n1, 2\n\n### Response:\n"
)


def says(role, content, **more):
    return {"role": role, "content": content, **more}


USER, ASSISTANT, SYSTEM = says("user", "hi"), says("assistant", "ho"), says("system", "Be brief.")
HI = says("assistant", "hi", weight=0)
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL_TURNS = [
    says("user", "1+1?"),
    says("assistant", None, tool_calls=[CALL]),
    says("tool", "2", tool_calls=None),
    says("assistant", "two"),
]
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def shown(segments):
    """The text, with brackets around what the loss counts."""
    return "".join(f"⟦{text}⟧" if counted else text for text, counted in segments)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "1+1=", "completion": "2"}, "1+1=⟦2⟧"),
        ({"instruction": "Add.", "input": "", "output": "3"}, f"{ALPACA}⟦3⟧"),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, f"{PAIRED}⟦3⟧"),
        ({"instruction": "Add.", "context": "1, 2", "response": "3"}, f"{PAIRED}⟦3⟧"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "User: hi\nAssistant: ⟦ho\n⟧",
        ),
        (
            {"system": "Be brief.", "conversations": [USER, ASSISTANT]},
            "System: Be brief.\nUser: hi\nAssistant: ⟦ho\n⟧",
        ),
        (
            {"messages": [says("developer", "Be."), says("system", "Brief."), says("model", "ho")]},
            "System: Be.\nSystem: Brief.\nAssistant: ⟦ho\n⟧",
        ),
        ({"messages": [says("user", PARTS), says("assistant", ["c"])]}, "User: a\nb\nAssistant: ⟦c\n⟧"),
        (
            {"messages": TOOL_TURNS},
            'User: 1+1?\nAssistant: ⟦{"name": "add", "arguments": {"a": 1}}\n⟧Tool: 2\nAssistant: ⟦two\n⟧',
        ),
        (
            {"messages": [HI, says("user", "a"), says("assistant", "b", weight=1)]},
            "Assistant: hi\nUser: a\nAssistant: ⟦b\n⟧",
        ),
        (
            {"prompt": [says("assistant", "hi"), says("user", "a")], "completion": [says("assistant", "b")]},
            "Assistant: hi\nUser: a\nAssistant: ⟦b\n⟧",
        ),
        (
            {"system": "Be brief.", "prompt": [says("user", "a")], "completion": [says("assistant", "b")]},
            "System: Be brief.\nUser: a\nAssistant: ⟦b\n⟧",
        ),
        ({"text": "read", "messages": None, "prompt": None}, "⟦read⟧"),
        ({"text": "not", "prompt": "read", "response": "this"}, "read⟦this⟧"),
    ],
)
def test_every_form_is_its_text(record, expected):
    assert shown(segments_of(record, BYTES, "x")) == expected


class Named(ByteTokenizer):
    eos_token = "</s>"


class Templated(ByteTokenizer):
    """A tokenizer with a chat template and a start token of its own."""

    chat_template = "given"
    bos_token_id = 1

    def encode(self, text, add_special_tokens=False):
        return [1] * add_special_tokens + [1 if byte == ord("^") else byte for byte in text.encode()]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert tokenize is False
        return "".join(f"<{m['role'][0]}>{m['content']}</>" for m in messages) + "<a>" * add_generation_prompt


class Starting(Templated):
    def apply_chat_template(self, *args, **options):
        return "^" + super().apply_chat_template(*args, **options)


class Strict(Templated):
    def apply_chat_template(self, *args, **options):
        raise LookupError("System role not supported")


class Forgetful(Templated):
    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return super().apply_chat_template(messages[-1:], tokenize, add_generation_prompt)


@pytest.mark.parametrize(
    ("messages", "tokenizer", "options", "expected"),
    [
        ([SYSTEM, USER, ASSISTANT], BYTES, {}, "System: Be brief.\nUser: hi\nAssistant: ⟦ho\n⟧"),
        ([USER, ASSISTANT, USER], BYTES, {"counted": "all"}, "⟦User: hi\nAssistant: ho\nUser: hi\n⟧"),
        ([USER], BYTES, {"counted": "all"}, "⟦User: hi\n⟧"),
        (
            [USER, ASSISTANT],
            Named(),
            {"counted": "all", "fallback": MARKED},
            "⟦<|system|>\n</s>\n<|user|>\nhi</s>\n<|assistant|>\nho</s>\n⟧",
        ),
        (
            [SYSTEM, USER, ASSISTANT],
            Named(),
            {"fallback": MARKED},
            "<|system|>\nBe brief.</s>\n<|user|>\nhi</s>\n<|assistant|>\n⟦ho</s>\n⟧",
        ),
        *(
            row
            for fallback in (PLAIN, MARKED)  # the tokenizer's own template goes before both
            for row in (
                (
                    [USER, ASSISTANT] * 2,
                    Templated(),
                    {"counted": "all", "fallback": fallback},
                    "<u>⟦hi</><a>ho</><u>hi</><a>ho</>⟧",
                ),
                ([USER, ASSISTANT], Templated(), {"fallback": fallback}, "<u>hi</><a>⟦ho</>⟧"),
            )
        ),
        ([USER, ASSISTANT], Forgetful(), {"counted": "all"}, "⟦<a>ho</>⟧"),
    ],
)
def test_conversations_in_each_format(messages, tokenizer, options, expected):
    segments = conversation(messages, tokenizer, "x", **options)
    assert shown(segments) == expected and expected.count("⟦") == sum(counted for _, counted in segments)


@pytest.mark.parametrize("first", [USER, says("user", " s\n"), says("user", "Be nice.")])
def test_a_system_prompt_that_the_template_writes_itself_is_not_counted(first):
    class Prompted(Templated):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            trimmed = [{**message, "content": message["content"].strip()} for message in messages]
            return "<s>Be nice.</>" + super().apply_chat_template(trimmed, tokenize, add_generation_prompt)

    whole = conversation([first, ASSISTANT], Prompted(), "x", counted="all")
    assert whole == (("<s>Be nice.</><u>", False), (f"{first['content'].strip()}</><a>ho</>", True))
    assert conversation([first, ASSISTANT], Prompted(), "x")[1] == ("ho</>", True)


@pytest.mark.parametrize(
    ("tokenizer", "turns", "ids", "counted"),
    [
        (
            BYTES,
            [SYSTEM, says("user", "1+1?"), says("assistant", "2"), USER, says("assistant", "Bye")],
            b"System: Be brief.\nUser: 1+1?\nAssistant: 2\nUser: hi\nAssistant: Bye\n",
            b"2\nBye\n",
        ),
        (Templated(), [USER, ASSISTANT] * 2, b"\1<u>hi</><a>ho</><u>hi</><a>ho</>", b"ho</>ho</>"),
        (Starting(), [USER, ASSISTANT], b"\1<u>hi</><a>ho</>", b"ho</>"),  # it writes the start token too
    ],
    ids=["plain", "template", "template with a start token"],
)
def test_only_the_assistant_counts(tmp_path, tokenizer, turns, ids, counted):
    path = written(tmp_path / "own.jsonl", {"messages": turns}, {"text": "x"}, {"text": "y"})
    task = load_file(path, tokenizer, **SIZES)
    example = max(task.train + task.test + task.validation, key=lambda e: len(e["input_ids"]))
    end = tokenizer.eos_token_id
    assert example["input_ids"] == [*ids, end]
    assert [label for label in example["labels"] if label != -100] == [*counted, end]
    at = ids.index(counted[:2])
    assert example["labels"][at : at + 2] == list(counted[:2])


@pytest.mark.parametrize(
    ("tokenizer", "turns", "message"),
    [
        (Strict(), [SYSTEM, ASSISTANT], r"chat template refuses it \(System role not supported"),
        (Forgetful(), [USER, ASSISTANT], r"rewrites earlier turns, so messages\[1\]"),
        (BYTES, [USER], "no turn of the assistant"),
    ],
)
def test_what_has_no_turn_to_learn_from_is_reported_with_its_line(tmp_path, tokenizer, turns, message):
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        load_file(written(tmp_path / "own.jsonl", {"messages": turns}), tokenizer)


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
    expected = '[add]<user>1+1?</><assistant>⟦add{"a": 1}</>⟧<tool>2</><assistant>⟦two</>⟧'
    assert shown(segments) == expected


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
    several = {"instruction": "a", "output": "b", "text": "c"}
    assert forms_of(several) == [("instruction", "output"), ("text",)]


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
        ('{"text": "\\ud800"}', r"'\\ud800' is half of a character"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON"),
        ('{"text": ' + "[" * 200_000 + "}", "not JSON"),
        ("{bad", "not JSON"),
        ("[1]", "a JSON list; each line must be an object with `text`"),
        ({"input": 1, "output": 2}, r"has the keys \['input', 'output'\]; needed are `text`; or"),
        ({"prompt": "a"}, r"has the keys \['prompt'\]; needed are `text`; or `prompt` and `response`"),
        ({"response": "a", "prompt": None}, "has the keys .*, of which prompt are null; needed"),
        ({"text": 3}, "'text' must be a string, not int"),
        ({"messages": []}, "'messages' must be a list of at least one"),
        ({"messages": ["a"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] needs a string 'content'; it has \['role'\]"),
        (
            {"messages": [says("bot", "a")]},
            r"messages\[0\] .*role 'bot'; allowed are system, user, assistant",
        ),
        ({"messages": [says("user", "a")]}, "no turn of the assistant"),
    ],
)
def test_whatever_cannot_be_read_is_told_with_its_line(tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text('{"text": "fine"}\n' + line + "\n", "utf-8")
    with pytest.raises(ValueError, match=f"line 2: {message}"):
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
