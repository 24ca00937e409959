import json
from dataclasses import replace
from functools import partial

import pytest

from ffkernels.analysis.accuracy import accuracy, answered, draw, mcnemar, wilson
from ffkernels.analysis.multiple_choice import Question, choice_scores, from_examples
from ffkernels.training.session import open_session

CONFIG = dict(stages=dict(interval=3), steps=12, lr=3e-3, seed=1)
ANALYSIS = partial(accuracy, questions=16, choices=3, opening=0)


def test_the_models_that_are_asked(config, data):
    before, adam, ff = data["models"]
    assert [model["name"] for model in data["models"]] == ["before", "adam", "ff"]
    assert (before["optimizer_steps"], before["test_loss"]) == (0, None)
    assert adam["optimizer_steps"] == 12 and adam["test_loss"] == data["adam"]["test_loss"]
    assert ff["optimizer_steps"] == data["ff"]["optimizer_steps"]
    assert data["questions"] == 16 and data["choices"] == [3, 3] and data["chance"] == pytest.approx(1 / 3)
    # The same as training and asking by hand.
    with open_session(replace(config, fast_forward=None)) as session:
        questions = from_examples(session.task.test, choices=3, opening=0, limit=16, seed=1)
        for model, steps in ((before, 0), (adam, session.steps)):
            for step in range(steps):
                session.step(step)
            right = answered(questions, choice_scores(session.model, questions, pad_token_id=256))
            for score in ("sum", "mean"):
                assert model[score] == wilson(sum(right[score]), 16)


def test_the_pairs_add_up(data):
    _, adam, ff = data["models"]
    for score in ("sum", "mean"):
        pair = data["paired"][score]
        assert pair["both"] + pair["adam_only"] == adam[score]["correct"]
        assert pair["both"] + pair["ff_only"] == ff[score]["correct"]
        assert sum(pair[k] for k in ("both", "adam_only", "ff_only", "neither")) == 16


def test_a_benchmark_of_ones_own(config, tmp_path):
    path = tmp_path / "sums.jsonl"
    records = [{"question": f"{a}+{a}=", "choices": [f"{2 * a}.", "no."], "answer": 0} for a in range(5)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    found = accuracy(replace(config, steps=2), benchmark=str(path), questions=4)
    assert found["questions"] == 4 and found["chance"] == 0.5 and found["benchmark"] == str(path)
    with pytest.raises(ValueError, match="max_question_length=65: this model takes 64 tokens at most"):
        accuracy(config, benchmark=str(path), max_question_length=65)


def test_answered_by_sum_and_by_mean():
    questions = [Question((1,), ((2,), (3, 4, 5)), 1), Question((1,), ((2, 3), (4, 5)), 0)]
    assert answered(questions, [[-2.0, -3.0], [-5.0, -4.0]]) == {"sum": [False, False], "mean": [True, False]}


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # By hand from Wilson's formula, to six digits.
    [
        (8, 10, 0.490162, 0.943318),
        (50, 100, 0.403832, 0.596168),
        (0, 20, 0.0, 0.161125),
        (20, 20, 0.838875, 1.0),
    ],
)
def test_wilson(correct, n, low, high):
    found = wilson(correct, n)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)
    assert 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1
    assert found["correct"] == correct


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_of_nothing(correct, n):
    with pytest.raises(ValueError, match="must be counts"):
        wilson(correct, n)


@pytest.mark.parametrize(
    ("adam_only", "ff_only", "p"),
    # Twice the sum of C(n, k) / 2ⁿ up to the smaller count.
    [(3, 9, 598 / 4096), (0, 6, 2 / 64), (4, 4, 1.0), (0, 0, 1.0), (1, 0, 1.0)],
)
def test_mcnemar(adam_only, ff_only, p):
    adam = [True] * adam_only + [False] * ff_only + [True, True, False]
    ff = [False] * adam_only + [True] * ff_only + [True, True, False]
    assert mcnemar(adam, ff) == {
        "adam_only": adam_only,
        "ff_only": ff_only,
        "both": 2,
        "neither": 1,
        "p": pytest.approx(p),
    }


def test_the_picture(data, drawn):
    (axes,) = drawn(draw, data)
    points = [container.lines[0] for container in axes.containers]
    for line, score in zip(points, ("sum", "mean"), strict=True):
        assert list(line.get_ydata()) == [100 * model[score]["accuracy"] for model in data["models"]]
    assert axes.get_xticklabels()[0].get_text() == "before training"
