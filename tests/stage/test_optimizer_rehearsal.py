"""Which optimizers leave weights where a stage moved them, and that asking leaves no trace."""

import copy
import threading

import pytest
import torch
from small_loops import Factors
from torch import nn

from ffkernels import FastForward, FastForwardConfig
from ffkernels.stage.optimizer_rehearsal import what_stays


class Descent(torch.optim.Optimizer):
    """Plain descent, for others to change."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, dict(lr=lr, weight_decay=0.1))
        self.steps = 0

    def weights(self):
        return [(group, p) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group, p in self.weights():
            self.update(group, p, self.state[p])

    def update(self, group, p, state):
        p.add_(p.grad + group["weight_decay"] * p, alpha=-group["lr"])


class Masters(Descent):
    """Float32 copies that are trained and written over the model's, in an attribute of its own."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.masters = None

    @torch.no_grad()
    def step(self, closure=None):
        self.masters = self.masters or [p.detach().float().clone() for _, p in self.weights()]
        for (group, p), master in zip(self.weights(), self.masters, strict=True):
            master.sub_(p.grad.float(), alpha=group["lr"])
            p.copy_(master)


class DualAveraging(Descent):
    """All gradients so far from the start, which it notes at its first step."""

    def update(self, group, p, state):
        state.setdefault("start", p.detach().clone())
        state.setdefault("sum", torch.zeros_like(p)).add_(p.grad)
        p.copy_(state["start"] - group["lr"] * state["sum"])


class Averaging(Descent):
    """A running mean that is copied back after each step: 0.1 of a shift is in it after one."""

    def update(self, group, p, state):
        mean = state.setdefault("mean", p.detach().clone())
        super().update(group, p, state)
        p.copy_(mean.lerp_(p, 0.1))


class Slow:
    """No torch optimizer: every tenth step halfway back to where it was ten steps ago."""

    def __init__(self, optimizer):
        self.optimizer, self.count, self.before = optimizer, 0, None

    @torch.no_grad()
    def step(self):
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.before = self.before or [p.detach().clone() for p in weights]
        self.optimizer.step()
        self.count += 1
        if self.count % 10 == 0:
            for p, old in zip(weights, self.before, strict=True):
                p.copy_(old.lerp_(p, 0.5))


class Distance(Descent):
    """It keeps the start, too, and takes its step size from how far it has come."""

    def update(self, group, p, state):
        start = state.setdefault("start", p.detach().clone())
        rate = group["lr"] * max(1e-3, float((p - start).norm()))
        p.add_(p.grad / (p.grad.norm() + 1e-8), alpha=-rate)


class Trust(Descent):
    """Steps as long as the weights are large."""

    def update(self, group, p, state):
        p.add_(p.grad, alpha=-group["lr"] * float(p.norm() / p.grad.norm()))


class Noisy(Descent):
    def update(self, group, p, state):
        p.add_(p.grad + torch.randn_like(p), alpha=-group["lr"])


class Twice(Descent):
    """It needs the gradient at another place, too, and says so only when it is called."""

    def step(self, closure=None):
        closure()
        super().step()


LEAVE = {"distance": Distance, "trust ratio": Trust, "noise": Noisy, "closure": Twice, "counted": Descent}
PULL = {
    "masters": (Masters, 0.0),
    "dual averaging": (DualAveraging, 0.0),
    "mean": (Averaging, 0.1),
    "slow weights": (lambda p: Slow(Descent(p)), 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*LEAVE, *PULL])
def test_what_is_left_of_a_shift(name, dtype):
    make, stays = PULL.get(name, (LEAVE.get(name), 1.0))
    model = Factors().to(dtype)
    torch.manual_seed(1)  # one steps by chance
    optimizer = make(list(model.parameters()))
    # Rounding of 16-bit weights is of the size of a tenth of a shift of a tenth.
    assert what_stays(optimizer) == pytest.approx(stays, abs=0.02 if dtype == torch.float32 else 0.06)
    if stays < 1:
        with pytest.raises(ValueError, match=f"^{type(optimizer).__name__} has weights of its own and draws"):
            FastForward(model, optimizer, Factors.loss)
    else:
        FastForward(model, optimizer, Factors.loss).detach()


def test_it_is_named_which_wrapper_pulls_and_what_is_inside():
    class Passes:
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.param_groups = getattr(optimizer, "param_groups", adam.param_groups)

        def step(self):
            self.optimizer.step()

    model = Factors()
    adam = torch.optim.AdamW(model.parameters())
    told = r"^Slow has weights of its own.* 50% of a move .* 12 steps later.*; use Passes around AdamW alone$"
    with pytest.raises(ValueError, match=told):
        FastForward(model, Passes(Slow(Passes(adam))), Factors.loss)
    with pytest.raises(ValueError, match=r"Masters.*; use one without, such as torch.optim.AdamW$"):
        FastForward(model, Passes(Masters(model.parameters())), Factors.loss)
    with FastForward(model, Passes(adam), Factors.loss) as ff:
        assert ff.optimizer is adam


def test_one_group_that_pulls_is_enough():
    class Half(Descent):
        def update(self, group, p, state):
            (DualAveraging if group["own"] else Descent).update(self, group, p, state)

    a, b = Factors().parameters()
    assert what_stays(Half([{"params": [a], "own": False}, {"params": [b], "own": True}])) == pytest.approx(
        0.0
    )


def test_without_stages_nothing_would_be_undone():
    model = Factors()
    config = FastForwardConfig(interval=None, learning_rate="auto")
    FastForward(model, Masters(model.parameters()), Factors.loss, config).detach()


@pytest.mark.parametrize(
    "make", [Masters, Distance, lambda p: torch.optim.AdamW(p, fused=True), lambda p: Slow(Descent(p))]
)
@pytest.mark.parametrize("steps", [0, 3])
def test_it_leaves_no_trace(make, steps):
    model = Factors()
    outer = make(list(model.parameters()))
    optimizer = getattr(outer, "optimizer", outer)
    for _ in range(steps):
        model.zero_grad()
        model.loss().backward()
        outer.step()
    heard = []
    optimizer.register_step_pre_hook(lambda *_: heard.append(1))
    optimizer.step = lambda *_: heard.append(2)  # as a scheduler does

    def everything():
        own = {k: v for k, v in vars(outer).items() if k != "optimizer" and not k.startswith("_optimizer_")}
        own.pop("step", None)
        weights = list(model.parameters())
        return [weights, [p.grad for p in weights], optimizer.state_dict(), own, torch.get_rng_state()]

    before = copy.deepcopy(everything())
    assert what_stays(outer) is not None
    assert str(everything()) == str(before) and not heard


@pytest.mark.parametrize(
    "thing", [threading.Lock(), nn.Linear(2, 2), lambda: torch.zeros(1).sin, torch.zeros(1 << 25)]
)
def test_what_cannot_be_copied_leaves_it_unknown(thing):
    model = Factors()
    optimizer = Descent(model.parameters())
    optimizer.thing = thing if not callable(thing) or isinstance(thing, nn.Module) else thing()
    assert what_stays(optimizer) is None
    FastForward(model, optimizer, Factors.loss).detach()
