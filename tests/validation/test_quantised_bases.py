"""QLoRA: trained adapters in float32 on a base whose weights are packed, in the packages that pack them."""

import copy

import pytest
import torch
from torch import nn

from ffkernels import FastForward, FastForwardConfig, ValidationLoss

peft = pytest.importorskip("peft")


def bitsandbytes(kind):
    bnb = pytest.importorskip("bitsandbytes")

    def pack(linear):
        if kind == "int8":
            packed = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
            )
            packed.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False)
        else:
            packed = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=torch.float32 if kind == "nf4" else torch.bfloat16,
                quant_type="nf4",
            )
            packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return packed.to("cpu")

    return lambda model: replace_linears(model, pack)


def replace_linears(model, pack):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, pack(child))


def torchao(kind):
    pytest.importorskip("torchao")
    from torchao import quantization

    config = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }[kind]()
    return lambda model: quantization.quantize_(
        model, config, lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name
    )


def quanto(kind):
    pytest.importorskip("optimum.quanto")
    from optimum import quanto

    def pack(model):
        quanto.quantize(model, weights={"int8": quanto.qint8, "int4": quanto.qint4}[kind], exclude="lm_head")
        quanto.freeze(model)

    return pack


BASES = {
    "bitsandbytes nf4": lambda: bitsandbytes("nf4"),
    "bitsandbytes nf4, bf16": lambda: bitsandbytes("nf4-bf16"),
    "bitsandbytes int8": lambda: bitsandbytes("int8"),
    "torchao int8": lambda: torchao("int8"),
    "torchao int4": lambda: torchao("int4"),
    "quanto int8": lambda: quanto("int8"),
    "quanto int4": lambda: quanto("int4"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True], ids=["as loaded", "training"])
@pytest.mark.parametrize(
    "base",
    # quanto compiles what unpacks four bits when it first needs it.
    [pytest.param(base, marks=pytest.mark.slow) if base == "quanto int4" else base for base in BASES],
)
def test_a_quantised_base_is_validated_as_it_is_and_trains_on(base, training, tiny_model, padded_batch):
    """`from_pretrained` leaves a model in eval mode, and that is where it is when the loss is made."""
    pack = BASES[base]()
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, attention_dropout=0.0)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    batch = padded_batch(8, 24)
    flops = ValidationLoss(peft.get_peft_model(copy.deepcopy(model), adapters), [batch]).flops
    pack(model)
    model = peft.get_peft_model(model, adapters).train(training)
    validation = ValidationLoss(model, [batch])
    assert validation.path == "fast", validation.reason
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    ff = FastForward(model, optimizer, validation, FastForwardConfig(interval=2, patience=None, max_tau=8))
    validation()
    for _ in range(4):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and bool(g.abs().max() > 0) for g in gradients), "gradients come through"
        optimizer.step()
    model.train()
    with torch.no_grad():
        own = model(**{**batch, "use_cache": False}).loss.item()
    assert ff.stages[0].tau > 0 and ff.stages[0].loss_after < ff.stages[0].loss_before
    # Which columns its 8-bit products leave in 16 bits depends on all tokens of a batch, padding too.
    rel = 5e-4 if base == "bitsandbytes int8" else 1e-6
    assert float(validation()) == ff.stages[-1].loss_after == pytest.approx(own, rel=rel)
    assert validation.flops == flops
