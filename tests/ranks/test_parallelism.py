"""What is refused before anything is moved, told from the structure of model and optimizer alone."""

import pytest
import torch
from torch import nn

from ffkernels import FastForward, ValidationLoss
from ffkernels.ranks.parallelism import fsdp_modules, reshard, training_group, why_refused


def from_module(module, name, **attributes):
    """An object of a class that says it comes from `module`, which is not installed."""
    cls = type(name, (), {})
    cls.__module__ = module
    made = cls()
    vars(made).update(attributes)
    return made


def plain():
    model = nn.Linear(3, 1)
    return model, torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
        ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer"),
        ("deepspeed.runtime.fp16.fused_optimizer", "FP16_Optimizer"),
    ],
)
def test_deepspeed_optimizers_with_their_own_weights_are_refused(module, name):
    model, optimizer = plain()
    engine = from_module(module, name, optimizer=optimizer)
    wrapped = from_module("accelerate.utils.deepspeed", "DeepSpeedOptimizerWrapper", optimizer=engine)
    for given in (engine, wrapped):
        with pytest.raises(
            RuntimeError, match=rf"{name} of DeepSpeed .* overwrites the model's with it at every"
        ):
            FastForward(model, given, lambda model: model.weight.sum())


def test_deepspeed_without_zero_is_an_optimizer_like_any_other():
    model, optimizer = plain()
    wrapped = from_module("accelerate.utils.deepspeed", "DeepSpeedOptimizerWrapper", optimizer=optimizer)
    assert why_refused(model, wrapped) is None
    with FastForward(model, wrapped, lambda model: model.weight.sum()) as ff:
        assert ff.optimizer is optimizer


def test_zero_3_is_refused():
    model, optimizer = plain()
    model.weight.ds_id = 0
    with pytest.raises(RuntimeError, match="ZeRO-3 keeps no weights in the model between steps"):
        FastForward(model, optimizer, lambda model: model.weight.sum())


def test_fsdp1_is_refused():
    model, optimizer = plain()
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})(model)
    with pytest.raises(RuntimeError, match=r"FSDP1.*use fully_shard \(FSDP2\)"):
        FastForward(wrapper, optimizer, lambda model: model[0].weight.sum())


def test_plain_models_and_data_parallel_are_not_refused():
    model, optimizer = plain()
    assert why_refused(model, optimizer) is None
    assert why_refused(nn.DataParallel(model), optimizer) is None
    assert training_group(model) is None
    assert fsdp_modules(model) == []
    reshard([])


def test_an_optimizer_chain_that_bites_its_tail_ends():
    model, _ = plain()
    loop = from_module("somewhere", "Wrapper")
    loop.optimizer = loop
    assert why_refused(model, loop) is None


def test_validation_alone_knows_no_ranks():
    model, _ = plain()
    assert ValidationLoss(model, lambda model: 1.0).ranks is None
