"""Which optimizers have a learning rate that a line search can find, and that asking leaves no trace."""

import copy

import pytest
import torch
from small_loops import descend, same
from torch import nn

from ffkernels.engine.optimizer_probe import require_step_sizes, why_rate_means_nothing
from ffkernels.engine.run_state import OptimizerSnapshot


class Heavy(torch.optim.Optimizer):
    """Momentum that carries the learning rate inside: yesterday's steps do not scale with today's lr."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group["lr"])

    def update(self, p, rate):
        velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
        p.add_(velocity.mul_(0.9).sub_(p.grad, alpha=rate))


class Deaf(Heavy):
    def update(self, p, rate):
        p.sub_(p.grad, alpha=1e-3)


def trained(make, steps=3, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    optimizer = make(model.parameters())
    for _ in range(steps):
        descend(optimizer, model(torch.randn(4, 5, dtype=dtype)).square().mean())
    return model, optimizer


class Counting(torch.optim.Optimizer):
    """Adam that keeps its step count and moments in attributes, some of which it makes at its first step."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.count, self.moments, self.noise = 0, [], torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure=None):
        weights = [p for group in self.param_groups for p in group["params"]]
        self.count += 1
        self.tick = getattr(self, "tick", 0) + 1
        self.moments = self.moments or [(torch.zeros_like(p), torch.zeros_like(p)) for p in weights]
        jitter = 1 + 1e-3 * float(torch.rand((), generator=self.noise))
        for p, (mean, square) in zip(weights, self.moments, strict=True):
            mean.lerp_(p.grad, 0.1)
            square.lerp_(p.grad.square(), 0.001)
            size = (square / (1 - 0.999**self.count)).sqrt() + 1e-8
            p.addcdiv_(mean / (1 - 0.9**self.tick), size, value=-self.param_groups[0]["lr"] * jitter)


class Halves(torch.optim.Optimizer):
    """Two optimizers in a dict, each of which counts in an attribute."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.both = {"a": Counting(params[:2], lr), "b": Counting(params[2:], lr)}

    def step(self, closure=None):
        for optimizer in self.both.values():
            optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


def everything(model, optimizer):
    """All there is to know of a run's optimizer, as text."""
    parts = [optimizer, *getattr(optimizer, "both", {}).values()]
    known = [{k: v for k, v in vars(p).items() if k not in ("noise", "both")} for p in parts]
    drawn = [p.noise.get_state().tolist() for p in parts if hasattr(p, "noise")]
    return str(known) + str(list(model.parameters())) + str(drawn)


@pytest.mark.parametrize(
    "make", [lambda p: Counting(p, lr=1e-3), lambda p: Halves(p, lr=1e-3), torch.optim.AdamW]
)
@pytest.mark.parametrize("steps", [0, 3])
def test_what_an_optimizer_keeps_in_attributes_or_makes_at_its_first_step_is_put_back(make, steps):
    model, optimizer = trained(make, steps)
    model.zero_grad()
    model(torch.ones(4, 5)).square().mean().backward()
    before = everything(model, optimizer)
    assert why_rate_means_nothing(optimizer, list(model.parameters())) is None
    assert everything(model, optimizer) == before and (steps or not optimizer.state)


SCALING = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-6, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


@pytest.mark.parametrize("name", SCALING)
def test_updates_that_scale(name):
    model, optimizer = trained(SCALING[name])

    def run():
        return [list(model.parameters()), [p.grad for p in model.parameters()], optimizer.state_dict()]

    def addresses():
        return [t.data_ptr() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]

    before, at, heard = copy.deepcopy(run()), addresses(), []
    optimizer.register_step_post_hook(lambda *_: heard.append(1))
    torch.manual_seed(7)
    draw = torch.randn(3)
    torch.manual_seed(7)
    if name == "rmsprop":  # the buffer of its momentum holds what the gradient was, not the step: it scales
        assert "momentum_buffer" in next(iter(optimizer.state.values()))
    assert why_rate_means_nothing(optimizer, list(model.parameters())) is None
    assert torch.equal(torch.randn(3), draw) and not heard
    assert same(run(), before) and addresses() == at


@pytest.mark.parametrize(
    "make, ratio",
    [
        (lambda p: Heavy(p, lr=0.1), "times as long"),
        (lambda p: Deaf(p, lr=0.1), "is 1 times as long, off twice the update by 50%"),
        (lambda p: torch.optim.Rprop(p, lr=1e-3), "is 1 times as long"),
    ],
)
def test_updates_that_do_not(make, ratio):
    model, optimizer = trained(make)
    assert ratio in why_rate_means_nothing(optimizer, list(model.parameters()))


def test_rounding_of_16_bit_weights_is_not_held_against_the_optimizer():
    model, optimizer = trained(lambda p: torch.optim.SGD(p, lr=1e-5), dtype=torch.bfloat16)
    assert why_rate_means_nothing(optimizer, list(model.parameters())) is None


def test_what_is_refused_without_a_step():
    weight = nn.Parameter(torch.zeros(3))
    told = r"Distance estimates its step size itself \(param_groups\[0\] has 'd'"
    with pytest.raises(ValueError, match=told):
        require_step_sizes(Distance([weight], lr=1.0))
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times"):
        require_step_sizes(torch.optim.LBFGS([weight]))
    prodigy = torch.optim.AdamW([weight], lr=1.0)
    prodigy.param_groups[0]["d"] = 1e-6
    with pytest.raises(ValueError, match="estimates its step size itself"):
        require_step_sizes(prodigy)
    relative = torch.optim.AdamW([weight], lr=1.0)
    relative.param_groups[0].update(lr=None, relative_step=True)
    with pytest.raises(ValueError, match=r"has lr=None .*: give it one and relative_step=False$"):
        require_step_sizes(relative)
    del relative.param_groups[0]["relative_step"]
    with pytest.raises(ValueError, match=r"has lr=None .*: give it one$"):
        require_step_sizes(relative)


class Damped(torch.optim.SGD):
    """Its damping is called d, and given to it."""

    def __init__(self, params, lr, d=0.5):
        super().__init__(params, lr)
        self.param_groups[0]["d"] = d


class DampedByName(Damped):
    def __init__(self, params, **options):
        super().__init__(params, lr=options["lr"])


class Distance(torch.optim.SGD):
    """Its estimate of the distance is called d, and only its start is given to it."""

    def __init__(self, params, lr, d0=1e-6):
        super().__init__(params, lr)
        self.param_groups[0].update(d=d0, d0=d0)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adafactor, Damped, DampedByName])
def test_a_setting_of_any_name_is_no_estimate(make):
    require_step_sizes(make([nn.Parameter(torch.zeros(3))], lr=0.1))


def test_state_is_put_back_whatever_happened_to_it():
    model, optimizer = trained(SCALING["adamw"])
    parameter = next(model.parameters())
    old = optimizer.state[parameter]["exp_avg"]
    value = old.clone()
    saved = OptimizerSnapshot(optimizer)
    optimizer.state[parameter]["exp_avg"] = torch.ones_like(old)  # replaced, not written
    optimizer.state[parameter]["more"] = 3
    old.mul_(5)
    optimizer.param_groups[0]["lr"] = 7.0
    saved.restore()
    assert optimizer.state[parameter]["exp_avg"] is old and torch.equal(old, value)
    assert "more" not in optimizer.state[parameter]
    assert optimizer.param_groups[0]["lr"] == 1e-3
