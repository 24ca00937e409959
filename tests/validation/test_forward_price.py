"""What a forward is taken to cost: by the model on CUDA, from its structure alone; fixed elsewhere."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ffkernels.validation import fast as validation_fast
from ffkernels.validation import forward_price as module
from ffkernels.validation import shared as validation_shared
from ffkernels.validation.batches import Example
from ffkernels.validation.causal_lm import find_causal_lm
from ffkernels.validation.evaluator import evaluation_mode
from ffkernels.validation.forward_price import forward_price, operations
from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.maskless_attention import attention_configs, maskless_attention
from ffkernels.validation.micro_batches import plan_micro_batches

CPU, GPU = torch.device("cpu"), torch.device("cuda")
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Operations(TorchDispatchMode):
    """Counts the operators that compute: no views, and nothing that only makes room."""

    ROOM = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        self.count += not view and func.overloadpacket.__name__ not in self.ROOM
        return func(*args, **(kwargs or {}))


def counted(model) -> int:
    lm, ids = find_causal_lm(model), torch.ones(2, 13, dtype=torch.int64)
    configs = attention_configs(lm.backbone)
    with evaluation_mode(model, CPU), maskless_attention(lm.backbone, configs), Operations() as found:
        lm.backbone(input_ids=ids, use_cache=False)
    return found.count


def adapted(model, targets, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=targets, **options)
    return peft.get_peft_model(model, config)


CASES = [
    ("gpt_neox", None), ("llama", None), ("qwen2", None), ("qwen3", None), ("gemma", None), ("gemma3", None),
    ("phi", None), ("olmo2", None), ("starcoder2", None), ("mixtral", None), ("qwen3_moe", None),
    ("gpt_neox", {}), ("gpt_neox", {"use_dora": True}), ("llama", {}), ("llama", {"use_dora": True}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_operations_are_estimated_within_a_third(family, adapter, dtype, tiny_model):
    model = tiny_model(family, num_hidden_layers=6).to(dtype)
    if adapter is not None:  # its weights are float32, whatever the others are
        model = adapted(model, ["query_key_value"] if family == "gpt_neox" else QKVO, **adapter)
    assert operations(find_causal_lm(model)) == pytest.approx(counted(model), rel=0.3)


def on_meta(name, dtype=torch.bfloat16, **sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def smollm2(dtype=torch.bfloat16):
    return on_meta(
        "Llama", dtype, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip


def llama3_8b(dtype=torch.bfloat16):
    return on_meta(
        "Llama", dtype, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip


def price(model) -> int:
    return forward_price(find_causal_lm(model), GPU)


def lengths(longest: int) -> list[int]:
    """32 of a sixteenth to the whole, two fifths on average, as the stage benchmark's."""
    return [max(longest // 16, round(longest * (i / 31) ** 1.7)) for i in range(32)]


def forwards(longest: int, cost: int) -> int:
    return len(plan_micro_batches(lengths(longest), 16384, cost))


def test_a_small_deep_model_gets_one_forward():
    cost = price(adapted(smollm2(), QKVO))
    # 1,780 operations of 3 µs and 0.27 GB against 2 · 107 million / 495 TFLOP/s per token.
    assert cost == pytest.approx((1780 * 3e-6 + 0.273e9 / 3.35e12) / (2 * 107.1e6 / 494.5e12), rel=0.01)
    assert [forwards(longest, cost) for longest in (64, 256, 1024)] == [1, 1, 2]
    assert [forwards(longest, 512) for longest in (64, 256, 1024)] == [2, 3, 6]


def test_a_large_model_keeps_its_short_forwards():
    cost = price(adapted(llama3_8b(), QKVO))
    assert cost == pytest.approx((1897 * 3e-6 + 15.04e9 / 3.35e12) / (2 * 6.986e9 / 494.5e12), rel=0.01)
    assert 256 < cost < 512
    assert [forwards(longest, cost) for longest in (256, 1024)] == [4, 7]
    assert [forwards(longest, 512) for longest in (256, 1024)] == [3, 6]

    def tokens(planned_with):
        groups = plan_micro_batches(lengths(1024), 16384, planned_with)
        return sum(len(group) * max(lengths(1024)[i] for i in group) + cost for group in groups)

    assert tokens(512) == pytest.approx(tokens(cost), rel=0.01)


def test_the_price_falls_with_what_a_token_takes(default_precision):
    slow = price(smollm2(torch.float32))
    torch.backends.fp32_precision = "tf32"
    with_tf32 = price(smollm2(torch.float32))
    fast = price(smollm2())
    assert with_tf32 / slow == pytest.approx(495 / 67, rel=2e-3)
    assert fast / with_tf32 == pytest.approx(989 / 495, rel=0.03)  # and half the bytes
    assert price(smollm2()) == fast


def test_autocast_around_the_model_decides_the_type(tiny_model):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    model = tiny_model("llama")
    plain = price(model)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny_model("llama"))
    assert price(prepared) / plain == pytest.approx(989 / 67, rel=1e-2)


def test_experts_count_by_those_that_a_token_meets():
    sizes = dict(
        vocab_size=32000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    lm = find_causal_lm(on_meta("Mixtral", **sizes))
    expert, attention, router = 3 * 1024 * 3584, 1024 * (2 * 1024 + 2 * 256), 8 * 1024
    assert module._weights_per_token(lm) == {torch.bfloat16: 4 * (2 * expert + attention + router)}
    norms = (4 * 2 + 1) * 1024
    read = 4 * (8 * expert + attention + router) + norms + 32000 * 1024
    assert module._bytes_read(lm) == 2 * read


class Packed(nn.Linear):
    """Two weights in a byte, as 4-bit layers have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed = torch.empty(self.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_packed_weights_are_counted_as_what_they_stand_for():
    plain = price(llama3_8b())
    model = llama3_8b()
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, Packed(linear))
    lm = find_causal_lm(model)
    assert module._weights_per_token(lm) == {torch.bfloat16: 32 * (4096 * (2 * 4096 + 2 * 1024 + 3 * 14336))}
    # A quarter of the bytes but for the head, 1.05 GB; as many operations.
    assert operations(lm) == operations(find_causal_lm(llama3_8b()))
    assert price(model) - plain == pytest.approx(-0.75 * 13.96e9 / 3.35e12 / (2 * 6.98e9 / 494.5e12), abs=2)


def test_nothing_is_run_to_find_the_price(tiny_model, monkeypatch):
    model = tiny_model("llama")
    found = price(model)
    monkeypatch.setattr(type(model.model), "forward", None)
    assert price(model) == found


def test_elsewhere_the_price_is_fixed(tiny_model):
    lm = find_causal_lm(tiny_model("llama"))
    assert forward_price(lm, CPU) == forward_price(None, CPU) == 48
    assert forward_price(lm, torch.device("mps")) == forward_price(None, GPU) == 512


@pytest.mark.parametrize(("cost", "cut"), [(1, 4), (1 << 20, 1)])
def test_examples_are_cut_by_the_price(cost, cut, tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        validation_fast, "forward_price", lambda lm, device: asked.append((lm.head, device)) or cost
    )
    ids = [torch.randint(3, 97, (1, length)) for length in (8, 16, 32, 64)]
    model = tiny_model("llama")
    validation = ValidationLoss(model, [{"input_ids": row, "labels": row} for row in ids])
    assert len(validation._loss.micro_batches) == cut
    assert asked == [(model.lm_head, CPU)]


def test_ranks_share_by_the_price_of_the_model(tiny_model, monkeypatch):
    lm, asked = find_causal_lm(tiny_model("llama")), []

    def dear(lm, device):
        asked.append((lm.head, device))
        return 1 << 20

    monkeypatch.setattr(validation_shared, "forward_price", dear)
    monkeypatch.setattr(validation_fast, "forward_price", dear)
    examples = [Example(torch.arange(1, n), torch.arange(1, n)) for n in (8, 9, 10, 64)]
    ranks = SimpleNamespace(size=2, rank=0, forward_is_collective=True)
    loss = validation_shared.shared_labelled_loss(ranks, lm, examples, 2048, CPU)
    assert loss.example_counts == [6, 7, 8, 62]
    assert set(asked) == {(lm.head, CPU)} and len(asked) == 3  # the ranks' shares, this one's, its company
