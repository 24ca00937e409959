"""FastForward in plain torch loops, on models small enough to know what must come out."""

import copy
import math
import signal

import pytest
import torch
from small_loops import descend
from torch import nn

from ffkernels import FastForward, FastForwardConfig, Stage, ValidationLoss, ops
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.search.search import BASELINE_NOT_FINITE
from ffkernels.stage.program import NO_UPDATE, UPDATE_NOT_FINITE

SCALES = torch.tensor([1.0, 0.3, 3.0, 0.1])
TARGET = torch.tensor([2.0, -1.0, 0.5, 4.0])


class Bowl(nn.Module):
    """A quadratic bowl around TARGET; frozen and dropout parts beside the trained one."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.drop = nn.Dropout(0.5)

    def loss(self, noise=0.0):
        return (SCALES * (self.w.float() - TARGET + noise) ** 2).sum()


def bowl_loss(model):
    return model.loss()


def rising():
    """A validation loss that no step improves."""
    calls = iter(range(10**6))
    return lambda model: float(next(calls))


def train(model, optimizer, steps, seed=0, first=0):
    for step in range(first, first + steps):
        noise = torch.randn(4, generator=torch.Generator().manual_seed(1000 * seed + step))
        descend(optimizer, model.loss(0.1 * noise))
    return model


def plain_run(steps):
    """The same training without Fast Forward."""
    model = Bowl()
    optimizer = torch.optim.AdamW([model.w], lr=1e-3, weight_decay=0.0)
    return train(model, optimizer, steps), optimizer


def make(config=None, validation=bowl_loss, lr=1e-3, dtype=torch.float32, **kwargs):
    model = Bowl(dtype)
    optimizer = torch.optim.AdamW([model.w], lr=lr, weight_decay=0.0)
    ff = FastForward(model, optimizer, validation, config, **kwargs)
    return model, optimizer, ff


def remembering(seen):
    """The bowl's loss, which notes in ``seen`` what it was at which weights."""

    def validation(model):
        seen.append((model.loss().item(), model.w.detach().clone()))
        return model.loss()

    return validation


def best_of(seen):
    return min(seen, key=lambda pair: pair[0])


@pytest.mark.parametrize("search", ["linear", "parabolic"])
def test_a_stage_lands_on_the_best_multiple_of_the_last_update(search):
    model, optimizer, ff = make(FastForwardConfig(interval=3, search=search))
    train(model, optimizer, 2)
    before = model.w.detach().clone()
    # The same third step on a copy without Fast Forward gives Δ; brute force over τ gives the truth.
    plain = Bowl()
    plain.load_state_dict(model.state_dict())
    plain_optimizer = torch.optim.AdamW([plain.w], lr=1e-3, weight_decay=0.0)
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(plain, plain_optimizer, 1, first=2)
    train(model, optimizer, 1, first=2)
    delta = plain.w.detach() - before
    after = plain.w.detach().clone()
    losses = []
    for tau in range(1025):
        plain.w.data = after + tau * delta
        losses.append(plain.loss().item())
    best = min(range(1025), key=losses.__getitem__)
    (stage,) = ff.stages
    assert best > 50
    assert abs(stage.tau - best) <= 1
    assert stage.optimizer_step == 3
    assert stage.loss_before == pytest.approx(losses[0], rel=1e-6)
    assert stage.loss_after == model.loss().item()
    assert stage.loss_after == pytest.approx(losses[best], rel=1e-3)
    # The linear search adds Δ hundreds of times, one rounding each.
    assert torch.allclose(model.w, after + stage.tau * delta, rtol=1e-4, atol=0)
    assert stage.evaluations < 20 if search == "parabolic" else stage.evaluations == stage.tau + 2


def test_the_weights_kept_are_the_validated_ones_bit_for_bit():
    seen = []
    model, optimizer, ff = make(FastForwardConfig(interval=2), remembering(seen))
    train(model, optimizer, 2)
    loss, weights = best_of(seen)
    assert ff.stages[0].loss_after == pytest.approx(loss, rel=1e-7)
    assert torch.equal(model.w, weights)


