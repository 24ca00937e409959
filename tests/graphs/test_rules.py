"""What keeps a loss out of a graph, and what a token of a captured forward sees and does not see."""

import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ffkernels.graphs.rules import why_not_captured
from ffkernels.graphs.token import describe_change, evaluated_modules, referred, token
from ffkernels.validation.evaluator import evaluation_mode
from ffkernels.validation.loss import ValidationLoss

CPU = torch.device("cpu")


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    settings = dict(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM") | options
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@pytest.fixture
def lora(tiny_model, padded_batch):
    model = adapted(tiny_model("llama"))
    return model, ValidationLoss(model, [padded_batch(3, 12)])


def reason(validation, explicit=False, device=CPU):
    return why_not_captured(validation, device, explicit=explicit)


def test_a_plain_model_and_an_adapted_one_may_be_captured(lora, tiny_model, padded_batch):
    assert reason(lora[1]) is None
    for family in ("gpt_neox", "gpt2", "qwen3", "gemma2"):
        assert reason(ValidationLoss(tiny_model(family), [padded_batch(3, 12)])) is None


def test_other_paths_only_when_asked_for(padded_batch, tiny_model):
    model = tiny_model("llama")
    free = ValidationLoss(model, lambda m: m(**padded_batch(2, 8)).loss)
    assert "callable path" in reason(free) and 'executor="step_graph"' in reason(free)
    assert reason(free, explicit=True) is None
    batch = padded_batch(2, 8) | {"position_ids": torch.arange(8).expand(2, 8)}
    with pytest.warns(UserWarning, match="position_ids"):
        general = ValidationLoss(model, [batch])
    assert "generic path" in reason(general) and "position_ids" in reason(general)
    assert reason(general, explicit=True) is None


def test_the_reason_for_the_generic_path_is_named(tiny_model, padded_batch):
    with pytest.warns(UserWarning, match="sliding_window"):
        narrow = ValidationLoss(tiny_model("mistral", sliding_window=6), [padded_batch(4, 20)])
    assert "sliding_window = 6 is shorter" in reason(narrow)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    growing = tiny_model("llama", rope_parameters=rope, max_position_embeddings=12)
    with pytest.warns(UserWarning, match="rotary"):
        validation = ValidationLoss(growing, [padded_batch(4, 20)])
    assert "rotary embedding changes" in reason(validation)
    assert "rotary embedding (dynamic)" in reason(validation, explicit=True)


def test_several_processes(lora, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert "4 processes" in reason(lora[1]) and "one process" in reason(lora[1])
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert reason(lora[1]) is None


def test_accelerates_hooks(tiny_model, padded_batch, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    batches = [padded_batch(3, 12)]
    offloaded = tiny_model("llama")
    validation = ValidationLoss(offloaded, batches)
    accelerate.cpu_offload(offloaded, execution_device=CPU)
    assert "AlignDevicesHook" in reason(validation) and "device_map" in reason(validation)

    from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules

    aligned = tiny_model("llama")
    validation = ValidationLoss(aligned, batches)
    attach_align_device_hook(aligned, execution_device=CPU)
    assert "AlignDevicesHook" in reason(validation)
    remove_hook_from_submodules(aligned)
    assert reason(validation) is None

    spread = tiny_model("llama")
    validation = ValidationLoss(spread, batches)
    layers = {f"model.layers.{i}": "cpu" for i in range(2)}
    map_ = {"model.embed_tokens": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = dict(device_map=layers | map_, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    accelerate.dispatch_model(spread, **options)
    assert "Hook" in reason(validation)


def on_the_meta_device(model):
    layer = model.get_base_model().model.layers[1].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.to("meta"))


def fsdp(model):
    model.__class__ = type("FSDPPeft", (type("FSDPModule", (), {}), type(model)), {})


def zero_3(model):
    model.get_base_model().model.norm.weight.ds_id = 3


def eight_bit(model):
    model.get_base_model().model.layers[0].mlp.up_proj.__class__ = type("Linear8bitLt", (nn.Linear,), {})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (on_the_meta_device, ["Linear.weight is on the meta device"]),
        (fsdp, ["FSDP"]),
        (zero_3, ["ZeRO-3", "train with DDP"]),
        (eight_bit, ["8-bit", "4 bit"]),
    ],
)
def test_weights_that_are_not_there_as_they_are(make, told, lora):
    model, validation = lora
    make(model)
    assert all(words in reason(validation) for words in told)


def test_distributed_tensors(tiny_model, padded_batch):
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = tiny_model("llama")
    validation = ValidationLoss(model, [padded_batch(3, 12)])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Replicate()])
        model.lm_head.weight = nn.Parameter(weight)
        assert "lm_head.weight is a DTensor" in reason(validation)
        assert token(validation) == token(validation)
    finally:
        dist.destroy_process_group()


