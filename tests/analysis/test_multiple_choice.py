import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from ffkernels.analysis import multiple_choice
from ffkernels.analysis.multiple_choice import Question, choice_scores, from_examples, load_benchmark
from ffkernels.training.models import add_adapter, load_model
from ffkernels.training.tokenizer import ByteTokenizer


def example(prompt, response):
    return {"input_ids": [*prompt, *response], "labels": [-100] * len(prompt) + [*response]}


EXAMPLES = [example([1, 2, 3], [10 * i + j for j in range(6)]) for i in range(1, 9)]


def test_the_answer_is_the_rest_of_the_example_and_the_others_are_other_examples_rests():
    questions = from_examples(EXAMPLES, choices=4, opening=0.5, seed=3)
    rests = [tuple(e["input_ids"][6:]) for e in EXAMPLES]
    assert [q.prompt for q in questions] == [tuple(e["input_ids"][:6]) for e in EXAMPLES]
    assert [q.choices[q.answer] for q in questions] == rests
    for question in questions:
        assert len(set(question.choices)) == 4 and set(question.choices) <= set(rests)
    assert len({q.answer for q in questions}) > 1  # where it stands must say nothing
    assert questions == from_examples(EXAMPLES, choices=4, opening=0.5, seed=3)
    assert questions != from_examples(EXAMPLES, choices=4, opening=0.5, seed=4)
    assert from_examples(EXAMPLES, choices=4, limit=3, seed=3) == questions[:3]


def test_without_an_opening_the_whole_response_is_asked_for_but_no_more_than_half_of_the_longest():
    first = from_examples([*EXAMPLES, example([1] * 4, [2] * 6)], opening=0)[0]
    assert first.prompt == (1, 2, 3) and first.choices[first.answer] == (10, 11, 12, 13, 14)


def test_only_the_first_counted_run_of_a_conversation_is_asked_for():
    talk = {"input_ids": list(range(50, 60)), "labels": [-100, -100, 52, 53, 54, 55, -100, 57, 58, 59]}
    question = from_examples([talk, *EXAMPLES], choices=2, opening=0.5)[0]
    assert question.prompt == (50, 51, 52, 53) and question.choices[question.answer] == (54, 55)


