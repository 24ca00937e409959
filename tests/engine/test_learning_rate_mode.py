"""FastForwardConfig(learning_rate="find"): found once in a training, kept, set everywhere, and resumed."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ffkernels import FastForward, FastForwardConfig, find_learning_rate
from ffkernels.engine.fast_forward import attached
from ffkernels.ops.notices import FFKernelsNotice

SCALES = torch.tensor([1.0, 0.3, 3.0, 0.1])
TARGET = torch.tensor([2.0, -1.0, 0.5, 4.0])
FIND = FastForwardConfig(learning_rate="find", interval=4, patience=None)


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))


def bowl_loss(model):
    return float((SCALES * (model.w - TARGET) ** 2).sum())


def train(model, optimizer, steps, scheduler=None, first=0):
    for step in range(first, first + steps):
        noise = torch.randn(4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (SCALES * (model.w - TARGET + 0.1 * noise) ** 2).sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def make(config=FIND, lr=1e-4, shape=None, **options):
    model = Bowl()
    optimizer = torch.optim.Adam([model.w], lr=lr)
    scheduler = LambdaLR(optimizer, shape) if shape else None
    ff = FastForward(model, optimizer, bowl_loss, config, scheduler=scheduler, **options)
    return model, optimizer, scheduler, ff


def test_what_is_found_is_kept_and_set():
    model, optimizer, _, ff = make()
    assert ff.finding is None and ff.lr_scale == 1.0
    train(model, optimizer, 2)
    assert ff.finding.optimizer_step == 2 and not ff.stages
    assert bowl_loss(model) == ff.finding.loss_after < 0.7 * ff.finding.loss_before
    assert optimizer.param_groups[0]["lr"] == ff.finding.lr == pytest.approx(1e-4 * ff.lr_scale)
    assert ff.lr_scale > 100
    train(model, optimizer, 7, first=2)
    assert ff.finding.optimizer_step == 2  # once
    assert ff.stages[0].optimizer_step == 4


def test_it_is_what_find_learning_rate_finds():
    model, optimizer, _, ff = make(FastForwardConfig(learning_rate="find", find_after=3, interval=100))
    other = Bowl()
    train(model, optimizer, 3)
    steps = iter(range(3))
    alone = torch.optim.Adam([other.w], lr=1e-4)
    finding = find_learning_rate(
        other, alone, lambda: train(other, alone, 1, first=next(steps)), bowl_loss, after=3, keep_move=True
    )
    assert finding.lr == ff.finding.lr and finding.curve == ff.finding.curve
    assert torch.equal(model.w, other.w)


def test_keep_is_the_default_and_leaves_no_mark():
    config = FastForwardConfig(interval=3)
    assert config.learning_rate == "keep" and config.find_after == 2
    model, optimizer, _, ff = make(config)
    train(model, optimizer, 7)
    assert ff.finding is None and ff.lr_scale == 1.0 and optimizer.param_groups[0]["lr"] == 1e-4
    assert ff.stages and "learning_rate" not in ff.state_dict()


@pytest.mark.parametrize("shape", [lambda k: min(1, (k + 1) / 8), lambda k: k / 8, lambda k: 1 - k / 40])
def test_schedules_keep_their_shape_around_what_was_found(shape):
    model, optimizer, scheduler, ff = make(shape=shape)
    train(model, optimizer, 12, scheduler)
    assert ff.finding.lr == pytest.approx(1e-4 * ff.finding.scale)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(ff.finding.lr * shape(12))
    # 1 + τ is of the step that was searched, which had less than the base learning rate
    step = ff.finding.optimizer_step
    assert ff.finding.part == (1.2 if shape(40) == 0 else 0.7)
    assert ff.finding.scale == pytest.approx(ff.finding.part * (1 + ff.finding.tau) * shape(step - 1))
    assert step == (3 if shape(0) == 0 else 2)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_resumed_run_continues_bit_for_bit(at):
    def shape(k):
        return min(1, (k + 1) / 4)

    model, optimizer, scheduler, ff = make(shape=shape)
    train(model, optimizer, at, scheduler)
    saved = copy.deepcopy(
        [model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), ff.state_dict()]
    )
    train(model, optimizer, 9 - at, scheduler, first=at)

    again, fresh, schedule, other = make(shape=shape)
    for part, state in zip((again, fresh, schedule, other), saved, strict=True):
        part.load_state_dict(state)
    assert (other.finding is None) == (at == 1)
    file = io.BytesIO()
    torch.save(saved[-1], file)  # plain values
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True) == saved[-1]
    train(again, fresh, 9 - at, schedule, first=at)
    assert torch.equal(model.w, again.w)
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert other.lr_scale == ff.lr_scale and other.finding.curve == ff.finding.curve


def test_a_run_that_is_set_back_finds_again():
    model, optimizer, _, ff = make()
    train(model, optimizer, 1)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), ff.state_dict()])
    train(model, optimizer, 3, first=1)
    found = ff.finding
    for part, state in zip((model, optimizer, ff), saved, strict=True):
        part.load_state_dict(state)
    assert ff.finding is None and ff.lr_scale == 1.0
    train(model, optimizer, 3, first=1)
    assert ff.finding.curve == found.curve and ff.finding.lr == found.lr


def test_a_search_is_resumed_with_its_losses_by_example(tiny_model, padded_batch):
    data = [padded_batch(5, 24, seed=i) for i in range(2)]

    def make():
        model = tiny_model("llama", attention_dropout=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        return model, optimizer, FastForward(model, optimizer, [padded_batch(8, 24, seed=9)], FIND)

    def step(model, optimizer, batch):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    model, optimizer, ff = make()
    step(model, optimizer, data[0])
    weights, state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    saved = json.loads(json.dumps(ff.state_dict()))
    step(model, optimizer, data[1])
    again, fresh, other = make()
    again.load_state_dict(weights), fresh.load_state_dict(state), other.load_state_dict(saved)
    step(again, fresh, data[1])
    assert other.finding.judged_by == "examples" and other.finding.curve == ff.finding.curve
    assert other.finding.lr == ff.finding.lr and other.finding.evaluations == ff.finding.evaluations
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_scheduler_that_was_not_passed_is_missed():
    model, optimizer, _, _ff = make()
    scheduler = LambdaLR(optimizer, lambda k: 1.0)
    with pytest.raises(RuntimeError, match="scheduler=scheduler"):
        train(model, optimizer, 1, scheduler)


def test_a_loop_that_sets_its_own_learning_rate_is_told():
    model, optimizer, _, _ff = make()
    train(model, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 1e-4
    with pytest.warns(FFKernelsNotice, match="lr_scale"):
        train(model, optimizer, 1, first=2)


def test_a_loop_that_multiplies_by_lr_scale_is_not(recwarn):
    model, optimizer, _, ff = make()
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-4 * min(1, (step + 1) / 4) * ff.lr_scale
        train(model, optimizer, 1, first=step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(ff.finding.lr)
    # The searched step had 2/4 of the base rate, which is what is found.
    assert ff.finding.scale == pytest.approx(0.7 * (1 + ff.finding.tau) / 2)
    assert ff.finding.curve[1][0] == pytest.approx(0.5e-4)
    assert not [w for w in recwarn if "lr_scale" in str(w.message)]


def test_an_interrupted_search_leaves_the_optimizers_weights_and_begins_again():
    calls = []

    def validation(model):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return bowl_loss(model)

    model = Bowl()
    optimizer = torch.optim.Adam([model.w], lr=1e-4)
    ff = FastForward(model, optimizer, validation, FIND)
    plain = Bowl()
    train(plain, torch.optim.Adam([plain.w], lr=1e-4), 2)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 2)
    assert torch.equal(model.w, plain.w) and ff.finding is None
    train(model, optimizer, 2, first=2)
    assert ff.finding.optimizer_step == 4


def test_deferred_stages_come_after_it():
    model, optimizer, _, ff = make(defer=True)
    for step in range(4):
        train(model, optimizer, 1, first=step)
        stage = ff.run_due_stage()
    assert ff.finding is not None and stage.optimizer_step == 4


def test_what_is_refused():
    for field, value in (("learning_rate", "guess"), ("find_after", 0)):
        with pytest.raises(ValueError, match=f"{field}={value!r}"):
            FastForwardConfig(**{field: value})
    model = Bowl()
    optimizer = torch.optim.LBFGS([model.w])
    with pytest.raises(ValueError, match="LBFGS"):
        FastForward(model, optimizer, bowl_loss, FIND)
    assert attached(optimizer) is None
    optimizer = torch.optim.Rprop([model.w])
    kept = FastForward(model, optimizer, bowl_loss, FIND)
    with pytest.raises(ValueError, match="does not scale"):
        train(model, optimizer, 2)
    assert kept.finding is None