def test_compiled_parts(tiny_model, padded_batch):
    batches = [padded_batch(3, 12)]
    whole = torch.compile(tiny_model("llama"))
    assert reason(ValidationLoss(whole, batches, check=False)) is None  # looked through

    in_place = tiny_model("llama")
    validation = ValidationLoss(in_place, batches)
    in_place.compile()
    assert reason(validation) is None  # its forward is not what runs
    in_place.model.layers[0].compile()
    assert "LlamaDecoderLayer inside the model is compiled" in reason(validation)

    wrapped = tiny_model("llama")
    validation = ValidationLoss(wrapped, batches)
    wrapped.model.layers[1].mlp = torch.compile(wrapped.model.layers[1].mlp)
    assert "compiled" in reason(validation)

    method = tiny_model("llama")
    validation = ValidationLoss(method, batches)
    method.model.norm.forward = torch.compile(method.model.norm.forward)
    assert "LlamaRMSNorm inside the model is compiled" in reason(validation)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "linear", "yarn", "llama3"])
def test_rotary_embeddings(kind, tiny_model, padded_batch):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    validation = ValidationLoss(tiny_model("llama", rope_parameters=rope), [padded_batch(3, 12)])
    if kind in ("dynamic", "longrope"):
        assert f"rotary embedding ({kind})" in reason(validation)
    else:
        assert reason(validation) is None


def test_another_device(lora):
    found = reason(lora[1], device=torch.device("cuda", 0))
    assert "the model is on cpu" in found and "on cuda:0" in found


def test_the_modules_are_those_that_run(lora):
    model, validation = lora
    ran = set()
    handles = [module.register_forward_hook(lambda module, *_: ran.add(module)) for module in model.modules()]
    with evaluation_mode(model, CPU):
        validation.evaluate()
    for handle in handles:
        handle.remove()
    found = evaluated_modules(validation)
    assert ran <= set(found)
    assert len(found) == len(set(found))
    assert model not in found and model.get_base_model() not in found


def q_proj(model):
    return model.get_base_model().model.layers[0].self_attn.q_proj


def load_assigned(model):
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def new_data(model):
    weight = q_proj(model).lora_A["default"].weight
    weight.data = weight.data.clone()


def rope_buffer(model):
    rotary = model.get_base_model().model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()


