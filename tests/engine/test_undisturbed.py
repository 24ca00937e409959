"""What a validation shares with the training around it: autocast, noise, buffers, gradients."""

import copy
import random
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from small_loops import descend
from torch import nn
from torch.utils.data import DataLoader

from ffkernels import FastForward, FastForwardConfig, ValidationLoss
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.validation import restore


class Mixed(nn.Module):
    """A projection in bfloat16 behind a norm in float32, which runs under autocast only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.base = nn.Linear(8, 16).to(torch.bfloat16).requires_grad_(False)
        self.head = nn.Linear(16, 1)

    def forward(self, x, y):
        return {"loss": ((self.head(torch.tanh(self.base(self.norm(x)))).float() - y) ** 2).mean()}


class Wide(Mixed):
    """The same in float32, which runs anyhow and has another loss under autocast."""

    def __init__(self):
        super().__init__()
        self.base.float()


def data(rows=32, seed=0):
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": x.sum(1, keepdim=True)}


def autocast(on=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def train(forward, optimizer, steps):
    """Each stage runs in a step, outside of autocast."""
    for step in range(steps):
        with autocast():
            loss = forward(step)
        descend(optimizer, loss)


@pytest.mark.parametrize("kind", [Mixed, Wide])
@pytest.mark.parametrize("form", ["batches", "loss_fn", "inside"])
@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
def test_a_stage_runs_under_the_autocast_that_the_forward_had(kind, form):
    model = kind()
    given = [data()] if form != "loss_fn" else (lambda model: model(**data())["loss"])
    with autocast(form == "inside"):
        validation = ValidationLoss(model, given)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    ff = FastForward(model, optimizer, validation, FastForwardConfig(interval=3, patience=None))
    train(lambda step: model(**data(seed=step))["loss"], optimizer, 6)
    stages = ff.stages
    with autocast(), torch.no_grad():
        expected = model(**data())["loss"].item()
    assert stages[-1].loss_after == float(validation()) == expected
    assert stages[0].tau > 3
    if kind is Wide:
        assert model(**data())["loss"].item() != expected, "it does make a difference"
        with autocast(False):
            model(**data())["loss"].backward()
        assert float(validation()) == model(**data())["loss"].item() != expected, "the last forward counts"
    ff.detach()
    assert not model._forward_pre_hooks


def test_parts_that_are_called_one_by_one_are_listened_to():
    model = nn.ModuleDict({"first": nn.Linear(8, 16), "rest": nn.ModuleList([nn.Linear(16, 1)])})

    def loss(model):
        out = model["rest"][0](torch.tanh(model["first"](data()["x"])))
        return ((out.float() - data()["y"]) ** 2).mean()

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ff = FastForward(model, optimizer, loss, FastForwardConfig(interval=2, patience=None))
    train(lambda step: loss(model), optimizer, 2)
    with autocast(), torch.no_grad():
        assert ff.stages[0].tau > 0 and ff.stages[0].loss_after == loss(model).item()
    assert loss(model).item() != ff.stages[0].loss_after
    ff.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("path", ["fast", "generic"])
def test_what_does_not_run_without_autocast_is_run_with_it_at_once(path, tiny_model, padded_batch):
    """A model is asked for its own loss when a ValidationLoss is made: before any training."""
    model, batch = tiny_model("llama").to(torch.bfloat16), padded_batch(4, 12)
    if path == "generic":
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    with pytest.warns(
        FFKernelsNotice, match=r"under autocast only .* torch.autocast\('cpu', torch.bfloat16\)"
    ):
        validation = ValidationLoss(model, [batch])
    assert validation.path == path
    with autocast():
        assert float(validation()) == float(ValidationLoss(model, [batch])())
    model.lm_head.half()  # no autocast helps where that is not what fails
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 31))
    with pytest.raises((RuntimeError, ValueError), match="shapes cannot be multiplied"):
        ValidationLoss(model, [batch])


@pytest.mark.parametrize("compiled", ["outside", "inside"])
def test_listening_compiles_nothing_anew(compiled):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    torch._dynamo.reset()
    model = Wide()
    whole = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    given = whole if compiled == "outside" else model
    validation = ValidationLoss(model, lambda _: model(**data())["loss"])
    ff = FastForward(given, optimizer, validation, FastForwardConfig(interval=2, patience=None))
    train(lambda step: whole(**data())["loss"], optimizer, 4)
    assert len(ff.stages) == 2 and len(calls) == 1
    with autocast(), torch.no_grad():
        assert ff.stages[-1].loss_after == model(**data())["loss"].item()


class Noisy(nn.Module):
    """A loss with noise that it draws anew: of a generator of its own, or of whoever passes it."""

    def __init__(self, generator=None):
        super().__init__()
        self.w, self.generator, self.drawn = nn.Parameter(torch.zeros(6)), generator, []

    def forward(self, x=None, noise=None):
        noise = torch.randn(6, generator=self.generator) if noise is None else noise
        self.drawn.append(noise.tolist())
        return {"loss": ((self.w - torch.linspace(1, 2, 6) + 2 * noise) ** 2).mean()}


outside = random.Random(3)


def of_a_global(model):
    return model(noise=torch.tensor([outside.gauss(0, 1) for _ in range(6)]))["loss"]


class OfAnObject:
    def __init__(self):
        self.generator = numpy.random.default_rng(3)

    def __call__(self, model):
        return model(noise=torch.from_numpy(self.generator.standard_normal(6)).float())["loss"]

    def method(self, model):
        return self(model)


def of_a_closure():
    generator = torch.Generator().manual_seed(3)
    return lambda model: model(noise=torch.randn(6, generator=generator))["loss"]


def of_a_helper():
    generators = {"noise": [numpy.random.RandomState(3)]}

    def draw():
        return torch.from_numpy(generators["noise"][0].standard_normal(6)).float()

    return lambda model: model(noise=draw())["loss"]


def of_a_loader():
    """The order of the batches, of which one is left out, is noise too."""
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(torch.randn(12, generator=generator), 6, shuffle=True, generator=generator)
    return lambda model: model(noise=next(iter(loader)))["loss"]


NOISES = {
    "torch's": lambda: [{"x": torch.zeros(4)}],
    "a generator of the model": lambda: [{"x": torch.zeros(4)}],
    "a closure's": of_a_closure,
    "a global one": lambda: partial(partial(of_a_global)),
    "NumPy's, of an object": OfAnObject,
    "NumPy's, of a method": lambda: OfAnObject().method,
    "NumPy's older one, in a list in a dict of a helper": of_a_helper,
    "a DataLoader's": of_a_loader,
}


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
def test_all_losses_of_one_search_are_of_the_same_noise(kind):
    """And the noise of training goes on as if there had been none."""

    def run(fast_forward):
        torch.manual_seed(1)
        outside.seed(3)
        model = Noisy(torch.Generator().manual_seed(2) if "model" in kind else None)
        loss = NOISES[kind]()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        config = FastForwardConfig(interval=2, patience=None)
        ff = FastForward(model, optimizer, loss, config) if fast_forward else None
        model.drawn.clear()
        for _ in range(2):
            model(noise=torch.zeros(6))["loss"].backward()
            optimizer.step()
        stage, model.drawn = model.drawn[2:], []
        for _ in range(2):
            loss(model) if callable(loss) else model()
        return stage, model.drawn, ff.stages[0].losses if ff else []

    (noises, after, losses), (_, plain, _) = run(True), run(False)
    assert len(noises) >= len(losses) > 2 and all(noise == noises[0] for noise in noises)
    assert after == plain and after[0] == noises[0] != after[1]


class Counting(nn.Module):
    """As a balanced mixture of experts: which was chosen how often, and a number beside the buffer."""

    def __init__(self):
        super().__init__()
        self.router, self.calls = nn.Linear(4, 3, bias=False), 0
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x, y):
        scores = self.router(x)
        self.calls += 1
        with torch.no_grad():
            self.count += torch.bincount(scores.argmax(1), minlength=3)
        return {"loss": ((scores.max(1, keepdim=True).values - y) ** 2).mean() + 1e-3 * self.calls}


class Replacing(nn.Module):
    """As rotary frequencies that follow the longest batch: another tensor in the place of the buffer."""

    def __init__(self):
        super().__init__()
        self.net, self.longest = nn.Linear(4, 1), 16
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x, y):
        if len(x) > self.longest:
            self.scale, self.longest = 0.5 * torch.ones(1), len(x)
        return {"loss": ((self.net(x) * self.scale - y) ** 2).mean()}


class Moving(nn.Module):
    """As spectral norms and codebooks that are updated in every forward, of a parameter without gradients."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.register_buffer("u", torch.ones(1, 1))

    def forward(self, x, y):
        with torch.no_grad():
            self.u.lerp_(self.net(x).abs().mean(0, keepdim=True), 0.3)
        return {"loss": ((self.net(x) / self.u - y) ** 2).mean()}


