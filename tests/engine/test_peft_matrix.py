"""Every PEFT method under Fast Forward: what moves, by how much, and whether the losses told are the model's.

For each method the stage's claims are checked against plain torch: the weights it leaves are W_t + τ·Δ, every
recorded loss is the model's own at those weights, and nothing else has changed.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from small_loops import descend, same

from ffkernels import FastForward, FastForwardConfig, ValidationLoss
from ffkernels.ops.notices import FFKernelsNotice

peft = pytest.importorskip("peft")
# What PEFT and transformers say about some of these models is not about Fast Forward.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:::(peft|transformers)\..*"),
    pytest.mark.filterwarnings("ignore:ValidationLoss runs"),
    pytest.mark.filterwarnings("ignore:some trainable weights are"),
]

SMALL = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=97)
MLP = "dense_4h_to_h"
FAMILIES = {
    "llama": (["q_proj", "v_proj"], ["k_proj", "down_proj"], ["down_proj"], "lm_head", "embed_tokens"),
    "gpt_neox": (["query_key_value"], ["query_key_value", MLP], [MLP], "embed_out", "embed_in"),
}
CAUSAL = dict(task_type="CAUSAL_LM")


def methods(family: str) -> dict:
    """What makes the config of each method for a family."""
    attention, ia3, feedforward, head, embedding = FAMILIES[family]
    on = dict(target_modules=attention, **CAUSAL)
    lora = dict(r=4, **on)
    return {
        "lora": lambda: peft.LoraConfig(**lora),
        "rslora": lambda: peft.LoraConfig(use_rslora=True, **lora),
        "dora": lambda: peft.LoraConfig(use_dora=True, **lora),
        "lora_bias": lambda: peft.LoraConfig(lora_bias=True, **lora),
        "base_bias": lambda: peft.LoraConfig(bias="lora_only", **lora),
        "lora_embedding": lambda: peft.LoraConfig(r=4, target_modules=[*attention, embedding], **CAUSAL),
        "modules_to_save": lambda: peft.LoraConfig(modules_to_save=[head], **lora),
        "saved_embedding": lambda: peft.LoraConfig(modules_to_save=[embedding], **lora),
        "lora_tokens": lambda: peft.LoraConfig(trainable_token_indices={embedding: [5, 7, 60]}, **lora),
        "trainable_tokens": lambda: peft.TrainableTokensConfig(
            target_modules=[embedding], token_indices=[5, 7, 60], **CAUSAL
        ),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=6, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6, **on
        ),
        "vera": lambda: peft.VeraConfig(r=8, target_modules=attention[:1], **CAUSAL),
        "ia3": lambda: peft.IA3Config(target_modules=ia3, feedforward_modules=feedforward, **CAUSAL),
        "loha": lambda: peft.LoHaConfig(**lora),
        "lokr": lambda: peft.LoKrConfig(**lora),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, **on),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, **on),
        "hra": lambda: peft.HRAConfig(**lora),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, **on),
        "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=8, topk=2, **on),
        "ln_tuning": lambda: peft.LNTuningConfig(**CAUSAL),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    }


METHODS = list(methods("llama"))


def config_of(method: str, family: str):
    return methods(family)[method]()


# How the validation runs for each; whatever is not here has the fast path.
GENERIC = {"adalora": "orthogonality penalty", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
ON_BOTH = (
    "lora rslora dora base_bias lora_embedding modules_to_save lora_tokens "
    "adalora vera ia3 loha lokr oft prefix"
).split()


class Watch:
    """W before and after the optimizer's step, and everything that no stage may touch, seen by hooks that run
    before Fast Forward's."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.trainable = {n: p for n, p in trainable.items() if "ranknum" not in n}
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, *_):
        self.previous = {n: p.detach().clone() for n, p in self.trainable.items()}

    def after(self, *_):
        self.stepped = {n: p.detach().clone() for n, p in self.trainable.items()}
        trained = set(map(id, self.trainable.values()))
        rest = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.rest = {n: t.detach().clone() for n, t in rest if id(t) not in trained}
        self.state = copy.deepcopy(self.optimizer.state_dict())
        self.grads = {n: p.grad for n, p in self.trainable.items()}
        self.modes = [m.training for m in self.model.modules()]

    def at(self, tau):
        """W_t + τ·Δ, in float64 and rounded once."""
        return {
            n: (w.double() + tau * (w - self.previous[n]).double()).to(w.dtype)
            for n, w in self.stepped.items()
        }

    def check(self, stage, own_loss, batches, rel):
        kept = {n: p.detach().clone() for n, p in self.trainable.items()}
        for name, expected in self.at(stage.tau).items():
            # Each move rounds base + k·Δ; a search makes about ten of them, the last counts most.
            scale = expected.abs().max() + stage.tau * (self.stepped[name] - self.previous[name]).abs().max()
            assert torch.allclose(
                kept[name], expected, rtol=0, atol=float(8 * scale) * torch.finfo(expected.dtype).eps
            ), name
        try:
            for tau, loss in stage.losses:
                with torch.no_grad():
                    for name, weight in self.at(tau).items():
                        self.trainable[name].copy_(weight)
                assert loss == pytest.approx(own_loss(self.model, batches), rel=rel), tau
        finally:
            with torch.no_grad():
                for name, weight in kept.items():
                    self.trainable[name].copy_(weight)
        assert stage.loss_after == pytest.approx(own_loss(self.model, batches), rel=rel)
        assert stage.loss_after == min(loss for _, loss in stage.losses)

        now = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        assert all(torch.equal(now[name], tensor) for name, tensor in self.rest.items())
        assert [m.training for m in self.model.modules()] == self.modes
        assert all(p.grad is self.grads[n] for n, p in self.trainable.items())
        assert same(self.optimizer.state_dict()["state"], self.state["state"])


