"""What a validation costs in optimizer steps, by the tokens that ran through the model."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from ffkernels import FastForward, FastForwardConfig, ValidationLoss
from ffkernels.engine.price import StagePrice
from ffkernels.reporting.flops import FlopMeter
from ffkernels.validation.evaluator import no_training
from ffkernels.validation.flops import count_flops


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
        with no_training():
            lm(**batch(8, 16)).loss.backward()
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


def test_a_forward_that_measures_what_training_costs_and_a_compiled_step_count_nothing(lm):
    price = StagePrice(lm, ValidationLoss(lm, [batch(4, 9)]))
    FlopMeter(0).training_step(lm, batch(2, 16))
    compiled = torch.compile(lm.get_input_embeddings(), backend="eager", fullgraph=True)
    compiled(batch(2, 16)["input_ids"])
    assert price.tokens == 0


def test_copies_and_pickles_of_the_model_take_nothing_along(lm):
    price = StagePrice(lm, ValidationLoss(lm, [batch(4, 9)]))
    price.not_to_be_pickled = lambda: None
    for other in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        other(**batch(2, 16)).loss.backward()
    assert price.tokens == 0
    lm(**batch(2, 16))
    assert price.tokens == 32


def test_no_hook_outlives_what_counts_or_is_put_on_where_none_is_needed(lm):
    hooks = lm.get_input_embeddings()._forward_pre_hooks
    validation = ValidationLoss(lm, [batch(4, 9)])
    price = StagePrice(lm, validation)
    assert len(hooks) == 1
    del price
    gc.collect()
    assert len(hooks) == 0
    optimizer = torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], lr=0.1)
    ff = FastForward(lm, optimizer, validation, FastForwardConfig(patience=3))
    assert len(hooks) == 0
    ff.detach()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_and_adapters_change_no_count(lm, reentrant):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(lm, LoraConfig(target_modules=["query_key_value", "embed_in"], r=2))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    price = StagePrice(model, ValidationLoss(model, [batch(4, 9)]))
    model(**batch(2, 16)).loss.backward()
    assert price.tokens == 32
    assert len(price.hooks) == 1


def test_the_price_is_what_the_flops_say():
    from ffkernels.training.models import add_adapter, load_model

    model, _ = load_model("tiny")
    model = add_adapter(model, rank=8)
    validation = ValidationLoss(model, [batch(4, 33)])
    price = StagePrice(model, validation)
    step = count_flops(lambda: model(**batch(8, 32)).loss.backward())
    price.steps += 1
    assert price.read(None) == pytest.approx(validation.flops / step, rel=0.1)