@pytest.mark.parametrize(
    ("config", "validation", "steps", "stages", "active"),
    [
        (dict(interval=4, warmup=3, patience=None), bowl_loss, 16, [7, 11, 15], True),
        (dict(interval=2, patience=2), rising(), 20, [2, 4], False),  # off for good
    ],
)
def test_stages_follow_warmup_interval_and_patience(config, validation, steps, stages, active):
    model, optimizer, ff = make(FastForwardConfig(**config), validation)
    train(model, optimizer, steps)
    assert [stage.optimizer_step for stage in ff.stages] == stages
    assert ff.active == active and ff.optimizer_steps == steps


@pytest.mark.parametrize("search", ["linear", "parabolic"])
def test_no_accepted_step_is_the_plain_run_bit_for_bit(search):
    model, optimizer, ff = make(FastForwardConfig(interval=2, search=search, patience=None), rising())
    train(model, optimizer, 11)
    plain, plain_optimizer = plain_run(11)
    assert [stage.tau for stage in ff.stages] == [0] * 5
    assert torch.equal(model.w, plain.w)
    mine, theirs = optimizer.state_dict()["state"][0], plain_optimizer.state_dict()["state"][0]
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_stage_that_helps_resets_patience():
    fail, worse = {2, 6, 8, 10}, rising()
    model, optimizer, ff = make(
        FastForwardConfig(interval=2, patience=3),
        lambda model: worse(model) if ff.optimizer_steps in fail else model.loss(),
    )
    train(model, optimizer, 14)
    assert [stage.optimizer_step for stage in ff.stages if stage.tau == 0] == [2, 6, 8, 10]
    assert len(ff.stages) == 5
    assert not ff.active


def test_a_search_starts_where_that_of_the_last_stage_ended():
    """A stage that was interrupted, or had nothing to compare, does not count."""
    calls = iter(range(1000))
    cut = []

    def validation(model):
        if next(calls) in cut:
            raise TypeError("stop here")
        return math.nan if broken else model.loss()

    broken = False
    model, optimizer, ff = make(FastForwardConfig(interval=1, patience=None), validation, lr=1e-3)
    train(model, optimizer, 2)
    first, second = ff.stages
    assert first.tau > 50 and [tau for tau, _ in first.losses[:3]] == [0, 1, 2]
    assert [tau for tau, _ in second.losses[:2]] == [0, first.tau]
    cut.append(next(calls) + 4)
    with pytest.raises(TypeError, match="stop here"):
        train(model, optimizer, 1, first=2)
    broken = True
    train(model, optimizer, 1, first=3)
    broken = False
    train(model, optimizer, 1, first=4)
    assert [len(stage.losses) for stage in ff.stages[2:4]] == [3, 1]
    assert ff.stages[4].losses[1][0] == second.tau > 1


def test_state_dict_holds_patience_and_refuses_foreign_state():
    model, optimizer, ff = make(FastForwardConfig(interval=2, patience=2), rising())
    train(model, optimizer, 4)
    _, _, again = make(FastForwardConfig(interval=2, patience=2))
    again.load_state_dict(ff.state_dict())
    assert not again.active
    assert again.stages == ff.stages
    with pytest.raises(ValueError, match="not a FastForward state of version 1: got None"):
        again.load_state_dict({"weights": 3})
    _, _, other = make(FastForwardConfig(interval=3, patience=2))
    with pytest.warns(UserWarning, match="'interval': 2"):
        other.load_state_dict(ff.state_dict())