class Normalizing(nn.Module):
    """A batch norm that never evaluates, whose kernel writes its statistics past the version counter."""

    def __init__(self):
        super().__init__()
        self.net, self.norm = nn.Linear(4, 1), nn.BatchNorm1d(4)

    def forward(self, x, y):
        mean, variance = self.norm.running_mean, self.norm.running_var
        return {"loss": ((self.net(F.batch_norm(x, mean, variance, training=True) + mean) - y) ** 2).mean()}


class Averaging(nn.Module):
    """A mean that is an attribute and no buffer, written in place and then replaced, beside a count."""

    def __init__(self):
        super().__init__()
        self.net, self.mean, self.calls = nn.Linear(4, 1), torch.zeros(4), 0

    def forward(self, x, y):
        self.calls += 1
        with torch.no_grad():
            self.mean.mul_(0.9)
            self.mean = self.mean + x.mean(0) / self.calls
        return {"loss": ((self.net(x - self.mean) - y) ** 2).mean()}


WRITTEN = {
    Counting: ["count"],
    Replacing: ["scale"],
    Moving: ["u"],
    Normalizing: ["norm.running_mean", "norm.running_var"],
    Averaging: ["mean"],
}


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
def test_buffers_that_a_forward_writes_are_put_back(kind):
    """A run whose stages find nothing is the plain run, and every loss of a stage starts from one state."""

    def run(fast_forward):
        torch.manual_seed(0)
        model = kind()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(9))
        far = [{"x": x, "y": -50 * x.sum(1, keepdim=True)}]  # what training moves away from
        config = FastForwardConfig(interval=2, patience=None)
        ff = FastForward(model, optimizer, far, config) if fast_forward else None
        for step in range(8):
            x = torch.randn(12, 4, generator=torch.Generator().manual_seed(step))
            descend(optimizer, model(x, x.sum(1, keepdim=True))["loss"])
        return model, ff

    (plain, _), (model, ff) = run(False), run(True)
    assert [stage.tau for stage in ff.stages] == [0] * 4 and all(s.evaluations == 2 for s in ff.stages)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    own = {
        n: torch.as_tensor(v).tolist() for n, v in vars(plain).items() if isinstance(v, int | torch.Tensor)
    }
    assert {name: torch.as_tensor(vars(model)[name]).tolist() for name in own} == own
    assert sorted(ff.validation.evaluator.written_buffers) == WRITTEN[kind]
    assert float(ff.validation()) == float(ff.validation())


