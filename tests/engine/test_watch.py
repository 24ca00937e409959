"""Stages that are taken back end with a word; an optimizer whose step is never called is told of."""

import re
import threading

import pytest
import torch
from torch import nn

from ffkernels import FastForward, FastForwardConfig
from ffkernels.ops.notices import FFKernelsNotice


def attached(make, max_tau=256, patience=None):
    model = Curve()
    optimizer = make(model.parameters(), lr=1e-3)
    config = FastForwardConfig(interval=3, max_tau=max_tau, patience=patience)
    return model, optimizer, FastForward(model, optimizer, loss_of, config)


def said(warned, words):
    return [str(w.message) for w in warned if words in str(w.message)]


class Curve(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 24))
        self.b = nn.Parameter(torch.zeros(3))

    def loss(self, noise=0.0):
        return ((self.w - 3 + noise) ** 2).mean() + ((self.b - 2) ** 2).sum()


def loss_of(model):
    return model.loss().item()


def backward(model, step):
    model.zero_grad()
    model.loss(0.1 * torch.randn(24, generator=torch.Generator().manual_seed(step))).backward()


class Locked(torch.optim.SGD):
    """Something that cannot be copied, so that no rehearsal tells what it does."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.lock = threading.Lock()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, group["lr"])

    def update(self, p, rate):
        p.sub_(p.grad, alpha=rate)


class LockedMasters(Locked):
    def update(self, p, rate):
        master = self.state[p].setdefault("master", p.detach().clone())
        p.copy_(master.sub_(p.grad, alpha=rate))


class LockedAnchor(Locked):
    """Each step goes nine tenths of the way back to where it was a step ago, and then on from there."""

    def update(self, p, rate):
        anchor = self.state[p].setdefault("anchor", p.detach().clone())
        p.lerp_(anchor, 0.9).sub_(p.grad, alpha=rate)
        anchor.copy_(p)


def copied_back(share):
    """A loop that puts the weights a share of the way back to what they were before each step."""

    def step(model, optimizer):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.data.lerp_(old, share)  # past autograd's version counter

    return step


def plain(model, optimizer):
    optimizer.step()


BETWEEN, WITHIN = "between that stage and the next optimizer step", "in the optimizer step that followed it"


@pytest.mark.parametrize(
    "make, step, told",
    [
        (LockedMasters, plain, rf"^(99|100|101)% of what .* {WITHIN} \(LockedMasters\)"),
        (LockedAnchor, plain, rf"^90% of what .* {WITHIN} \(LockedAnchor\)"),
        (torch.optim.SGD, copied_back(0.5), rf"^5\d% of what .* {BETWEEN} \(SGD\)"),
        (torch.optim.SGD, copied_back(1.0), rf"^100% of what .* {BETWEEN} \(SGD\)"),
    ],
)
@pytest.mark.parametrize("patience", ["auto", None])
def test_a_stage_that_is_taken_back_is_the_last(make, step, told, patience):
    model, optimizer, ff = attached(make, patience=patience)
    with pytest.warns(FFKernelsNotice) as warned:
        for n in range(12):
            backward(model, n)
            step(model, optimizer)
    (once,) = said(warned, "taken back")
    assert re.match(told, once), once
    assert [stage.optimizer_step for stage in ff.stages] == [3]
    assert ff.stages[0].tau > 8 and not ff.active
    state = ff.state_dict()
    ff.detach()
    resumed = FastForward(model, optimizer, loss_of, ff.config)
    resumed.load_state_dict(state)
    assert not resumed.active


def clamped(model, optimizer):
    optimizer.step()
    with torch.no_grad():
        model.w.clamp_(-3, 3)
        model.w.data[0] = 0.0  # one that is held


@pytest.mark.parametrize(
    "make, step",
    [
        (torch.optim.SGD, plain),
        (Locked, plain),
        (torch.optim.AdamW, plain),
        (torch.optim.SGD, clamped),
        (torch.optim.AdamW, copied_back(0.05)),
    ],
)
def test_what_stays_runs_on(make, step, recwarn):
    model, optimizer, ff = attached(make)
    for n in range(12):
        backward(model, n)
        step(model, optimizer)
    assert [stage.optimizer_step for stage in ff.stages] == [3, 6, 9, 12]
    assert ff.stages[0].tau > 8
    assert not said(recwarn, "taken back")


def test_overshoot_of_a_noisy_batch_is_no_taking_back():
    """The step after a stage goes back by more than the stage's share, but by few updates."""
    model, optimizer, ff = attached(torch.optim.SGD, max_tau=4)
    for n in range(12):
        backward(model, n)
        if n == 3:
            for p in model.parameters():
                p.grad.mul_(-5)
        optimizer.step()
    assert [stage.tau for stage in ff.stages] == [4] * 4 and ff.active


class TwoPhases(torch.optim.SGD):
    """Sharpness-aware descent that is called by its two halves and never by step()."""

    @torch.no_grad()
    def ascend(self):
        self.old = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def descend(self):
        for group in self.param_groups:
            for p, old in zip(group["params"], self.old, strict=True):
                p.data = old
                p.sub_(p.grad, alpha=group["lr"])


def by_halves(model, optimizer, n):
    backward(model, n)
    optimizer.ascend()
    backward(model, n)
    optimizer.descend()


def another_one(model, optimizer, n):
    backward(model, n)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=1e-3)


def replaced(model, optimizer, n):
    """As a compiled or captured step in its place, which runs no hook."""
    optimizer.step = lambda: another_one(model, optimizer, n)
    optimizer.step()


@pytest.mark.parametrize("step", [by_halves, another_one, replaced])
def test_a_step_that_is_never_called_is_told_of_once(step):
    model, optimizer, ff = attached(TwoPhases)
    with pytest.warns(FFKernelsNotice) as warned:
        for n in range(20):
            step(model, optimizer, n)
    (once,) = said(warned, "has not been called")
    assert once.startswith("the weights have changed over 4 gradients, but TwoPhases.step() has not been")
    assert (ff.optimizer_steps, ff.stages) == (0, [])
    optimizer.__dict__.pop("step", None)
    optimizer.step()
    assert ff.optimizer_steps == 1
    ff.detach()
    assert not optimizer._optimizer_step_pre_hooks and not model.b._post_accumulate_grad_hooks


def test_gradients_that_are_gathered_for_one_step_are_none(recwarn):
    model, optimizer, _ff = attached(torch.optim.SGD)
    with torch.no_grad():
        model.b.add_(1)  # as a checkpoint that is loaded now
    for n in range(40):
        model.loss().backward()
        if n % 16 == 15:
            optimizer.step()
    assert not said(recwarn, "has not been called")
    assert not model.b._post_accumulate_grad_hooks