def test_examples_that_cannot_be_asked_about_are_left_out():
    text = {"input_ids": [7], "labels": [7]}  # one token: nothing before it
    nothing = {"input_ids": [7, 8], "labels": [-100, -100]}
    assert len(from_examples([text, nothing, *EXAMPLES])) == len(EXAMPLES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": 1}, "choices=1: must be an integer of at least 2"),
        ({"opening": 1.0}, "opening=1.0: must be a number from 0"),
        ({"choices": 9}, "8 held-out examples have 8 different continuations"),
    ],
)
def test_what_examples_do_not_allow(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_examples(EXAMPLES, **arguments)


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_a_benchmark_file(tmp_path):
    path = write(
        tmp_path / "b.jsonl",
        {"question": "1+1=", "choices": ["2", "3"], "answer": 0},
        "",
        {"question": "Sky? \n", "choices": ["blue", "green", "red"], "answer": "red", "source": "ignored"},
        {"question": "x", "choices": [" y", "z"], "answer": 1},
    )
    first, second, third = load_benchmark(path, ByteTokenizer(), max_length=64)
    assert first == Question(tuple(b"1+1="), (tuple(b" 2"), tuple(b" 3")), 0)
    assert second.prompt == tuple(b"Sky?") and second.answer == 2
    assert second.choices[0] == tuple(b" \nblue")
    assert third.choices == (tuple(b" y"), tuple(b" z"))


def test_what_is_too_long_is_cut(tmp_path):
    path = write(
        tmp_path / "b.jsonl", {"question": "a" * 20 + "bcd", "choices": ["e", "fffffff"], "answer": 0}
    )
    (question,) = load_benchmark(path, ByteTokenizer(), max_length=8)
    assert question == Question(tuple(b"abcd"), (tuple(b" e"), tuple(b" fff")), 0)


def test_the_start_token_stays(tmp_path):
    class Starting(ByteTokenizer):
        bos_token_id = 1

        def encode(self, text, add_special_tokens=False):
            return [1] * add_special_tokens + super().encode(text)

    path = write(tmp_path / "b.jsonl", {"question": "a" * 20, "choices": ["e", "f"], "answer": 0})
    (question,) = load_benchmark(path, Starting(), max_length=8)
    assert question.prompt == (1, *b"aaaaa")


def test_a_limit_draws_questions_by_the_seed(tmp_path):
    records = [{"question": f"q{i}", "choices": ["a", "b"], "answer": 0} for i in range(30)]
    path = write(tmp_path / "b.jsonl", *records)
    draws = [load_benchmark(path, ByteTokenizer(), max_length=64, limit=5, seed=s) for s in (0, 0, 1)]
    assert len(set(draws[0])) == 5 and draws[0] == draws[1] != draws[2]
    assert len(load_benchmark(path, ByteTokenizer(), max_length=64, limit=50)) == 30


GOOD = {"question": "q", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[1]", r"line 2: a JSON list; each line must be an object"),
        (
            {"question": "q", "choices": ["a", "b"]},
            r"line 2: has the keys \['choices', 'question'\], not 'answer'",
        ),
        ({**GOOD, "question": " "}, r"line 2: 'question' is ' '"),
        ({**GOOD, "question": 3}, r"line 2: 'question' is 3"),
        ({**GOOD, "choices": ["a"]}, r"line 2: 'choices' is \['a'\]; it must be two or more different"),
        ({**GOOD, "choices": ["a", "a"]}, r"line 2: 'choices'"),
        ({**GOOD, "choices": ["a", ""]}, r"line 2: 'choices'"),
        ({**GOOD, "choices": "ab"}, r"line 2: 'choices'"),
        ({**GOOD, "answer": 2}, r"line 2: 'answer' is 2; it must be a number from 0 to 1"),
        ({**GOOD, "answer": True}, r"line 2: 'answer' is True"),
        ({**GOOD, "answer": "c"}, r"line 2: 'answer' is 'c'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        load_benchmark(write(tmp_path / "b.jsonl", GOOD, line), ByteTokenizer(), max_length=64)


def test_files_without_questions(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl' is not a file; give a JSONL file"):
        load_benchmark(tmp_path / "nowhere.jsonl", ByteTokenizer(), max_length=64)
    with pytest.raises(ValueError, match="has no questions"):
        load_benchmark(write(tmp_path / "b.jsonl", ""), ByteTokenizer(), max_length=64)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe4"}')
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        load_benchmark(tmp_path / "latin.jsonl", ByteTokenizer(), max_length=64)
    with pytest.raises(ValueError, match="max_length=2: must be an integer of at least 4"):
        load_benchmark(tmp_path / "b.jsonl", ByteTokenizer(), max_length=2)


def test_pubmedqa_rows(monkeypatch):
    rows = [
        {"question": "Does it?", "context": {"contexts": ["One.", "Two."]}, "final_decision": "maybe"},
        {"question": "Is it?", "context": {"contexts": ["Three."]}, "final_decision": "Yes"},
    ]
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    first, second = load_benchmark("pubmedqa", ByteTokenizer(), max_length=200)
    assert asked == [("qiaojin/PubMedQA", "pqa_labeled", {"split": "train"})]
    assert bytes(first.prompt) == b"Abstract: One.\nTwo.\nQuestion: Does it?\nAnswer (yes, no or maybe):"
    assert first.choices == (tuple(b" yes"), tuple(b" no"), tuple(b" maybe"))
    assert (first.answer, second.answer) == (2, 0)


def test_pubmedqa_without_a_network(monkeypatch):
    def load_dataset(*names, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        RuntimeError, match=r"could not be had \(ConnectionError: no route\).*--benchmark FILE"
    ):
        load_benchmark("pubmedqa", ByteTokenizer(), max_length=200)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match="pip install"):
        load_benchmark("pubmedqa", ByteTokenizer(), max_length=200)


@pytest.fixture(scope="module")
def model():
    adapted = add_adapter(load_model("tiny")[0], seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # fresh ones are zeros
                torch.nn.init.normal_(parameter, std=0.02)
    return adapted


@pytest.fixture(scope="module")
def questions():
    draw = random.Random(0)

    def tokens(low, high):
        return tuple(draw.randrange(256) for _ in range(draw.randint(low, high)))

    return [
        Question(tokens(1, 30), tuple(tokens(1, 12) for _ in range(draw.randint(2, 5))), 0) for _ in range(9)
    ]


def one_by_one(model, questions):
    """Each sequence alone, in float64, token by token."""
    scores = []
    for question in questions:
        scores.append([])
        for choice in question.choices:
            ids = torch.tensor([[*question.prompt, *choice]])
            with torch.no_grad():
                logs = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
            first = len(question.prompt)
            scores[-1].append(sum(logs[first + i - 1, token].item() for i, token in enumerate(choice)))
    return scores


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_same_as_one_by_one_in_float64(model, questions, batch_size):
    expected = one_by_one(model.double(), questions)
    found = choice_scores(model.float(), questions, pad_token_id=256, batch_size=batch_size)
    assert [len(scores) for scores in found] == [len(q.choices) for q in questions]
    for mine, truth in zip(found, expected, strict=True):
        assert mine == pytest.approx(truth, rel=2e-5)


def test_the_padding_token_plays_no_part(model, questions):
    first, second = (choice_scores(model, questions, pad_token_id=pad) for pad in (256, 65))
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_batches_shrink_to_what_their_logits_take(model, questions, monkeypatch):
    whole = choice_scores(model, questions, pad_token_id=256)
    sizes = []
    forward = model.forward

    def counted(*args, **kwargs):
        sizes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(multiple_choice, "LOGITS", 258 * 50)
    found = choice_scores(model, questions, pad_token_id=256)
    rows = sum(len(q.choices) for q in questions)
    assert sum(shape[0] for shape in sizes) == rows and len(sizes) > 9
    assert all(shape[0] == 1 or shape.numel() <= 50 for shape in sizes)
    for a, b in zip(found, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_the_model_is_left_as_it_was(model, questions):
    model.train()
    before = torch.random.get_rng_state()
    choice_scores(model, questions, pad_token_id=256)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_bad_batch_size(model, questions):
    with pytest.raises(ValueError, match="batch_size=0: must be an integer of at least 1"):
        choice_scores(model, questions, pad_token_id=256, batch_size=0)