def test_a_buffer_too_large_to_copy_is_named(monkeypatch):
    monkeypatch.setattr(restore, "COPIED_AT_FIRST", 16)
    model = nn.Sequential(Counting(), nn.Module())
    model[1].register_buffer("cache", torch.zeros(100))

    def loss(model):
        model[1].cache[0] += 1
        return model[0](torch.ones(2, 4), torch.ones(2, 1))["loss"]

    validation = ValidationLoss(model, loss)
    with pytest.warns(FFKernelsNotice, match=r"wrote the buffer 1\.cache, which is too large"):
        validation()
    assert model[1].cache[0] == 1 and not model[0].count.any() and model[0].calls == 0
    validation()
    assert model[1].cache[0] == 1, "from then on it is copied"


class Forces(nn.Module):
    """A loss of derivatives with respect to positions, as force fields and physics-informed networks have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def autograd(self, x):
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    def backward(self, x):
        self.energy(x).sum().backward(create_graph=True)
        return x.grad

    def functional(self, x):
        return torch.func.grad(lambda x: self.energy(x).sum())(x)

    def penalty(self, x):
        """A gradient penalty: with respect to the weights."""
        total = (self.energy(x) ** 2).mean()
        gradients = torch.autograd.grad(total, self.parameters(), create_graph=True)
        return torch.cat([g.flatten() for g in gradients])

    def forward(self, x, way):
        return {"loss": ((getattr(self, way)(x.detach().requires_grad_()) - 0.3) ** 2).mean()}


@pytest.mark.parametrize("form", ["batches", "loss_fn"])
@pytest.mark.parametrize("way", ["autograd", "backward", "functional", "penalty"])
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_loss_may_differentiate_inside(way, form, recwarn):
    model = Forces()
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(1))
    batch = {"x": x, "way": way}
    validation = ValidationLoss(model, [batch] if form == "batches" else lambda model: model(**batch)["loss"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    ff = FastForward(model, optimizer, validation, FastForwardConfig(interval=2, patience=None))
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(x, "functional" if way == "backward" else way)["loss"]
        loss.backward()
        kept = [(p, p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
        optimizer.step()
        assert all(p.grad is gradient and torch.equal(gradient, value) for p, gradient, value in kept)
    twin = copy.deepcopy(model)
    assert ff.stages[-1].loss_after == pytest.approx(float(twin(x, way)["loss"]), rel=1e-6)
    assert ff.stages[0].tau > 3 and torch.is_grad_enabled()
    said = [w for w in recwarn if "differentiates inside" in str(w.message)]
    assert len(said) == (way != "functional")


def test_what_fails_with_gradients_too_is_raised_as_it_was():
    def broken(model):
        raise RuntimeError(f"no grad here, gradients {torch.is_grad_enabled()}")

    with pytest.raises(RuntimeError, match="gradients False"):
        ValidationLoss(Forces(), broken)()