def test_a_skipped_step_or_one_that_is_not_finite_has_nothing_to_repeat():
    model, optimizer, ff = make(FastForwardConfig(interval=1, patience=1), lr=0.0)
    train(model, optimizer, 3)
    assert [stage.stopped_because for stage in ff.stages] == [NO_UPDATE] * 3
    assert all(stage.losses == [] and stage.tau == 0 and math.isnan(stage.loss_before) for stage in ff.stages)
    assert ff.active, "a step that was skipped is not a failure of Fast Forward"
    model.w.grad = torch.full((4,), math.nan)
    optimizer.step()
    assert (ff.stages[3].stopped_because, ff.stages[3].losses) == (UPDATE_NOT_FINITE, [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_kept(bad):
    model, optimizer, ff = make(FastForwardConfig(interval=1, patience=1), lambda model: bad)
    train(model, optimizer, 1)
    plain, _ = plain_run(1)
    assert torch.equal(model.w, plain.w)
    assert ff.stages[0].stopped_because == BASELINE_NOT_FINITE
    assert ff.active
    model, optimizer, ff = make(
        FastForwardConfig(interval=1, search="linear"),
        lambda model: bad if (model.w.abs() > 0.0055).any() else model.loss(),
    )
    train(model, optimizer, 1)
    assert ff.stages[0].tau == 4
    assert torch.isfinite(model.w).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, TypeError])
@pytest.mark.parametrize("at", [1, 2, 3, 6])
@pytest.mark.parametrize("search", ["linear", "parabolic"])
def test_an_exception_leaves_the_best_validated_weights(error, at, search):
    seen = []
    remember = remembering(seen)

    def validation(model):
        if len(seen) + 1 == at:
            raise error("stop here")
        return remember(model)

    model, optimizer, ff = make(FastForwardConfig(interval=1, search=search), validation)
    model.train()
    model.frozen.eval()
    with pytest.raises(error):
        train(model, optimizer, 1)
    plain, _ = plain_run(1)
    assert torch.equal(model.w, best_of(seen)[1] if seen else plain.w)
    assert model.training and model.drop.training and not model.frozen.training
    assert ff.stages[0].stopped_because == f"interrupted by {error.__name__}"
    assert ff.stages[0].evaluations == at - 1
    ff.detach()


def test_an_interrupt_during_a_move_waits_for_its_end(monkeypatch):
    real, calls = ops.step_, []

    def step_with_ctrl_c_in_the_middle(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "step_", step_with_ctrl_c_in_the_middle)
    seen = []
    model, optimizer, _ff = make(FastForwardConfig(interval=1), remembering(seen))
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 1)
    assert len(seen) == 3
    assert torch.equal(model.w, best_of(seen)[1])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_modes_grads_rng_and_grad_mode_are_untouched():
    def noisy(model):
        assert not model.training and not model.drop.training
        assert not torch.is_grad_enabled()
        torch.rand(7)
        return model.loss()

    model, optimizer, ff = make(FastForwardConfig(interval=1), noisy)
    model.train()
    model.frozen.eval()
    model.loss().backward()
    grad, rng = model.w.grad.clone(), torch.get_rng_state()
    optimizer.step()
    assert ff.stages[0].tau > 0
    assert torch.equal(model.w.grad, grad)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training and model.drop.training and not model.frozen.training
    assert torch.is_grad_enabled()


def test_weights_that_become_others_inside_a_step_are_left_alone():
    model, optimizer, ff = make(FastForwardConfig(interval=1))
    optimizer.register_step_pre_hook(lambda *_: setattr(model.w, "data", model.w.data.double()))
    optimizer.step()
    assert ff.stages[0].stopped_because == "the weights were replaced during the optimizer's step"
    assert ff.stages[0].tau == 0


def test_detach_and_the_context_manager_take_the_hooks_off():
    model, optimizer, ff = make(FastForwardConfig(interval=1))
    with ff as same:
        assert same is ff and ff.active
        train(model, optimizer, 1)
    assert not ff.active
    assert ff.trainable_numel == 0
    train(model, optimizer, 2, first=1)
    assert len(ff.stages) == 1
    ff.detach()
    with FastForward(model, optimizer, bowl_loss) as again:
        assert again.active


