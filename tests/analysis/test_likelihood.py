from __future__ import annotations

import random

import pytest
import torch

from ffkernels.analysis import likelihood
from ffkernels.analysis.likelihood import choice_scores
from ffkernels.analysis.multiple_choice import Question
from ffkernels.training.models import add_adapter, load_model


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
    monkeypatch.setattr(likelihood, "LOGITS", 258 * 50)
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
