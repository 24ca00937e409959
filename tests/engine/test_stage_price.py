"""What a validation costs in optimizer steps, by the tokens that ran through the model."""

import pytest
import torch
from torch import nn

from ffkernels import FastForward, FastForwardConfig, ValidationLoss
from ffkernels.engine.stage_price import StagePrice


@pytest.fixture
def lm():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    config = GPTNeoXConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    model = GPTNeoXForCausalLM(config).requires_grad_(False)
    model.gpt_neox.layers[0].attention.dense.weight.requires_grad_()
    return model


def batch(rows, length):
    ids = torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def forwards(model):
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return 2 + sum(n for n, trains in sizes if trains) / sum(n for n, _ in sizes)


def test_tokens_of_training_count_and_those_of_evaluation_do_not(lm):
    validation = ValidationLoss(lm, [batch(4, 9)])
    price = StagePrice(lm, validation)
    for _ in range(2):  # two steps of two micro-batches
        for _ in range(2):
            lm(**batch(2, 16)).loss.backward()
        price.steps += 1
        with torch.no_grad():
            lm(**batch(8, 16))
        validation()
    assert (price.tokens, price.steps) == (2 * 2 * 2 * 16, 2)
    # The last token of each example predicts nothing, and is not computed.
    assert validation.computed_tokens == 4 * 8
    assert price.read(None) == pytest.approx(32 / 64 / forwards(lm))
    price.settle()
    assert (price.tokens, price.steps) == (0, 0)


def test_where_tokens_cannot_be_counted_a_validation_is_a_batch():
    model = nn.Linear(2, 1)
    price = StagePrice(model, ValidationLoss(model, lambda model: model.weight.sum()))
    assert price.hooks == []
    assert price.read(None) == pytest.approx(1 / 3)  # every weight trains: a step is three forwards


def test_a_stage_records_its_price_and_detaching_takes_the_hook_off(lm):
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=1e-3)
    embedding = lm.get_input_embeddings()
    before = dict(embedding._forward_pre_hooks)
    ff = FastForward(lm, optimizer, ValidationLoss(lm, [batch(4, 9)]), FastForwardConfig(interval=2))
    for _ in range(2):
        lm(**batch(4, 16)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ff.stages[0].price == pytest.approx(32 / 64 / forwards(lm))
    assert ff.state_dict()["tokens"] == 0
    ff.detach()
    assert dict(embedding._forward_pre_hooks) == before
