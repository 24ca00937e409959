"""The validation loss on a GPU: captured it is the eager one, lean in memory, causal without a mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ffkernels.graphs.check import loss_tolerance
from ffkernels.graphs.rules import why_not_captured
from ffkernels.graphs.token import describe_change, token
from ffkernels.validation.evaluator import evaluation_mode
from ffkernels.validation.loss import ValidationLoss

pytestmark = pytest.mark.gpu

VOCABULARY = 503
FAMILIES = ["Llama", "GPTNeoX", "Qwen3", "Gemma2", "Mixtral"]
# What fused attention kernels are called; and what would have to run to make or apply a mask.
FUSED = ("flash", "fmha", "efficient", "sdpa")
MASKING = ("where_kernel", "masked_fill", "triu_tril", "index_put", "bitwise_and")


def build(family: str, device: torch.device, dtype=torch.float32, **changes):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if family == "GPTNeoX":
        sizes = {key: value for key, value in sizes.items() if key not in ("num_key_value_heads", "head_dim")}
    if family == "Mixtral":
        sizes |= dict(num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(sizes | changes))
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.to(dtype)


def with_lora(model, targets=("q_proj", "o_proj"), **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=list(targets), init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def batch(rows: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY, ragged: bool = True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows if ragged else 0):
        kept = int(torch.randint(length // 4, length + 1, (), generator=generator))
        ids[row, kept:], mask[row, kept:], labels[row, kept:] = 0, 0, -100
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def on(device: torch.device, examples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in examples.items()}


def own_loss(model, examples, device) -> float:
    with evaluation_mode(model, device):
        return float(model(**on(device, examples)).loss)


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the device raises here."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Captured:
    """A capture of `validation.evaluate_with_sums()`; calling it replays it and returns the loss."""

    def __init__(self, validation: ValidationLoss) -> None:
        self.validation, self.graph = validation, None
        device = validation.device
        if device.type != "cuda":
            return
        stream, self.graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        with evaluation_mode(validation.model, device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                validation.evaluate_with_sums()
                with no_waiting():
                    validation.evaluate_with_sums()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream):
                self.loss, self.sums = validation.evaluate_with_sums()

    def __call__(self) -> float:
        if self.graph is None:
            self.loss, self.sums = self.validation.measure()
        else:
            self.graph.replay()
        loss = float(self.loss)
        assert float(self.sums.sum() / self.validation.example_tokens.sum()) == pytest.approx(loss, rel=1e-12)
        return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_loss_is_the_eager_one(family, device):
    if family == "Mixtral" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("grouped products read their group sizes on the host here")
    # The grouped product of experts exists for 16-bit weights only.
    dtype = torch.bfloat16 if family == "Mixtral" else torch.float32
    model = build(family, device, dtype)
    examples = batch(16, 200)
    validation = ValidationLoss(model, [examples])
    assert validation.path == "fast", validation.reason
    assert why_not_captured(validation, device, explicit=False) is None
    replay, eager = Captured(validation), float(validation())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert replay() == pytest.approx(eager, rel=tolerance)
    by_example = validation.measure()[1].tolist()
    assert replay.sums.tolist() == pytest.approx(by_example, rel=10 * tolerance)
    if dtype == torch.float32:
        assert eager == pytest.approx(own_loss(model, examples, device), rel=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    moved = float(validation())
    assert abs(moved - eager) > 1e-4
    assert replay() == pytest.approx(moved, rel=tolerance)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16 base", "autocast"])
def test_moved_adapters_are_seen_by_a_replay(kind, precision, device):
    model = build("Llama", device, torch.bfloat16 if precision == "bf16 base" else torch.float32)
    model = with_lora(model, use_dora=kind == "dora", use_rslora=kind == "rslora")
    moving = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in moving} == {torch.float32}
    validation = ValidationLoss(model, [batch(8, 100)])
    enabled = precision == "autocast"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        model(**on(device, batch(2, 32))).loss.backward()  # fills the cache of casts
        replay = Captured(validation)
        for factor in (1.0, 1.5, 2.0):
            with torch.no_grad():
                for parameter in moving:
                    parameter.mul_(factor)
            tolerance = 1e-5 if precision == "fp32" else 2e-3
            assert replay() == pytest.approx(float(validation()), rel=tolerance)


def test_peak_memory_is_a_third_of_the_models_own(gpu):
    vocabulary = 128_256
    # Full logits of 32 rows want about 60 GB, in 16 bits, in fp32 and as log-probabilities.
    rows = 32 if torch.cuda.get_device_properties(gpu).total_memory > 70 << 30 else 8
    model = build(
        "Llama", gpu, torch.bfloat16, vocab_size=vocabulary, hidden_size=512, intermediate_size=1024
    )
    examples = batch(rows, 1024, vocabulary=vocabulary, ragged=False)
    validation = ValidationLoss(model, [examples])
    assert validation.path == "fast", validation.reason

    def peak(call) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(gpu) - before

    validation()
    ours = peak(validation)
    with_graph = peak(lambda: Captured(validation)())
    theirs = peak(lambda: own_loss(model, examples, gpu))
    print(f"peak memory of {rows} × 1024: {ours / 1e9:.2f} GB, captured {with_graph / 1e9:.2f} GB, ", end="")
    print(f"the model's own loss {theirs / 1e9:.2f} GB")
    assert ours <= 0.35 * theirs
    assert with_graph <= 0.35 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Qwen3"])
def test_a_replay_runs_fused_causal_attention_and_makes_no_mask(family, dtype, gpu):
    model = build(family, gpu, dtype)
    replay = Captured(ValidationLoss(model, [batch(8, 256)]))
    replay()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        replay()
        torch.cuda.synchronize()
    kernels = [event.name.lower() for event in seen.events() if event.device_type.name == "CUDA"]
    attention = [name for name in kernels if any(word in name for word in FUSED)]
    assert len(attention) >= 2, sorted(set(kernels))
    assert not [name for name in kernels if any(word in name for word in MASKING)]


def of_the_trainer():
    torch.backends.fp32_precision = "tf32"


def of_the_old_interface():
    torch.set_float32_matmul_precision("high")


def of_the_products():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("switch", [of_the_trainer, of_the_old_interface, of_the_products])
def test_tf32_is_allowed_for_however_it_was_switched_on(switch, device, default_precision):
    model, examples = build("Llama", device, hidden_size=256), batch(16, 200)
    exact = float(ValidationLoss(model, [examples])())
    before = token(ValidationLoss(model, lambda model: 0.0))
    switch()
    validation = ValidationLoss(model, [examples])  # compared with the model's own loss
    assert validation.path == "fast", validation.reason
    assert loss_tolerance(validation, device) == (1e-4 if device.type == "cuda" else 1e-5)
    rounded = float(validation())
    assert rounded == pytest.approx(exact, rel=2e-3)
    if device.type == "cuda":
        assert rounded != exact
    assert Captured(validation)() == pytest.approx(rounded, rel=1e-4)
    other = ValidationLoss(model, lambda model: 0.0)
    assert "IEEE float32 → TF32" in describe_change(before, token(other))


def test_a_small_deep_model_is_run_in_one_forward(gpu):
    model = build("Llama", gpu, torch.bfloat16, num_hidden_layers=12)
    examples = [batch(8, length, ragged=False) for length in (16, 64, 128, 256)]
    assert len(ValidationLoss(model, examples).labelled.micro_batches) == 1


def test_nothing_waits_for_the_device(gpu):
    validation = ValidationLoss(with_lora(build("Llama", gpu)), [batch(8, 100)])
    with evaluation_mode(validation.model, gpu):
        validation.evaluate_with_sums()
        with no_waiting():
            validation.evaluate_with_sums()


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_swapped_examples_keep_a_capture_valid(family, device):
    model = build(family, device)
    first = batch(16, 160, seed=1)
    validation = ValidationLoss(model, [first])
    before, replay = token(validation), Captured(validation)
    old = replay()
    second = {key: value[:11, :120].clone() for key, value in first.items()}
    real = second["attention_mask"].bool()
    second["input_ids"][real] = (second["input_ids"][real] * 3 + 1) % (VOCABULARY - 3) + 3
    scored = second["labels"] != -100
    second["labels"][scored] = second["input_ids"][scored]
    assert validation.swap_batch([second]) is True
    assert token(validation) == before
    other = ValidationLoss(model, [second])
    fresh = float(other())
    assert abs(fresh - old) > 1e-4
    assert replay() == pytest.approx(fresh, rel=1e-5)
    found = sorted(zip(validation.example_tokens.tolist(), replay.sums.tolist(), strict=True))
    expected = zip(other.example_tokens.tolist(), other.measure()[1].tolist(), strict=True)
    assert found[:5] == [(0.0, 0.0)] * 5  # 16 rows, of which 11 hold an example now
    for ours, theirs in zip(found[5:], sorted(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert validation.swap_batch([first]) is True
    assert replay() == pytest.approx(old, rel=1e-6)
    assert validation.swap_batch([batch(20, 300, seed=2)]) is False
    assert "buffers were rebuilt" in describe_change(before, token(validation))
