"""Evaluating leaves no trace: modes, random generators, gradients, caches, attention names."""

import random
import signal

import numpy
import pytest
import torch
from torch import nn

from ffkernels.validation import evaluator
from ffkernels.validation.evaluator import evaluation_mode
from ffkernels.validation.loss import ValidationLoss


def random_state():
    kind, keys, position, *rest = numpy.random.get_state()
    return (torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), position, rest)


def draw(*_):
    torch.rand(2), random.random(), numpy.random.rand()


@pytest.fixture
def mixed_modes(tiny_model):
    """A model in training mode with some modules in eval, gradients present."""
    model = tiny_model("gpt_neox")
    model.gpt_neox.layers[0].eval()
    model.gpt_neox.layers[1].attention.training = False
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return model


@pytest.mark.parametrize("path", ["fast", "generic", "callable"])
@pytest.mark.parametrize("raises", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
def test_everything_is_put_back(path, raises, mixed_modes, padded_batch):
    model, batch = mixed_modes, padded_batch(3, 12)
    if path == "generic":
        batch["position_ids"] = torch.arange(12).expand(3, 12)
    source = (lambda m: m(**batch).loss) if path == "callable" else [batch]
    validation = ValidationLoss(model, source)
    assert validation.path == path

    def hook(module, arguments):
        draw()
        module.train()
        if raises is not None:
            raise raises("inside the forward")

    handle = model.gpt_neox.layers[1].register_forward_pre_hook(hook)
    flags = {name: module.training for name, module in model.named_modules()}
    before = random_state()
    if raises is None:
        validation()
    else:
        with pytest.raises(raises):
            validation()
    handle.remove()
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert random_state() == before
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert all(bool((p.grad == 0.5).all()) for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_train_and_eval_methods_are_not_called(tiny_model, padded_batch):
    class MergesOnEval(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("train() has side effects here")

    model = tiny_model("llama")
    head = MergesOnEval(32, 97, bias=False)
    model.lm_head = head
    ValidationLoss(model, [padded_batch(2, 8)])()
    assert head.training


def test_dropout_is_off_and_training_goes_on_as_if_nothing_had_been(mixed_modes, padded_batch):
    model, batch = mixed_modes.train(), padded_batch(3, 12)
    validation = ValidationLoss(model, [batch])
    assert float(validation()) == float(validation())
    torch.manual_seed(5)
    plain = [float(model(**batch).loss.detach()) for _ in range(2)]
    torch.manual_seed(5)
    first = float(model(**batch).loss.detach())
    validation()
    assert [first, float(model(**batch).loss.detach())] == plain
    assert plain[0] != plain[1]


def test_buffers_built_inside_serve_autograd_later():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(3)), None

        def forward(self, x):
            if self.scale is None:
                self.scale = torch.arange(3.0) + 1
            return (self.weight * self.scale * x).square().sum()

    model = Lazy()
    assert float(ValidationLoss(model, lambda m: m(torch.ones(3)))()) == 14
    model(torch.ones(3)).backward()
    assert model.weight.grad.tolist() == [2, 8, 18]


@pytest.mark.parametrize("path", ["fast", "generic", "callable"])
@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
def test_autocast_is_kept_and_its_cache_is_not(path, tiny_model, padded_batch):
    model, batch = tiny_model("llama"), padded_batch(3, 12)
    if path == "generic":
        batch["position_ids"] = torch.arange(12).expand(3, 12)

    def loss_fn(m):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # brings a cache of its own
            return m(**batch).loss

    validation = ValidationLoss(model, loss_fn if path == "callable" else [batch])
    full = float(validation())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch).loss.backward()  # fills the cache
        first = float(validation())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        moved = float(validation())
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(validation()) == moved
    assert moved != first
    if path != "callable":
        assert first != full  # it did run in bf16
        assert first == pytest.approx(full, rel=2e-2)


def test_dora_norms_are_not_cached(tiny_model, padded_batch):
    peft = pytest.importorskip("peft")
    from peft.helpers import DoraCaching

    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config)
    validation = ValidationLoss(model, [padded_batch(3, 12)])
    with DoraCaching():
        validation()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.5)
        cached = float(validation())
    assert cached == float(validation())