def test_on_stage_is_called_and_stages_become_plain_data():
    model, optimizer, ff = make(FastForwardConfig(interval=2))
    seen = []
    ff.on_stage = seen.append
    train(model, optimizer, 4)
    assert seen == ff.stages
    stage = seen[0]
    assert Stage.from_dict(stage.to_dict()) == stage
    assert stage.executor == "eager"
    assert 0 < stage.validate_seconds + stage.move_seconds <= stage.seconds


def test_flops_are_the_validations_and_two_per_moved_element():
    model = nn.Linear(8, 4, bias=False)
    x, y = torch.randn(16, 8), torch.randn(16, 4)

    def loss(model):
        return ((model(x) - y) ** 2).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ff = FastForward(model, optimizer, ValidationLoss(model, loss), FastForwardConfig(interval=1))
    descend(optimizer, loss(model))
    stage = ff.stages[0]
    assert stage.flops == stage.evaluations * (2 * 16 * 8 * 4 + 2 * 32)


@pytest.mark.parametrize("impl", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_work_and_are_warned_about(dtype, impl, recwarn):
    model, optimizer, ff = make(FastForwardConfig(interval=2, impl=impl), lr=1e-2, dtype=dtype)
    train(model, optimizer, 4)
    assert ff.stages[0].tau > 0
    assert model.w.dtype == dtype
    best = min(loss for _, loss in ff.stages[-1].losses)
    assert model.loss().item() == best


def test_bad_arguments_and_a_validation_of_another_model_are_named():
    model = Bowl()
    optimizer = torch.optim.SGD([model.w], lr=1e-3)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        FastForward("model", optimizer, bowl_loss)
    with pytest.raises(TypeError, match="config must be a FastForwardConfig, got dict"):
        FastForward(model, optimizer, bowl_loss, {"interval": 3})
    with pytest.raises(ValueError, match="none of the model's 1 trainable parameters"):
        FastForward(Bowl(), optimizer, bowl_loss)
    with pytest.raises(ValueError, match="validation belongs to a model that has none of the weights"):
        FastForward(model, optimizer, ValidationLoss(Bowl(), bowl_loss))


def test_a_second_one_is_refused_and_detaching_twice_leaves_the_next_one_attached():
    model, optimizer, ff = make()
    with pytest.raises(RuntimeError, match="already carries a FastForward; call its detach"):
        FastForward(model, optimizer, bowl_loss)
    ff.detach()
    with FastForward(model, optimizer, bowl_loss):
        ff.detach()
        with pytest.raises(RuntimeError, match="already carries a FastForward"):
            FastForward(model, optimizer, bowl_loss)


def test_an_incomplete_state_is_refused_before_anything_changes():
    model, optimizer, ff = make(FastForwardConfig(interval=2))
    train(model, optimizer, 2)
    state = ff.state_dict()
    del state["stages"], state["config"]
    with pytest.raises(ValueError, match="incomplete: config, stages missing"):
        ff.load_state_dict(state)
    assert len(ff.stages) == 1


LAYS = {
    # As embeddings whose matrix is kept the other way round, or checkpoints that store x @ W.
    "transposed": lambda weight: weight.t().contiguous().t(),
    # One matrix behind several parameters, of which each has its columns.
    "columns": lambda weight: torch.cat([weight, weight], 1)[:, :192],
}


def image_net():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 1))
    return net.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["channels_last", *LAYS])