@pytest.fixture
def base(tiny_model):
    def build(family, **changes):
        small = SMALL | ({"num_key_value_heads": 2} if family == "llama" else {})
        return tiny_model(family, **(small | changes))

    return build


def adamw(model, lr=3e-3):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def train(model, optimizer, batches, count, after=lambda step: None):
    for step in range(count):
        descend(optimizer, model(**batches[step % len(batches)]).loss)
        after(step)


def check_one_stage(model, padded_batch, own_loss, lr=3e-3, rel=1e-5):
    """Two steps and the stage after them, which is to find something."""
    optimizer, batches = adamw(model, lr), [padded_batch(4, 12, seed=1)]
    watch = Watch(model, optimizer)
    ff = FastForward(model, optimizer, batches, FastForwardConfig(interval=2))
    train(model, optimizer, batches, 2)
    assert ff.stages[0].tau > 0
    watch.check(ff.stages[0], own_loss, batches, rel=rel)
    return ff, watch


CASES = [
    *(("llama", method) for method in METHODS if method != "base_bias"),
    *(("gpt_neox", method) for method in ON_BOTH),
]
# PEFT cannot merge these: prompts are no weights, and a bias has nowhere to go in Llama's layers.
UNMERGED = {("llama", "lora_bias"), ("llama", "prompt"), ("llama", "prefix"), ("gpt_neox", "prefix")}


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_stage_moves_exactly_the_trainable_tensors(base, padded_batch, own_loss, tmp_path, family, method):
    model = peft.get_peft_model(base(family), config_of(method, family))
    optimizer = adamw(model)
    batches = [padded_batch(4, 12, seed=1), padded_batch(2, 12, seed=2)]
    with pytest.warns(FFKernelsNotice, match=GENERIC[method]) if method in GENERIC else nullcontext():
        validation = ValidationLoss(model, batches)
    assert validation.path == ("generic" if method in GENERIC else "fast"), validation.reason

    watch = Watch(model, optimizer)
    ff = FastForward(model, optimizer, validation, FastForwardConfig(interval=2, patience=None))
    assert ff.trainable_numel == sum(p.numel() for p in watch.trainable.values())

    def after(step):
        if len(ff.stages) * 2 == step + 1:
            watch.check(ff.stages[-1], own_loss, batches, rel=1e-5)
        if method == "adalora":  # masks ranks between the steps and fixes them after step 5
            model.base_model.update_and_allocate(step + 1)

    train(model, optimizer, batches, 6 if method == "adalora" else 4, after)
    assert max(stage.tau for stage in ff.stages) >= 2, "nothing was repeated: this row checks nothing"
    ff.detach()

    model.eval()
    logits = logits_of(model, batches[0])
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(family).eval(), tmp_path)
    if method == "adalora":  # saved without the masked ranks: smaller products, other roundings
        assert torch.allclose(logits_of(loaded, batches[0]), logits, rtol=0, atol=1e-5)
    else:
        assert torch.equal(logits_of(loaded, batches[0]), logits)
    if (family, method) not in UNMERGED:
        merged = model.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        assert torch.allclose(logits_of(merged, batches[0]), logits, rtol=1e-4, atol=1e-4)