def test_accelerates_mixed_precision_is_entered_below_its_wrapper(tiny_model, padded_batch):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        model, batch = tiny_model("llama"), padded_batch(3, 12)
        plain = float(ValidationLoss(model, [batch])())
        model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        validation = ValidationLoss(model, [batch])
        assert validation.path == "fast", validation.reason
        loss = float(validation())
        assert loss != plain
        assert loss == pytest.approx(plain, rel=2e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert float(ValidationLoss(tiny_model("llama"), [batch])()) == loss
    finally:
        AcceleratorState._reset_state(True)


def test_a_module_can_be_evaluated_by_hand():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train()
    with evaluation_mode(model, torch.device("cpu")):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_ctrl_c_waits_until_modes_are_put_back(at, monkeypatch):
    real, calls = evaluator._set_training, []

    def set_training(module, training):
        calls.append(module)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        real(module, training)

    monkeypatch.setattr(evaluator, "_set_training", set_training)
    model = nn.Sequential(nn.Dropout())  # two modules into eval, two back
    before = random_state()
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model, torch.device("cpu")):
        draw()
    assert len(calls) == 4
    assert model.training and model[0].training
    assert torch.is_grad_enabled()
    assert random_state() == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_eval_mode_would_spoil_is_in_training(training):
    class PacksItsWeightForInference(nn.Linear):
        """As bitsandbytes' Linear4bit on a CPU with AVX512-BF16."""

        support_avx512bf16_for_cpu = False

        def __init__(self, supported):
            super().__init__(3, 3)
            self.support_avx512bf16_for_cpu = supported

        def forward(self, x):
            if self.support_avx512bf16_for_cpu and not self.training:
                self.weight.requires_grad_(False)
            return super().forward(x)

    model = nn.Sequential(PacksItsWeightForInference(True), PacksItsWeightForInference(False), nn.Dropout())
    model.train(training)
    loss = ValidationLoss(model, lambda model: model(torch.ones(2, 3)).sum())
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append([module.training for module in model]))
    first = loss()
    assert torch.equal(first, loss())
    assert seen == [[True, False, False]] * 2
    assert all(module.training is training for module in model.modules())
    model.train()(torch.ones(2, 3)).sum().backward()
    assert model[0].weight.grad is not None


class Keeps(nn.Module):
    """Keeps its activation, expanded, beside an average that it writes past the version counter."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 1)
        self.seen, self.mean = torch.zeros(1), torch.ones(3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x)) * self.mean.clone()
        self.seen = hidden[:1].expand(4, 3)
        out = self.last(self.seen * self.mean).sum()
        self.mean.data.mul_(0.5)
        return out


@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
def test_the_graph_of_a_training_forward_outlives_evaluations_in_between():
    def gradients(evaluations):
        torch.manual_seed(0)
        model = Keeps()
        validation = ValidationLoss(model, lambda model: model(torch.ones(2, 3)))
        model(torch.ones(2, 3))
        first = {float(validation()) for _ in range(evaluations)}
        loss = model(torch.ones(2, 3))
        kept = model.seen
        second = {float(validation()) for _ in range(evaluations)}
        assert model.seen is kept and model.mean.tolist() == [0.25] * 3
        assert len(first) == len(second) == min(1, evaluations)
        loss.backward()
        return [parameter.grad.tolist() for parameter in model.parameters()]

    assert gradients(2) == gradients(0)


@pytest.mark.parametrize("registered", [True, False], ids=["buffer", "attribute"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    ],
    ids=["sparse", "ragged", "4 bits"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_module_may_hold_tensors_that_cannot_be_compared(make, registered):
    model = nn.Linear(3, 1)
    if registered:
        model.register_buffer("held", make(), persistent=False)
    else:
        model.held = make()
    validation = ValidationLoss(model, lambda model: model(torch.ones(2, 3)).sum())
    held = model.held
    assert float(validation()) == float(validation()) == model(torch.ones(2, 3)).sum().item()
    assert model.held is held and validation.evaluator.written_buffers == []
