"""Taking models apart: through wrappers, and not at all where the halves are not the whole."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ffkernels.graphs import check as graph_check
from ffkernels.graphs.token import describe_change, token
from ffkernels.validation.causal_lm import (
    FastPathRefused,
    cuda_products_in_tf32,
    find_autocast,
    find_causal_lm,
    unwrap,
)
from ffkernels.validation.choice import TOLERANCES
from ffkernels.validation.evaluator import coarsest
from ffkernels.validation.loss import ValidationLoss

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def lora(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **options))


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen3", "gemma", "gemma2"])
def test_finds_the_halves(family, tiny_model):
    model = tiny_model(family)
    lm = find_causal_lm(model)
    assert lm.head is model.get_output_embeddings()
    assert lm.backbone is model.base_model is not model
    assert (lm.vocabulary, lm.embeddings) == (97, 97)
    assert lm.softcap == (30.0 if family == "gemma2" else None)
    assert find_autocast(lm.wrappers) is None


def test_looks_through_wrappers(tiny_model):
    plain = tiny_model("llama")
    wrapped = torch.compile(lora(plain, task_type="CAUSAL_LM"))
    inner, wrappers = unwrap(wrapped)
    assert inner is plain
    assert [type(w).__name__ for w in wrappers] == ["OptimizedModule", "PeftModelForCausalLM"]
    assert find_causal_lm(wrapped).backbone is plain.model
    assert unwrap(nn.DataParallel(plain))[0] is plain


def test_the_heads_own_adapter_and_a_saved_head_are_the_head(tiny_model):
    peft = pytest.importorskip("peft")
    for options in (
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ):
        model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, **options))
        lm = find_causal_lm(model)
        assert lm.head is unwrap(model)[0].lm_head
        assert not isinstance(lm.head, nn.Linear)
        assert lm.vocabulary == 97


GROWING = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "changes", "longest", "match"),
    [
        ("mistral", dict(sliding_window=16), 17, "sliding_window = 16"),
        ("mistral", dict(sliding_window=16), 16, None),
        ("mistral", dict(sliding_window=None), 100, None),
        ("qwen3", dict(sliding_window=4, use_sliding_window=False), 100, None),  # no layer has it
        ("llama", dict(rope_parameters=GROWING, max_position_embeddings=32), 32, None),
        ("llama", dict(rope_parameters=GROWING, max_position_embeddings=32), 33, "rotary embedding changes"),
    ],
)
def test_windows_and_rotary_embeddings_that_grow_with_the_batch(family, changes, longest, match, tiny_model):
    lm = find_causal_lm(tiny_model(family, **changes))
    with pytest.raises(FastPathRefused, match=match) if match else nullcontext():
        lm.check_length(longest)


def test_refusals(tiny_model):
    peft = pytest.importorskip("peft")
    hooked = tiny_model("llama")
    hooked.register_forward_hook(lambda *_: None)
    bidirectional = tiny_model("llama")
    bidirectional.model.layers[1].self_attn.is_causal = False
    prompt = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    invoked = lora(tiny_model("llama"), task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    sharded = tiny_model("llama")
    sharded.__class__ = type("FSDPLlama", (type("FullyShardedDataParallel", (), {}), type(sharded)), {})
    for model, match in [
        (nn.Linear(2, 2), "not a transformers model"),
        (tiny_model("granite"), "logits_scaling"),
        (tiny_model("llama").model, "no separate backbone|not a transformers"),
        (hooked, "forward hooks"),
        (bidirectional, "both directions"),
        (prompt, "PROMPT_TUNING"),
        (invoked, "invocation tokens"),
        (sharded, "FSDP"),
    ]:
        with pytest.raises(FastPathRefused, match=match):
            find_causal_lm(model)


def test_prompt_tuning_runs_the_model_itself(tiny_model, padded_batch, generic):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    generic(peft.get_peft_model(tiny_model("llama"), config), [padded_batch(3, 12)], "PROMPT_TUNING")


def test_compiled_model(tiny_model, padded_batch, own_loss):
    model, batches = tiny_model("llama"), [padded_batch(3, 12)]
    validation = ValidationLoss(torch.compile(model), batches, check=False)
    assert validation.path == "fast"
    assert float(validation()) == pytest.approx(own_loss(model, batches), rel=2e-6)


def as_the_trainer_does():
    pytest.importorskip("transformers.utils.import_utils").enable_tf32(True)


def at(holder, precision):
    return lambda: setattr(holder, "fp32_precision", precision)


def old(precision):
    return lambda: torch.set_float32_matmul_precision(precision)


def allow():
    torch.backends.cuda.matmul.allow_tf32 = True


ROOT, PRODUCTS, BACKEND = torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn


WAYS = {
    "nothing": ([], False),
    "TrainingArguments(tf32=True)": ([as_the_trainer_does], True),
    "high": ([old("high")], True),
    "medium": ([old("medium")], True),
    "highest": ([old("highest")], False),
    "allow_tf32": ([allow], True),
    "the root": ([at(ROOT, "tf32")], True),
    "the products": ([at(PRODUCTS, "tf32")], True),
    "the backend": ([at(BACKEND, "tf32")], True),
    "all but the products": ([at(ROOT, "tf32"), at(PRODUCTS, "ieee")], False),
    "all but the backend": ([at(ROOT, "tf32"), at(BACKEND, "ieee")], False),
    "all again": ([at(ROOT, "tf32"), at(PRODUCTS, "ieee"), at(PRODUCTS, "none")], True),
    "the old one over the root": ([allow, at(ROOT, "ieee")], True),
    "what CUDA has not": ([at(ROOT, "bf16")], False),
}


@pytest.mark.parametrize("way", WAYS)
def test_tolerances_and_tokens_follow_tf32(way, tiny_model, padded_batch, default_precision):
    model = tiny_model("llama")
    validation = ValidationLoss(model, [padded_batch()])
    before = token(validation)
    statements, in_force = WAYS[way]
    for statement in statements:
        statement()
    assert cuda_products_in_tf32() is in_force
    assert coarsest(TOLERANCES, model, GPU) == (2e-3 if in_force else 2e-5)
    assert graph_check.loss_tolerance(validation, GPU) == (1e-4 if in_force else 1e-5)
    assert coarsest(TOLERANCES, model, CPU) == 2e-5
    assert graph_check.loss_tolerance(validation, CPU) == 1e-5
    after = token(validation)
    assert (after != before) is in_force
    if in_force:
        assert "a precision or determinism switch (IEEE float32 → TF32)" in describe_change(before, after)


@pytest.mark.parametrize(
    ("dtype", "own", "captured"), [(torch.float64, 2e-5, 1e-5), (torch.bfloat16, 2e-2, 5e-3)]
)
def test_other_types_have_no_tf32(dtype, own, captured, tiny_model, default_precision):
    model = tiny_model("llama").to(dtype)
    validation = ValidationLoss(model, lambda model: 0.0)
    ROOT.fp32_precision = "tf32"
    assert coarsest(TOLERANCES, model, GPU) == own
    assert graph_check.loss_tolerance(validation, GPU) == captured