def test_switching_the_adapter_rebuilds_the_table(base, padded_batch, own_loss):
    model = peft.get_peft_model(base("llama"), config_of("lora", "llama"))
    model.add_adapter("other", config_of("dora", "llama"))
    mine = {a: [p for n, p in model.named_parameters() if f".{a}" in n] for a in ("default", "other")}
    optimizer = torch.optim.AdamW([*mine["default"], *mine["other"]], lr=3e-3)
    batches = [padded_batch(4, 12, seed=1)]
    ff = FastForward(model, optimizer, batches, FastForwardConfig(interval=2))
    sizes = {}
    for turn, adapter in enumerate(("default", "other", "default")):
        resting = [p for a in mine if a != adapter for p in mine[a]]
        before = [p.detach().clone() for p in resting]
        model.set_adapter(adapter)
        told = r"\d+ new, such as '.*\.other\b.*'; \d+ gone, such as '.*\.default\b"
        with pytest.warns(FFKernelsNotice, match=told) if turn == 1 else nullcontext():
            train(model, optimizer, batches, 2)
        stage = ff.stages[-1]
        assert stage.optimizer_step == 2 * turn + 2
        assert stage.tau > 0
        assert stage.loss_after == pytest.approx(own_loss(model, batches), rel=1e-5)
        assert all(torch.equal(p, old) for p, old in zip(resting, before, strict=True))
        sizes.setdefault(adapter, ff.trainable_numel)
        assert ff.trainable_numel == sizes[adapter] == sum(p.numel() for p in mine[adapter])
    assert sizes["default"] != sizes["other"]


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning(base, padded_batch, own_loss, tied):
    model = base("llama", tie_word_embeddings=tied)
    ff, _ = check_one_stage(model, padded_batch, own_loss, lr=1e-3)
    assert ff.trainable_numel == sum(p.numel() for p in model.parameters())


TIED = {
    "tokens": dict(trainable_token_indices=[5, 60]),
    "saved": dict(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "embedding": dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
}


@pytest.mark.parametrize("tied", TIED)
def test_adapters_of_tied_embeddings_move_once(base, padded_batch, own_loss, tied):
    options = dict(r=4, target_modules=["q_proj"], **CAUSAL) | TIED[tied]
    if "ensure_weight_tying" in options and not hasattr(peft.LoraConfig, "ensure_weight_tying"):
        pytest.skip("this PEFT does not tie adapters")
    model = peft.get_peft_model(base("llama", tie_word_embeddings=True), peft.LoraConfig(**options))
    check_one_stage(model, padded_batch, own_loss)


def test_a_model_without_trainable_weights_is_refused(base, padded_batch):
    model = peft.get_peft_model(base("llama"), config_of("lora", "llama"))
    optimizer = adamw(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter \(requires_grad is False on all of them\)"):
        FastForward(model, optimizer, [padded_batch(2, 12)])


@pytest.mark.filterwarnings("ignore:AdaLoRA's ranknum is trainable here")
@pytest.mark.parametrize("method", ["lora", "dora", "modules_to_save", "adalora"])
def test_a_sixteen_bit_base_under_float32_adapters(base, padded_batch, own_loss, method):
    model = peft.get_peft_model(base("llama").bfloat16(), config_of(method, "llama"))
    _, watch = check_one_stage(model, padded_batch, own_loss, rel=2e-2)
    assert torch.float32 in {p.dtype for p in watch.trainable.values()}


def test_sixteen_bit_adapters_are_warned_about_and_exact(base, padded_batch, own_loss):
    model = peft.get_peft_model(
        base("llama").bfloat16(), config_of("lora", "llama"), autocast_adapter_dtype=False
    )
    optimizer = adamw(model, lr=1e-2)
    batches = [padded_batch(4, 12, seed=1)]
    with pytest.warns(FFKernelsNotice, match=r"some trainable weights are torch.bfloat16"):
        ff = FastForward(model, optimizer, batches, FastForwardConfig(interval=2))
    train(model, optimizer, batches, 2)
    assert ff.stages[0].tau > 0
    assert ff.stages[0].loss_after == float(ff.validation())
    assert ff.stages[0].loss_after == pytest.approx(own_loss(model, batches), rel=2e-2)
