"""Under capture the fast path runs what it runs otherwise: causal attention, no mask, nothing read back."""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ffkernels.graphs import rules as capture_rules
from ffkernels.graphs.rules import why_not_captured
from ffkernels.validation import fast as validation_fast
from ffkernels.validation import maskless_attention as module
from ffkernels.validation.evaluator import evaluation_mode
from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.maskless_attention import (
    PRIVATE_NAME,
    attends_eagerly,
    attention_configs,
    causal_mask,
    maskless_attention,
)

# Operators that read from the device, size their result by values, or bring constants from the host.
FORBIDDEN = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "unique", "_unique2", "masked_select",
    "lift_fresh", "lift_fresh_copy", "rand", "randn", "bernoulli_", "native_dropout",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts operators, and the tensors made of shape (rows, …, length, length) with several rows."""

    def __init__(self, rows: int, length: int):
        super().__init__()
        self.rows, self.length = rows, length
        self.counts, self.masks = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4:
                batch, heads, *square = tensor.shape
                self.masks += square == [self.length] * 2 and batch == self.rows and heads == 1
        return out


@contextmanager
def capturing():
    """Let transformers believe that the current stream is being captured."""
    import transformers.utils.import_utils as checks

    with (
        mock.patch.object(checks, "is_cuda_stream_capturing", lambda: True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        assert checks.is_tracing(), "transformers asks in another way now whether a stream is captured"
        yield


@contextmanager
def attention_calls():
    """Records (mask, is_causal, enable_gqa, key heads) of every scaled_dot_product_attention."""
    real, calls = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        shape = None if attn_mask is None else tuple(attn_mask.shape)
        calls.append((shape, is_causal, options.get("enable_gqa", False), key.shape[1]))
        return real(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options
        )

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", spy):
        yield calls


CPU = torch.device("cpu")
ROWS, LENGTH = 3, 13
SDPA = [
    "llama", "gpt_neox", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "gemma3", "opt", "phi", "phi3",
    "olmo2", "stablelm", "starcoder2", "mixtral", "qwen3_moe", "olmoe",
]  # fmt: skip
# Their attention scores are capped or have sinks, or they have no other attention.
EAGER = ["gemma2", "gptj", "gpt_oss"]
KEY_HEADS = dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "mixtral", "qwen3_moe"), 2)
KEY_HEADS["gemma"] = 1


def batches():
    ids = torch.randint(3, 97, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def run(validation):
    """(loss, operators, attention calls) of one bare evaluation, the lazily built buffers made before."""
    with evaluation_mode(validation.model, CPU):
        validation.evaluate()
        with Operators(ROWS, LENGTH) as operators, attention_calls() as calls:
            loss = validation.evaluate()
    return loss, operators, calls


@pytest.mark.parametrize("family", SDPA + EAGER)
def test_a_capture_records_what_runs_otherwise(family, tiny_model):
    validation = ValidationLoss(tiny_model(family), batches())
    assert validation.path == "fast", validation.reason
    plain, operators, calls = run(validation)
    with capturing():
        captured, recorded, recorded_calls = run(validation)
    assert torch.equal(plain, captured)
    assert recorded.counts == operators.counts
    assert recorded_calls == calls
    assert not recorded.counts.keys() & FORBIDDEN
    assert recorded.masks == 0
    assert why_not_captured(validation, CPU, explicit=False) is None
    if family in SDPA:
        heads = KEY_HEADS.get(family, 4)
        assert calls == [(None, True, heads < 4, heads)] * 2
    else:
        assert not calls and all(mask.shape[0] == 1 for mask in validation._loss._masks.values())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_without_the_private_name_a_capture_has_a_mask(family, tiny_model, monkeypatch):
    """When this fails, transformers has changed and the private name may not be needed any more."""
    monkeypatch.setattr(validation_fast, "maskless_attention", lambda *_: nullcontext())
    validation = ValidationLoss(tiny_model(family), batches())
    _, operators, calls = run(validation)
    assert "_local_scalar_dense" in operators.counts  # position ids are looked at, by the host
    assert [call[:2] for call in calls] == [(None, True)] * 2
    with capturing():
        _, operators, calls = run(validation)
    assert [call[:3] for call in calls] == [((ROWS, 1, LENGTH, LENGTH), False, False)] * 2
    assert operators.masks > 0


def test_eager_attention_would_make_its_own_mask(tiny_model):
    """When this fails, eager attention needs no mask given any more."""
    model = tiny_model("gemma2")
    given = ValidationLoss(model, batches())
    assert given.causal_lm.given_mask
    own = ValidationLoss(model, batches(), check=False)
    assert not own.causal_lm.given_mask
    loss, operators, _ = run(given)
    other, own_operators, _ = run(own)
    assert torch.equal(loss, other)
    assert "_local_scalar_dense" in own_operators.counts
    assert sum(operators.counts.values()) < sum(own_operators.counts.values())
    with capturing():
        assert run(own)[1].masks > 0


def test_a_given_mask_that_the_model_cannot_take_is_not_given(tiny_model):
    validation = ValidationLoss(
        tiny_model("bloom"), batches()
    )  # makes its position biases of the mask's rows
    assert validation.path == "fast", validation.reason
    assert not validation.causal_lm.given_mask


def test_masks_follow_the_attention_implementation(tiny_model, own_loss):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    validation = ValidationLoss(model, batches())
    assert validation.causal_lm.given_mask
    eager = float(validation())
    assert eager == pytest.approx(own_loss(model, batches()), rel=2e-6)
    model.set_attn_implementation("sdpa")
    _, _, calls = run(validation)
    assert [call[:2] for call in calls] == [(None, True)] * 2
    assert float(validation()) == pytest.approx(eager, rel=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_in_a_loop_are_refused_by_name(family, tiny_model):
    model = tiny_model(family)
    validation = ValidationLoss(model, batches())
    plain = float(validation())
    model.set_experts_implementation("eager")
    assert float(validation()) == pytest.approx(plain, rel=1e-5)
    assert run(validation)[1].counts["nonzero"] > 0
    reason = why_not_captured(validation, CPU, explicit=False)
    assert "Experts loops over the experts" in reason and "grouped_mm" in reason


def test_grouped_products_run_without_the_host_in_bfloat16_on_hopper_only(tiny_model, monkeypatch):
    modules = list(tiny_model("mixtral").modules())

    def refused(device):
        return next(filter(None, (capture_rules._experts(module, device) for module in modules)), None)

    gpu = torch.device("cuda", 0)
    for dtype, capability, captured in [
        (torch.bfloat16, (9, 0), True),
        (torch.bfloat16, (8, 0), False),
        (torch.float32, (9, 0), False),
    ]:
        modules[0].to(dtype)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (refused(gpu) is None) == captured
        assert refused(CPU) is None
    assert "bfloat16 on such a GPU" in refused(gpu)


@pytest.mark.parametrize("kind", ["flex_attention", "flash_attention_2"])
def test_other_attention_implementations_are_refused_by_name(kind, tiny_model):
    model = tiny_model("llama")
    validation = ValidationLoss(model, batches())
    model.config._attn_implementation_internal = kind
    reason = why_not_captured(validation, CPU, explicit=True)
    assert kind in reason and 'attn_implementation="sdpa"' in reason


def test_a_causal_mask():
    mask = causal_mask(3, torch.float16, CPU)
    least = torch.finfo(torch.float16).min
    assert mask.shape == (1, 1, 3, 3) and mask.dtype == torch.float16
    assert mask[0, 0].tolist() == [[0, least, least], [0, 0, least], [0, 0, 0]]


@pytest.mark.parametrize("raises", [False, True])
def test_names_and_methods_come_back(raises, tiny_model):
    model = tiny_model("llama")
    configs = attention_configs(model.model)
    assert model.config in configs and not attends_eagerly(configs)
    model.model.warn_if_padding_and_no_attention_mask = mock.Mock()
    own = model.model.warn_if_padding_and_no_attention_mask
    with pytest.raises(KeyError) if raises else nullcontext(), maskless_attention(model.model, configs):
        assert model.config._attn_implementation == PRIVATE_NAME
        if raises:
            raise KeyError
    assert model.config._attn_implementation == "sdpa"
    assert model.model.warn_if_padding_and_no_attention_mask is own
    assert "warn_if_padding_and_no_attention_mask" not in vars(tiny_model("llama").model)


def test_no_table_no_trick(monkeypatch, tiny_model):
    model = tiny_model("llama")
    monkeypatch.setattr(sys.modules["transformers.modeling_utils"], "ALL_ATTENTION_FUNCTIONS", None)
    assert attention_configs(model.model) == []
    assert not attends_eagerly([])


def on_every_device(key):
    """The rule of `_no_fused_kernel_takes_groups`, for tensors on the CPU too."""
    return key.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")


GROUPED = [family for family, heads in KEY_HEADS.items() if heads < 4]


@pytest.mark.parametrize("family", GROUPED)
def test_repeated_keys_are_the_grouped_ones(family, tiny_model, own_loss, monkeypatch):
    model = tiny_model(family)
    validation = ValidationLoss(model, batches())
    grouped, _, calls = run(validation)
    assert calls == [(None, True, True, KEY_HEADS[family])] * 2
    monkeypatch.setattr(module, "_no_fused_kernel_takes_groups", on_every_device)
    repeated, _, calls = run(validation)
    assert calls == [(None, True, False, 4)] * 2
    assert float(repeated) == pytest.approx(float(grouped), rel=2e-7)
    assert float(repeated) == pytest.approx(own_loss(model, batches()), rel=2e-6)
    model.to(torch.bfloat16)
    repeated, _, calls = run(validation)
    assert calls == [(None, True, True, KEY_HEADS[family])] * 2
    monkeypatch.undo()
    assert torch.equal(repeated, run(validation)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_private_function_is_transformers_own(dtype, masked, tiny_model, monkeypatch):
    layer = tiny_model("llama").eval().model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 16)]
    given = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    given.append(torch.ones(1, 1, 8, 8, dtype=torch.bool).tril() if masked else None)
    functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    with torch.no_grad(), attention_calls() as calls:
        wanted, _ = functions["sdpa"](layer, *given, dropout=0.0, scaling=0.3)
        here, _ = functions[PRIVATE_NAME](layer, *given, dropout=0.0, scaling=0.3)
        monkeypatch.setattr(module, "_no_fused_kernel_takes_groups", on_every_device)
        there, _ = functions[PRIVATE_NAME](layer, *given, dropout=0.0, scaling=0.3)
    assert torch.equal(here, wanted) and calls[1] == calls[0]
    if masked or dtype == torch.bfloat16:
        assert torch.equal(there, wanted) and calls[2] == calls[0]
    else:
        assert calls[0][2:] == (True, 2) and calls[2][2:] == (False, 4)
        torch.testing.assert_close(there, wanted, rtol=1e-6, atol=1e-6)


def test_on_cuda_keys_are_repeated_in_float32_only(tiny_model):
    """Tensors without data, which say that they are on a GPU."""
    layer, seen = tiny_model("llama").model.layers[0].self_attn, []

    def sdpa(layer, query, key, value, mask):
        seen.append((getattr(layer, "num_key_value_groups", 1), key.shape[1], value.shape[1]))
        assert layer.is_causal

    def call(dtype, mask=None, device="cuda"):
        query, key, value = (torch.empty(2, n, 8, 16, dtype=dtype, device=device) for n in (4, 2, 2))
        module._fused(sdpa)(layer, query, key, value, mask)

    with FakeTensorMode():
        call(torch.float32)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            call(dtype)
        with mock.patch.object(torch, "is_autocast_enabled", lambda kind: kind == "cuda"):
            call(torch.float32)
        call(torch.float32, torch.ones(1, 1, 8, 8, dtype=torch.bool, device="cuda"))
        call(torch.float32, device="cpu")
    assert seen == [(1, 4, 4)] + [(2, 2, 2)] * 6


def test_repeated_keys_are_compiled_with_their_layer(tiny_model, monkeypatch):
    """A class that Dynamo cannot make would cut the layer in two."""
    monkeypatch.setattr(module, "_no_fused_kernel_takes_groups", on_every_device)
    model = tiny_model("llama")
    validation = ValidationLoss(model, batches())
    plain = float(validation())
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert float(validation()) == pytest.approx(plain, rel=1e-6)