def test_weights_in_any_order_of_memory_train_as_contiguous_ones(kind):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, *shape, generator=generator) for shape in ((3, 8, 8), (1,)))

    def train_it(plain):
        torch.manual_seed(0)
        if kind == "channels_last":
            model = image_net()
            if plain:
                model = model.to(memory_format=torch.contiguous_format)
        else:
            model = nn.Linear(192, 5)
            if not plain:
                model.weight = nn.Parameter(LAYS[kind](model.weight.detach()))
        odd = [name for name, p in model.named_parameters() if not p.is_contiguous()]

        def loss(model):
            return ((model(x if kind == "channels_last" else x.flatten(1)) - y) ** 2).mean()

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ff = FastForward(model, optimizer, loss, FastForwardConfig(interval=3))
        for _ in range(9):
            descend(optimizer, loss(model))
        return model, ff, odd, loss(model).item()

    model, ff, odd, loss = train_it(plain=False)
    twin, expected, none, _ = train_it(plain=True)
    assert odd and not none
    assert [s.tau for s in ff.stages] == [s.tau for s in expected.stages] and ff.stages[0].tau > 3
    assert ff.stages[-1].loss_after == pytest.approx(loss, rel=1e-6)
    assert ff.state_dict()["alignment"]["strongest"] == pytest.approx(
        expected.state_dict()["alignment"]["strongest"], rel=1e-3
    )
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6)


def of_a_matrix(start, target):
    """A matrix that is to become ``target``, with a stage at each step."""
    model = nn.Module()
    model.w = nn.Parameter(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = FastForwardConfig(interval=1)
    ff = FastForward(model, optimizer, lambda model: ((model.w - target) ** 2).sum(), config)
    return model, optimizer, ff


def test_weights_that_turned_into_something_else_are_named():
    model, optimizer, _ff = of_a_matrix(torch.eye(3), 0.0)
    model.w.data = model.w.data[:1].expand(3, 3)  # same address and shape
    model.w.grad = torch.ones(3, 3)
    with (
        pytest.raises(ValueError, match=r"w is not contiguous .* share memory"),
        pytest.warns(FFKernelsNotice, match="the trainable parameters changed"),
    ):
        optimizer.step()


def test_weights_that_were_transposed_in_place_are_followed():
    target = torch.full((3, 3), 4.0)
    model, optimizer, ff = of_a_matrix(torch.arange(9.0).reshape(3, 3), target)
    model.w.data = model.w.data.t()  # same address and shape
    model.w.grad = (2 * (model.w.detach() - target)).contiguous()
    with pytest.warns(FFKernelsNotice, match="the trainable parameters changed"):
        optimizer.step()
    assert ff.stages[0].tau > 300
    torch.testing.assert_close(model.w.detach(), target, rtol=0, atol=1e-2)


def test_an_interrupt_while_flops_are_counted_keeps_the_stage():
    class Interrupted(ValidationLoss):
        @property
        def flops(self):
            raise KeyboardInterrupt

    model = Bowl()
    optimizer = torch.optim.AdamW([model.w], lr=1e-3)
    ff = FastForward(model, optimizer, Interrupted(model, bowl_loss), FastForwardConfig(interval=1))
    seen = []
    ff.on_stage = seen.append
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 1)
    assert seen == ff.stages
    assert ff.stages[0].tau > 0
    assert ff.stages[0].flops == 0
    assert model.loss().item() == ff.stages[0].loss_after


def test_a_deferred_stage_waits_for_its_call_and_lands_where_the_undeferred_one_does():
    config = FastForwardConfig(interval=3)
    model, optimizer, ff = make(config)
    train(model, optimizer, 3)
    later, late_optimizer, late = make(config, defer=True)
    train(later, late_optimizer, 3)
    assert late.stages == [] and not torch.equal(later.w, model.w)
    stage = late.run_due_stage()
    assert stage is late.stages[0] and stage.tau == ff.stages[0].tau > 0
    assert torch.equal(later.w, model.w)
    assert late.run_due_stage() is None  # once
    train(later, late_optimizer, 1, first=3)
    assert late.run_due_stage() is None  # not due


def test_a_deferred_stage_that_nobody_ran_is_dropped_by_the_next_step():
    model, optimizer, ff = make(FastForwardConfig(interval=3), defer=True)
    train(model, optimizer, 4)
    assert ff.run_due_stage() is None and ff.stages == []
    train(model, optimizer, 2, first=4)
    assert ff.run_due_stage().optimizer_step == 6