# Changes to an adapted model that a captured forward cannot follow, and words of their descriptions.
CHANGES = {
    "set_adapter": (lambda m: m.set_adapter("other"), "the active adapter"),
    "disable": (lambda m: m.base_model.disable_adapter_layers(), "switched off or on (False → True)"),
    "merge": (lambda m: m.merge_adapter(), "merged or unmerged"),
    "set_scale": (lambda m: q_proj(m).set_scale("default", 3.0), "scaling"),
    "scale_layer": (lambda m: q_proj(m).scale_layer(0.5), "scaling"),
    "add_adapter": (lambda m: m.add_adapter("third", m.peft_config["default"]), "scaling"),
    "delete_adapter": (lambda m: m.delete_adapter("other"), "scaling"),
    "hook": (lambda m: q_proj(m).register_forward_hook(lambda *_: None), "forward hooks"),
    "pre-hook": (lambda m: q_proj(m).register_forward_pre_hook(lambda *_: None), "forward hooks"),
    "attention": (
        lambda m: m.get_base_model().set_attn_implementation("eager"),
        "attention or experts implementation (sdpa → eager)",
    ),
    "to": (lambda m: m.to(torch.float64), "the address of"),
    "assign": (load_assigned, "the address of"),
    "data": (new_data, "the address of base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
    "buffer": (rope_buffer, "rotary_emb.inv_freq"),
    "forward": (
        lambda m: setattr(m.get_base_model().model.norm, "forward", lambda x: x),
        "forward was replaced",
    ),
    "module": (
        lambda m: setattr(m.get_base_model().model.layers[0], "mlp", nn.Identity()),
        "modules were added, removed or replaced",
    ),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen_and_named(change, words, lora):
    model, validation = lora
    model.add_adapter("other", model.peft_config["default"])
    before = token(validation)
    assert token(validation) == before and describe_change(before, token(validation)) == "nothing"
    change(model)
    after = token(validation)
    assert after != before
    assert words in describe_change(before, after)
    assert token(validation) == after and hash(token(validation)) == hash(after)


def test_what_a_token_names_is_held_by_who_keeps_it(lora):
    """Else the next function gets the memory, and the id, of the one that is gone."""
    model, validation = lora
    norm = model.get_base_model().model.norm
    norm.forward = lambda x: x
    before, held = token(validation), referred(validation)
    for scale in range(50):
        del norm.forward
        norm.forward = lambda x, scale=scale: scale * x
        assert token(validation) != before
    assert held[0] is validation.model


@contextmanager
def switched(switch, on, off):
    switch(on)
    yield
    switch(off)


@contextmanager
def global_hook():
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        yield


@contextmanager
def reduced():
    matmul = torch.backends.cuda.matmul
    was = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = not was
    yield
    matmul.allow_bf16_reduced_precision_reduction = was


PRECISION = "precision or determinism switch"
SWITCHES = {
    "disabled adapter": (None, "switched off or on (False → True)"),
    "global hook": (global_hook, "forward hooks"),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast (None → torch.bfloat16)"),
    "float32": (lambda: switched(torch.set_float32_matmul_precision, "high", "highest"), PRECISION),
    "sdp": (lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), "attention kernels"),
    "deterministic": (
        lambda: switched(torch.use_deterministic_algorithms, True, False),
        f"{PRECISION} (False → True)",
    ),
    "reduced": (reduced, PRECISION),
}


@pytest.mark.parametrize("kind", SWITCHES)
def test_switches_are_seen_and_put_back(kind, lora, default_precision):
    model, validation = lora
    before, (switch, words) = token(validation), SWITCHES[kind]
    with (switch or model.disable_adapter)():
        after = token(validation)
        if kind == "autocast":
            with evaluation_mode(validation.model, CPU):
                assert token(validation) == after
    assert after != before and words in describe_change(before, after)
    assert token(validation) == before


def test_what_training_does_between_stages_is_no_change(lora, padded_batch):
    model, validation = lora
    batch = padded_batch(3, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = token(validation)
    first = float(validation())
    model.train()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    assert float(validation()) != first
    assert token(validation) == before
    optimizer.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=False)
    model.eval()
    assert token(validation) == before
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    assert token(validation) == before
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert token(validation) == before
    with torch.no_grad():
        model(**batch)
    validation()
    _ = validation.flops
    assert token(validation) == before


def test_gradient_checkpointing_changes_nothing_in_eval_mode(tiny_model, padded_batch):
    model = tiny_model("llama")
    validation = ValidationLoss(model, [padded_batch(3, 12)])
    before, loss = token(validation), float(validation())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model(**padded_batch(3, 12)).loss.backward()
    assert token(validation) == before and float(validation()) == loss
    model.gradient_checkpointing_disable()
    assert token(validation) == before


def test_an_adapter_put_around_the_head_later(tiny_model, padded_batch, own_loss):
    model = adapted(tiny_model("llama"))
    batches = [padded_batch(3, 12)]
    validation = ValidationLoss(model, batches)
    before = token(validation)
    peft = pytest.importorskip("peft")
    model.add_adapter(
        "head",
        peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.set_adapter("head")
    after = token(validation)
    assert "the validation set's buffers were rebuilt" in describe_change(before, after)
    assert validation.version == 1
    assert float(validation()) == pytest.approx(own_loss(model, batches), rel=2e-6)


def test_accelerates_mixed_precision_is_part_of_it(tiny_model, padded_batch):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        model = tiny_model("llama")
        plain = token(ValidationLoss(model, [padded_batch(3, 12)]))
        model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        validation = ValidationLoss(model, [padded_batch(3, 12)])
        assert reason(validation) is None
        assert "autocast (None → torch.bfloat16)" in describe_change(plain, token(validation))
    finally:
        AcceleratorState._reset_state(True)


def test_other_models_do_not_compare_equal(tiny_model, padded_batch):
    # Both live: the next model may lie where one that is gone has been.
    both = [ValidationLoss(tiny_model("llama"), [padded_batch(3, 12)]) for _ in range(2)]
    one, other = map(token, both)
    assert one != other and describe_change(one, other) == "another model"


class NoOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran")


def test_a_token_runs_no_operator_and_is_cheap(tiny_model, padded_batch):
    model = adapted(
        tiny_model("llama", num_hidden_layers=36), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    validation = ValidationLoss(model, [padded_batch(3, 12)], check=False)
    assert len(evaluated_modules(validation)) > 1900
    with NoOperators():
        token(validation)
    times = []
    for _ in range(15):
        start = time.process_time()
        token(validation)
        times.append(time.process_time() - start)
    assert min(times) < 0.008  # 2 ms on an idle core; the bound is for machines that do other things too
