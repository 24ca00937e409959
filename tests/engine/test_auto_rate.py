"""FastForwardConfig(learning_rate="auto"): rise, undo and trims by value, in every loop that people write."""

import copy
import io
import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from small_loops import descend, same, same_weights, weights_of
from torch import nn
from torch.optim import lr_scheduler

from ffkernels import FastForward, FastForwardConfig
from ffkernels.engine import alignment as alignment_module
from ffkernels.engine.auto_rate import HIGHEST, LOWEST, START
from ffkernels.ops.notices import FFKernelsNotice

AUTO = FastForwardConfig(learning_rate="auto", interval=None)
CURVATURE = torch.tensor([1.0, 0.3, 3.0, 0.1])
TARGET = torch.tensor([2.0, -1.0, 0.5, 4.0])


class Bowl(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.b = nn.Parameter(torch.ones(2, dtype=dtype))

    def loss(self, step=0, noise=0.1):
        shift = noise * torch.randn(4, generator=torch.Generator().manual_seed(step))
        return (CURVATURE * (self.w.float() - TARGET + shift) ** 2).sum() + (self.b.float() ** 2).sum()


def bowl_loss(model):
    with torch.no_grad():
        return float(model.loss(noise=0.0))


class Line(nn.Module):
    """Half of curvature · w²: SGD's edge lies at 2 / curvature."""

    def __init__(self, curvature, start=1.0):
        super().__init__()
        self.curvature = curvature
        self.w = nn.Parameter(torch.tensor([start], dtype=torch.float32))

    def loss(self):
        return 0.5 * self.curvature * (self.w**2).sum()


def train(model, optimizer, steps, scheduler=None, first=0, noise=0.1, write=None):
    """Plain training; the weights after each step."""
    seen = []
    for step in range(first, first + steps):
        if write is not None:
            write(step)
        descend(optimizer, model.loss(step, noise))
        if scheduler is not None:
            scheduler.step()
        seen.append(weights_of(model))
    return seen


def make(config=AUTO, lr=1e-4, kind=torch.optim.Adam, schedule=None, groups=None, model=None, **options):
    model = model or Bowl()
    optimizer = kind(groups(model) if groups else model.parameters(), lr=lr, **options)
    scheduler = schedule(optimizer) if schedule else None
    validation = None if config.interval is None else bowl_loss
    return model, optimizer, scheduler, FastForward(model, optimizer, validation, config, scheduler=scheduler)


def shaped(shape):
    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, shape)


def auto(ff):
    return ff._decision.auto


def by_hand(cosines, shape=lambda step: 1.0):
    """The base rate after each of these steps' c (None: not known), and which steps were not taken."""
    rate, rising, jump, level, row, heard, rates, undone = START, True, 4.0, None, 0, [], [], []
    for step, c in enumerate(cosines):
        over = c is not None and rising and c > 0
        if c is not None and rising:
            strong = c < 0 and (level is None or c <= 0.5 * level)
            if not over:
                level = c if level is None else (level + c) / 2
            row = row + 1 if strong else 0
            if strong and row >= 3 and jump < 4:
                jump, row = min(4.0, jump**2), 0
            if not strong and level is not None:
                jump **= 0.5
                rising = jump >= 1.2
            rate *= jump if strong else 1 / jump if over else 1
        elif c is not None:
            heard.append(c)
            rate *= math.exp(-pull(heard, step > 0 and shape(step) < shape(step - 1)))
        rates.append(rate)
        undone.append(over)
    return rates, undone


def averaged(values):
    """The mean of up to ten, and from then on the exponential one."""
    mean = 0.0
    for n, value in enumerate(values, 1):
        mean = sum(values[:n]) / n if n <= 10 else 0.9 * mean + 0.1 * value
    return mean


def pull(heard, falls=False):
    """The logarithm of the last of these trims."""
    n = len(heard) - 1
    found = averaged(heard) if falls else heard[-1]
    only_up = falls
    if n >= 4:
        noise = math.sqrt(averaged([(b - a) ** 2 / 2 for a, b in itertools.pairwise(heard)]))
        only_up = falls and found <= noise
        found = 0.05 * (found / noise + 0.5) if noise else found
    return min(max(found, -0.35), 0.0 if only_up else 0.35) / (1 + n / 40)


def followed(ff, model, optimizer, steps, scheduler=None, look=lambda step: None, **options):
    """c and the base rate of each step, after which ``look`` is called."""
    cosines, rates = [], []
    for step in range(steps):
        train(model, optimizer, 1, scheduler, first=step, **options)
        cosines.append(ff.alignment)
        rates.append(ff.learning_rate)
        look(step)
    return cosines, rates


def resume(states, **options):
    """A run made anew that has loaded these states."""
    model, optimizer, _, ff = made = make(**options)
    for part, state in zip((model, optimizer, ff), states, strict=True):
        part.load_state_dict(state)
    return made


def states_of(*parts):
    return copy.deepcopy([part.state_dict() for part in parts])


def test_it_begins_far_below_whatever_rate_is_given():
    assert (START, LOWEST, HIGHEST) == (1e-5, 1e-9, 1e3)  # as the pages name them
    for given in (1e-9, 1e-4, 5.0):
        _, optimizer, _, ff = make(lr=given)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(START)
        assert ff.learning_rate == START and ff.lr_scale == pytest.approx(START / given)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_the_rate_follows_the_rule_step_by_step(kind):
    model, optimizer, _, ff = make(kind=kind)
    cosines, rates = followed(ff, model, optimizer, 60)
    expected, undone = by_hand(cosines)
    assert rates == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1], rel=1e-12)
    assert auto(ff).trims >= 40 and 1 <= sum(undone) <= 3
    assert bowl_loss(model) < 0.05 * bowl_loss(Bowl())


@contextmanager
def measured_as(cosines):
    """Every c but the first, which is not known, as it comes of the list; None as where nothing moved."""
    given, measured = iter(cosines[1:]), alignment_module.ops.align_

    def align(table, grads, out=None):
        sums = measured(table, grads, out)
        c = next(given)
        sums[0], sums[1], sums[2] = c or 0.0, 1.0, 0.0 if c is None else 1.0
        return sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment_module.ops, "align_", align)
        yield


def rates_of(cosines, **options):
    """The base rates where c comes as this list says, the run, and its weights before and after each step."""
    model, optimizer, scheduler, ff = make(**options)
    states = [weights_of(model)]
    with measured_as(cosines):
        seen, rates = followed(
            ff, model, optimizer, len(cosines), scheduler, lambda step: states.append(weights_of(model))
        )
    assert [c for c, s in zip(cosines, seen, strict=True) if s is not None] == pytest.approx(
        [s for s in seen if s is not None]
    )
    return rates, ff, states


def test_a_rise_ends_after_three_halvings_of_its_jump():
    """Strong, strong, over, strong, weak, over; then c drives."""
    rates, ff, states = rates_of([None, -0.5, -0.6, 0.2, None, -0.4, -0.1, 0.1, None, -0.2])
    last = 16 / 2**0.25
    expected = [1, 4, 16, 8, 8, 16, 16, last, last]
    assert rates[:9] == pytest.approx([1e-5 * rate for rate in expected], rel=1e-12)
    assert not auto(ff).rising and auto(ff).trims == 1
    for over in (3, 7):  # the weights are those before the step before
        assert same(states[over + 1], states[over - 1]) and not same(states[over], states[over - 1])


def test_noise_that_is_mistaken_for_the_edge_does_not_end_a_rise():
    """Weak and over at the start; three strong ones in a row restore the jump each time, up to 4."""
    cosines = [None, -0.3, -0.05, 0.02, None, -0.3, -0.3, -0.3, -0.3, -0.3, -0.3, -0.3]
    rates, ff, _ = rates_of(cosines)
    root = 2**0.5
    factors = [1, 4, 1, 1 / root, 1, root, root, 2, 2, 2, 4, 4]
    expected = list(itertools.accumulate(factors, lambda rate, factor: rate * factor, initial=1e-5))[1:]
    assert rates == pytest.approx(expected, rel=1e-12) and ff.rising


def test_the_level_of_c_may_sink():
    """As where the first step alone is strong: from then on strong is half of what there is."""
    rates, ff, _ = rates_of([None, -0.5, -0.15, -0.15, -0.15, -0.15])
    assert rates == pytest.approx([1e-5, 4e-5, 4e-5, 4e-5, 4e-5 * 2**0.5, 4e-5 * 2], rel=1e-12)
    assert ff.rising


@pytest.mark.parametrize("tail", [[-0.3], [0.3, 0.25], [-0.1, 0.05, -0.12, 0.1, 0.3, -0.4] * 4])
def test_trims_are_in_units_of_the_noise_of_c(tail):
    rise = [None, -0.5, -0.1, -0.1, -0.02]
    cosines = rise + tail
    rates, ff, _ = rates_of(cosines)
    heard = cosines[len(rise) :]
    expected = [rates[len(rise) - 1]]
    for n in range(1, len(heard) + 1):
        expected.append(expected[-1] * math.exp(-pull(heard[:n])))
    assert rates[len(rise) :] == pytest.approx(expected[1:], rel=1e-9)
    assert auto(ff).trims == len(tail) and not ff.rising


def test_trims_have_no_scale():
    """A tenth of every c, in the fifth trim and later, moves the rate as far."""
    rise, tail = [None, -0.5, -0.1, -0.1, -0.02], [-0.1, 0.05, -0.12, 0.1, 0.3, -0.4] * 4
    large, small = (rates_of([*rise, *(scale * c for c in tail)])[0] for scale in (1.0, 0.1))
    known = len(rise) + 4
    ratios = [[b / a for a, b in itertools.pairwise(rates[known - 1 :])] for rates in (large, small)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)
    assert max(ratios[0]) > 1.02 and min(ratios[0]) < 0.98


def test_a_peak_is_left_to_a_schedule_that_falls_unless_it_is_too_low():
    """Under a rate that falls, but for one step of it, the mean counts, and only where it is below 0."""
    rise = [None, -0.5, -0.1, -0.1, -0.02]
    tail = [0.1, 0.3, 0.4, -0.2, 0.3, -0.1, -0.9, -0.9, -0.9, -0.9, -0.9, 0.1]
    stays = len(rise) + 2

    def shape(step):
        return 1 - (step - (step >= stays)) / 40

    rates, _, _ = rates_of(rise + tail, schedule=shaped(shape))
    logs = [math.log(b / a) for a, b in itertools.pairwise(rates[len(rise) - 1 :])]
    falls = [step != stays for step in range(len(rise), len(rise) + len(tail))]
    expected = [-pull(tail[: n + 1], fell) for n, fell in enumerate(falls)]
    assert logs == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert logs[0] == logs[1] == logs[3] == logs[4] == 0 and logs[2] < 0  # it did not fall there
    assert logs[6] == 0 and all(log > 0 for log in logs[8:])  # −0.9 once is not yet the mean


def test_a_rate_beyond_the_edge_comes_down_also_where_the_schedule_falls():
    """c̄ above σ is no bouncing."""
    rise, tail = [None, -0.5, -0.1, -0.1, -0.02], [0.5, 0.6, 0.4, 0.55, 0.5, 0.6, 0.45, 0.5]
    rates, _, _ = rates_of(rise + tail, schedule=shaped(lambda step: 1 - step / 40))
    peak, trimmed = rates[len(rise) - 1], rates[len(rise) :]
    assert trimmed[:4] == [peak] * 4 and trimmed[7] < trimmed[6] < trimmed[5] < trimmed[4] < peak
    assert trimmed[7] / trimmed[6] == pytest.approx(math.exp(-pull(tail, falls=True)), rel=1e-9)


@pytest.mark.parametrize(("fall", "falls"), [(1e-6, True), (1e-7, False)])
def test_a_schedule_falls_beyond_the_rounding_of_float32(fall, falls):
    rise, tail = [None, -0.5, -0.1, -0.1, -0.02], [0.3]
    rates, _, _ = rates_of(rise + tail, schedule=shaped(lambda step: 1 - fall * step))
    assert (rates[-1] == rates[-2]) == falls


def test_where_c_has_no_noise_it_counts_itself():
    rise, tail = [None, -0.5, -0.1, -0.1, -0.02], [-0.25] * 8
    rates, _, _ = rates_of(rise + tail)
    expected = [math.exp(0.25 / (1 + n / 40)) for n in range(8)]
    assert [b / a for a, b in itertools.pairwise(rates[len(rise) - 1 :])] == pytest.approx(expected, rel=1e-9)


def test_c_of_0_is_weak():
    rates, ff, _ = rates_of([None, 0.0, -0.5, 0.0, 0.0, 0.3])
    assert rates[:4] == pytest.approx([1e-5, 1e-5, 1e-5 * 2, 1e-5 * 2], rel=1e-12) and not ff.rising
    assert auto(ff).trims == 1


def test_before_anything_was_strong_the_rate_goes_down_by_whole_jumps():
    """A START that is too high for these weights is no bracket to halve."""
    rates, ff, _ = rates_of([None, 0.3, None, 0.2, None, -0.5, 0.4, None])
    expected = [1, 1 / 4, 1 / 4, 1 / 16, 1 / 16, 1 / 4, 1 / 8, 1 / 8]
    assert rates == pytest.approx([1e-5 * rate for rate in expected], rel=1e-12) and ff.rising


@pytest.mark.parametrize("curvature", [1e-2, 0.7, 30.0, 1e4, 1e7])
def test_the_rise_ends_where_a_step_leads_to_the_bottom(curvature):
    """SGD on a parabola converges below 2 / curvature, and is at the bottom in one step at 1 / curvature."""
    model, optimizer, _, ff = make(model=Line(curvature), kind=torch.optim.SGD, lr=1.0)
    states = [model.w.item()]
    while auto(ff).rising and len(states) <= 40:
        descend(optimizer, model.loss())
        states.append(model.w.item())
    assert not auto(ff).rising
    # c is −1 until a step crosses the bottom; those that do are undone.
    assert 0.5 / curvature <= ff.learning_rate <= 1.2 / curvature
    assert states[-1] == states[-3] and states[-1] > 0


def overshot(kind=torch.optim.AdamW, **options):
    """A run that has just taken the step too far: everything, with the gradient of the next step there."""
    model, optimizer, _, ff = make(kind=kind, **options)
    before = None
    for step in range(40):
        kept, rate = states_of(model, optimizer), ff.learning_rate
        optimizer.zero_grad()
        model.loss(step, 0.0).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        if ff.learning_rate < rate:
            return model, optimizer, ff, before, kept, gradients
        before = kept
    raise AssertionError("no step led too far")


def test_an_overshoot_is_undone_bit_for_bit():
    model, optimizer, ff, before, kept, gradients = overshot(weight_decay=0.5)
    assert ff.alignment > 0
    assert same_weights(model, before[0])
    assert not any(torch.equal(weight, kept[0][name]) for name, weight in model.state_dict().items())
    # The overshot gradient is in no moment: they only decay.
    for index, (p, gradient) in enumerate(zip(model.parameters(), gradients, strict=True)):
        old, new = kept[1]["state"][index], optimizer.state[p]
        assert gradient.abs().max() > 0 and not p.grad.any()
        assert torch.allclose(new["exp_avg"], 0.9 * old["exp_avg"], rtol=1e-6, atol=0)
        assert torch.allclose(new["exp_avg_sq"], 0.999 * old["exp_avg_sq"], rtol=1e-6, atol=0)
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(ff.learning_rate) and group["weight_decay"] == 0.5
    assert ff.learning_rate == pytest.approx(kept[1]["param_groups"][0]["lr"] / auto(ff)._jump)
    # The step after has no pair: nothing moved.
    rate = ff.learning_rate
    train(model, optimizer, 1, first=99)
    assert ff.alignment is None and ff.learning_rate == rate and ff.rising


def test_decay_that_does_not_go_with_the_rate_does_not_act_either():
    class Decaying(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(1 - 1e-6 * group["weight_decay"])
            return super().step(closure)

    model, _, _, before, _, _ = overshot(Decaying, weight_decay=0.1)
    assert same_weights(model, before[0])


def test_a_loss_that_is_never_finite_is_told():
    model, optimizer, _, ff = make()
    train(model, optimizer, 4)
    with pytest.warns(FFKernelsNotice, match="has left out 4 steps in a row, whose gradients are not finite"):
        for _ in range(10):
            descend(optimizer, model.loss() * math.nan)
    assert model.w.isfinite().all() and ff.learning_rate == 3.2e-4


def test_what_was_kept_before_a_state_is_loaded_is_not_put_back():
    """Saved after three skipped steps of a rise: the fourth comes to a run whose Δ holds something else."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer, _, ff = make(fused=True)

    def step(number, scale=1.0):
        optimizer.zero_grad()
        scaler.scale(model.loss(number) * scale).backward()
        scaler.step(optimizer)
        scaler.update()

    for number in range(6):
        step(number, math.inf if number > 2 else 1.0)
    saved = states_of(model, optimizer, ff)
    for number in range(6, 10):
        step(number)
    for part, state in zip((model, optimizer, ff), saved, strict=True):
        part.load_state_dict(state)
    before = weights_of(model)
    step(10, math.inf)
    assert same_weights(model, before)


def test_a_gradient_that_is_not_finite_undoes_in_the_rise_and_skips_after_it():
    model, optimizer, _, ff = make()
    train(model, optimizer, 4)
    before = train(model, optimizer, 1, first=4)[0]
    train(model, optimizer, 1, first=5)
    assert auto(ff).rising
    rate = ff.learning_rate
    for _ in range(3):  # of which the first alone says something of a step
        descend(optimizer, model.loss(6) * math.inf)
        assert auto(ff).rising and ff.learning_rate == rate / 2
        assert same_weights(model, before)
    after = train(model, optimizer, 30, first=7)[-1]
    assert not auto(ff).rising
    rate = ff.learning_rate
    for factor in (1, 4, 16):  # one alone may be the batch's
        descend(optimizer, model.loss(37) * math.nan)
        assert ff.learning_rate == rate / factor
        assert same_weights(model, after)
    assert all(v["exp_avg"].isfinite().all() for v in optimizer.state.values())


SCHEDULES = {
    "constant": lambda k: 1.0,
    "linear": lambda k: max(0.0, 1 - k / 50),
    "warm-up": lambda k: min(1.0, (k + 1) / 8),
    "warm-up from 0": lambda k: min(1.0, k / 8),
    "cosine": lambda k: 0.5 * (1 + math.cos(math.pi * k / 50)),
}


@pytest.mark.parametrize("shape", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_keep_their_shape(shape):
    model, optimizer, scheduler, ff = make(schedule=shaped(shape))

    def look(step):
        now = optimizer.param_groups[0]["lr"]
        assert now == pytest.approx(ff.learning_rate * shape(step + 1), rel=1e-9)

    cosines, rates = followed(ff, model, optimizer, 40, scheduler, look)
    assert rates == pytest.approx(by_hand(cosines, shape)[0], rel=1e-9)
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]] and not auto(ff).rising


@pytest.mark.parametrize("shape", SCHEDULES.values(), ids=SCHEDULES)
def test_a_loop_that_writes_its_rate_times_lr_scale_is_the_same_run(shape):
    """As the command's own loop does; with a scheduler the same numbers come but for their rounding."""
    model, optimizer, scheduler, ff = make(schedule=shaped(shape))
    train(model, optimizer, 30, scheduler)
    other, alone, _, written = make()

    def write(step):
        alone.param_groups[0]["lr"] = 1e-4 * shape(step) * written.lr_scale

    train(other, alone, 30, write=write)
    assert written.learning_rate == pytest.approx(ff.learning_rate, rel=1e-4)
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 50),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-3, total_steps=60),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1, 5), lr_scheduler.ExponentialLR(o, 0.99)], [5]
        ),
    ],
    ids=["cosine", "one-cycle", "sequential"],
)
def test_torchs_schedulers_go_with_it(schedule):
    model, optimizer, scheduler, ff = make(schedule=schedule)
    plain = torch.optim.Adam(Bowl().parameters(), lr=1e-4)
    reference = schedule(plain)
    for step in range(30):
        train(model, optimizer, 1, scheduler, first=step)
        plain.step()
        reference.step()
        expected = plain.param_groups[0]["lr"] * ff.lr_scale
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6)


def test_a_scheduler_that_was_not_given_is_refused():
    model = Bowl()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    scheduler = shaped(lambda k: 1.0)(optimizer)
    FastForward(model, optimizer, bowl_loss, AUTO)
    with pytest.raises(RuntimeError, match="scheduler=scheduler"):
        train(model, optimizer, 1, scheduler)


def test_a_loop_that_overwrites_the_rate_is_told():
    model, optimizer, _, _ff = make(lr=1e-3)

    def write(step):
        optimizer.param_groups[0]["lr"] = 1e-3

    with pytest.warns(FFKernelsNotice, match=r"multiply what you set by FastForward\.lr_scale \(0\.01\)"):
        train(model, optimizer, 2, write=write)


@pytest.mark.parametrize("ratio", [16.0, 10.0, 0.3])
def test_groups_keep_their_ratios(ratio):
    model, optimizer, _, ff = make(
        groups=lambda m: [{"params": [m.w], "lr": 2e-4}, {"params": [m.b], "lr": 2e-4 * ratio}]
    )
    for step in range(40):
        train(model, optimizer, 1, first=step)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second / first == pytest.approx(ratio, rel=0 if ratio == 16.0 else 1e-13)
        assert max(first, second) == pytest.approx(ff.learning_rate, rel=1e-12)
    assert not auto(ff).rising


def test_groups_that_are_unfrozen_later_are_taken_along():
    model, optimizer, _, ff = make(
        FastForwardConfig(learning_rate="auto", interval=3),
        groups=lambda m: [{"params": [m.w]}, {"params": [m.b.requires_grad_(False)], "lr": 1e-3}],
    )
    train(model, optimizer, 2)
    model.b.requires_grad_(True)
    with pytest.warns(FFKernelsNotice, match="the table is rebuilt"):
        train(model, optimizer, 28, first=2)
    assert len(ff._moved.parameters) == 2 and not auto(ff).rising and bowl_loss(model) < 5.0
    assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * optimizer.param_groups[0]["lr"])
    assert model.b.abs().max() < 0.9


@pytest.mark.parametrize("when", [2, 25])
@pytest.mark.parametrize("tensor", [False, True])
def test_the_rate_of_a_group_that_is_added_later_is_a_ratio_too(when, tensor):
    given = torch.tensor(1e-4, dtype=torch.float64) if tensor else 1e-4
    model, optimizer, _, ff = make(lr=given, groups=lambda m: [m.w])
    train(model, optimizer, when)
    assert auto(ff).rising == (when == 2)
    optimizer.add_param_group({"params": [model.b], **({} if tensor else {"lr": 1e-3})})
    train(model, optimizer, 20, first=when)
    ratio = 1.0 if tensor else 10.0
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(ff.learning_rate, rel=1e-6)
    assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(ratio * ff.learning_rate, rel=1e-6)


def test_a_rate_that_is_a_tensor_keeps_its_address():
    rate = torch.tensor(1e-4)
    model, optimizer, _, ff = make(
        lr=rate, groups=lambda m: [{"params": [m.w]}, {"params": [m.b]}], foreach=False, capturable=False
    )
    cosines, rates = followed(ff, model, optimizer, 25)
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    assert float(rate) == pytest.approx(ff.learning_rate, rel=1e-5) and not auto(ff).rising
    assert rates == pytest.approx(by_hand(cosines)[0], rel=1e-12)


STATES = {"constant": None, "warm-up": shaped(SCHEDULES["warm-up"])}


@pytest.mark.parametrize("schedule", STATES.values(), ids=STATES)
@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("at", range(0, 22))
def test_a_resumed_run_continues_bit_for_bit(at, order, schedule):
    """The states of the others are loaded after FastForward is made, or, as a Trainer does, before."""
    model, optimizer, scheduler, ff = make(schedule=schedule)
    train(model, optimizer, at, scheduler)
    parts = [model, optimizer, scheduler, ff] if scheduler else [model, optimizer, ff]
    saved = states_of(*parts)
    seen = train(model, optimizer, 30 - at, scheduler, first=at)

    again = Bowl()
    fresh = torch.optim.Adam(again.parameters(), lr=1e-4)
    plan = schedule(fresh) if schedule else None
    others = [again, fresh, plan] if schedule else [again, fresh]
    if order == "after":
        other = FastForward(again, fresh, bowl_loss, AUTO, scheduler=plan)
    for part, state in zip(others, saved[:-1], strict=True):
        part.load_state_dict(state)
    if order == "before":
        other = FastForward(again, fresh, bowl_loss, AUTO, scheduler=plan)
    file = io.BytesIO()
    torch.save(saved[-1], file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert fresh.param_groups[0]["lr"] == saved[1]["param_groups"][0]["lr"]
    repeated = train(again, fresh, 30 - at, plan, first=at)
    assert same(seen, repeated)
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert (other.lr_scale, other.learning_rate) == (ff.lr_scale, ff.learning_rate)
    assert other.state_dict()["auto_rate"] == ff.state_dict()["auto_rate"] and auto(ff).trims > 3


def test_a_run_that_kept_its_rate_begins_to_rise_when_it_is_resumed():
    model, optimizer, _, ff = make(FastForwardConfig(interval=100))
    train(model, optimizer, 3)
    config = FastForwardConfig(interval=100, learning_rate="auto")
    with pytest.warns(UserWarning, match="different FastForwardConfig"):
        _, fresh, _, other = resume(states_of(model, optimizer, ff), config=config)
    assert fresh.param_groups[0]["lr"] == pytest.approx(START) and other.lr_scale == pytest.approx(0.1)
    assert other.optimizer_steps == 3 and auto(other).rising


def test_a_rate_that_cannot_be_scaled_exactly_is_not_taken_for_another():
    """Else lr_scale would be 1, and a loop that multiplies by it would train at the rate that was given."""
    given = 0.0023
    assert given * (START / given) != START
    *_, kept = make(FastForwardConfig(), lr=given)
    *_, ff = make(lr=given)
    ff.load_state_dict(kept.state_dict())
    assert ff.lr_scale == pytest.approx(START / given) and ff.learning_rate == START


def test_no_stage_runs_while_it_rises():
    for patience in ("auto", None, 3):
        model, optimizer, _, ff = make(
            FastForwardConfig(learning_rate="auto", interval=1, patience=patience, max_tau=8)
        )
        rising = []
        for step in range(30):
            before = auto(ff).rising
            train(model, optimizer, 1, first=step)
            rising.append(before)
            assert not (ff.stages and before)
        assert not rising[-1] and rising[0]
        if patience is None:
            assert len(ff.stages) == rising.count(False)
            assert ff._decision.alignment.values == []


def test_without_an_interval_there_are_no_stages_and_no_validation():
    model, optimizer, _, ff = make()
    train(model, optimizer, 40)
    assert not ff.stages and ff.active and ff._decision.alignment.values == [] and not ff.rising
    assert ff.validation is None and ff.state_dict()["auto_rate"]["trims"] > 20
    ff.detach()
    assert not ff.active and not model._forward_pre_hooks
    other = Bowl()
    fresh = torch.optim.Adam(other.parameters(), lr=1e-4)
    kept = FastForward(other, fresh, lambda model: pytest.fail("nothing is to be validated"), AUTO)
    train(other, fresh, 40)
    assert torch.equal(other.w, model.w) and kept.validation is None
    with pytest.raises(ValueError, match="validation=None: stages every 6 steps search by"):
        FastForward(Bowl(), torch.optim.SGD(Bowl().parameters()))


def test_without_an_interval_other_parameters_are_seen_as_well():
    model, optimizer, _, ff = make()
    train(model, optimizer, 5)
    rate = ff.learning_rate
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(FFKernelsNotice, match="2 another parameter, such as 'w'.*is rebuilt"):
        train(model, optimizer, 1, first=5)
    assert ff.alignment is None and ff.learning_rate == rate
    train(model, optimizer, 34, first=6)
    assert not ff.rising and ff.alignment is not None and ff.learning_rate < 1.0


def test_parameters_that_are_others_in_every_step_are_told():
    model, optimizer, _, ff = make()
    with pytest.warns(FFKernelsNotice, match="or others take their place.* does not move"):
        for step in range(6):
            train(model, optimizer, 1, first=step)
            copies = {key: value.clone() for key, value in model.state_dict().items()}
            model.load_state_dict(copies, assign=True)
            optimizer.param_groups[0]["params"] = list(model.parameters())
    assert ff.learning_rate == START


def test_where_c_is_not_known_nothing_happens():
    model, optimizer, _, ff = make()
    train(model, optimizer, 3)
    rate = ff.learning_rate
    with torch.no_grad():
        model.w.add_(1.0)  # somebody wrote the weights
    train(model, optimizer, 1, first=3)
    assert ff.alignment is None and ff.learning_rate == rate and auto(ff).rising
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # no gradient
    assert ff.alignment is None and ff.learning_rate == rate and auto(ff).rising


def test_updates_that_round_away_are_taken_for_far_too_small():
    """bfloat16 has 8 bits: beside 1, an update below 2⁻⁹ is nothing."""
    model = Bowl(torch.bfloat16)
    with torch.no_grad():
        model.w.fill_(1.0)
    model, optimizer, _, ff = make(model=model)
    cosines, rates = followed(ff, model, optimizer, 25, noise=0.0)
    first = next(i for i, c in enumerate(cosines) if c is not None)
    assert first > 2 and rates[:first] == pytest.approx([START * 4.0**i for i in range(first)])
    assert not auto(ff).rising and 1e-3 < ff.learning_rate < 3.0
    assert bowl_loss(model) < bowl_loss(Bowl())


@pytest.mark.parametrize("at", [1, 3])
def test_rounded_updates_are_known_of_after_a_resume(at):
    options = {"groups": lambda m: [m.b]}
    model, optimizer, _, ff = make(model=Bowl(torch.bfloat16), **options)
    train(model, optimizer, at)
    again, fresh, _, other = resume(states_of(model, optimizer, ff), model=Bowl(torch.bfloat16), **options)
    train(again, fresh, 1, first=at)
    assert other.alignment is None and other.learning_rate == 4.0**at * START


def test_after_the_rise_c_is_used_one_step_late_where_it_is_read_so(monkeypatch):
    """As on a GPU; a state saved in between reads what is under way, and keeps it for the next step."""

    def later(sums):
        kept = sums.tolist()
        return lambda: kept

    monkeypatch.setattr(alignment_module, "_reads_at_once", lambda device: False)
    monkeypatch.setattr(alignment_module, "read_later", later)
    model, optimizer, _, ff = make()
    saved, risen, trims = [], [], []

    def look(step):
        risen.append(ff.rising)
        trims.append(auto(ff).trims)
        if step == 20:
            saved.extend(states_of(model, optimizer, ff))
            assert len(saved[-1]["alignment"]["heard"]) == 1

    known, rates = followed(ff, model, optimizer, 30, look=look)  # c, in trims, of the step before
    end, first = risen.index(False), trims.index(1)
    assert rates[: end + 1] == pytest.approx(by_hand(known)[0][: end + 1], rel=1e-12)  # waited for
    assert first > end + 1 and rates[end] == rates[first - 1]
    for n, (old, new) in enumerate(itertools.pairwise(rates[first - 1 :]), 1):
        assert new == pytest.approx(old * math.exp(-pull(known[first : first + n])), rel=1e-9)
    again, fresh, _, other = resume(saved)
    train(again, fresh, 9, first=21)
    assert torch.equal(again.w, model.w) and other.learning_rate == ff.learning_rate


def test_a_warm_up_from_0_is_no_rounding():
    model, optimizer, scheduler, ff = make(schedule=shaped(lambda k: 0.0 if k < 4 else 1.0))
    train(model, optimizer, 5, scheduler)
    assert ff.learning_rate == START
    train(model, optimizer, 1, scheduler, first=5)
    assert ff.learning_rate == 4 * START


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_loss_scaling_skips(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer, _, ff = make(fused=fused)
    cosines, rates = [], []
    for step in range(40):
        optimizer.zero_grad()
        loss = model.loss(step) * (math.inf if step in (0, 1, 4, 5, 6, 25) else 1.0)
        scaler.scale(loss).backward()
        before, rate = weights_of(model), ff.learning_rate
        scaler.step(optimizer)
        scaler.update()
        if step in (0, 1, 4, 5, 6, 25):
            assert ff.learning_rate == rate
            assert same_weights(model, before)
        else:
            cosines.append(ff.alignment)
            rates.append(ff.learning_rate)
    assert rates == pytest.approx(by_hand(cosines)[0], rel=1e-12)
    assert not auto(ff).rising and bowl_loss(model) < 0.5 * bowl_loss(Bowl())
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(ff.learning_rate, rel=1e-12)


def test_an_overshoot_to_infinite_gradients_is_undone_where_a_fused_optimizer_skips():
    """From the second jump on gradients are infinite, as in float16, at whatever scale, so that it falls."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer, _, ff = make(fused=True)
    before = []
    for _ in range(8):
        optimizer.zero_grad()
        overshot = ff.learning_rate > 1e-4 and len(before) >= 3
        scaler.scale(model.loss(0) * (math.inf if overshot else 1.0)).backward()
        before.append(weights_of(model))
        scaler.step(optimizer)
        scaler.update()
    # Steps at 1e-5, 4e-5 and 16e-5; four are skipped; the fourth puts back to before the last that was taken.
    assert ff.learning_rate == pytest.approx(8e-5) and auto(ff).rising
    assert same(before[7], before[2]) and not same(before[6], before[2])
    assert not any(torch.equal(p, before[7][name]) for name, p in model.named_parameters()), "it goes on"


def test_accumulation_and_clipping_change_nothing_of_the_rule():
    model, optimizer, _, ff = make()
    cosines, rates = [], []
    for step in range(30):
        optimizer.zero_grad()
        for part in range(3):
            (model.loss(3 * step + part) / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        cosines.append(ff.alignment)
        rates.append(ff.learning_rate)
    assert rates == pytest.approx(by_hand(cosines)[0], rel=1e-12) and not auto(ff).rising


def test_bounds_are_kept_and_said_once():
    model, optimizer, _, ff = make(model=Line(1e-9), kind=torch.optim.SGD, lr=1.0)
    with pytest.warns(
        FFKernelsNotice, match=r"has come to 1000, its bound, and stays within \[1e-09, 1000\]"
    ):
        for _ in range(20):
            descend(optimizer, model.loss())
    assert ff.learning_rate == HIGHEST and optimizer.param_groups[0]["lr"] == pytest.approx(1e3)
    model, optimizer, _, ff = make()
    train(model, optimizer, 30)
    assert not ff.rising
    for _ in range(40):
        descend(optimizer, model.loss() * math.nan)
    assert ff.learning_rate == LOWEST and model.w.isfinite().all()


def test_closures_are_refused():
    model, optimizer, _, _ff = make()

    def closure():
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"before Adam\.step\(\), which is called with a closure"):
        optimizer.step(closure)


def raise_in_a_held_step(model, optimizer):
    optimizer.zero_grad()
    (model.loss() * math.nan).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "_init_group", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()


def test_a_step_that_raises_leaves_the_rate_as_it_was():
    model, optimizer, ff, *_ = overshot()
    rate = ff.learning_rate
    raise_in_a_held_step(model, optimizer)
    before = model.w.detach().clone()
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(ff.learning_rate) == rate
    assert not torch.equal(model.w, before)


@pytest.mark.parametrize("then", ["detached", "written", "loaded", "another group", "another tensor's group"])
def test_a_held_step_that_raises_is_no_end_of_the_rates(then):
    options = {"lr": torch.tensor(1e-4), "capturable": False} if "tensor" in then else {}
    model, optimizer, ff, *_ = overshot(weight_decay=0.5, **options)
    saved, rate = states_of(optimizer, ff), ff.learning_rate
    raise_in_a_held_step(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.0
    if then == "detached":
        ff.detach()
    elif then == "written":
        optimizer.param_groups[0]["lr"] = rate = 7e-4
        ff.detach()
    elif then == "loaded":
        optimizer.load_state_dict(saved[0])
        optimizer.param_groups[0]["weight_decay"] = 0.25
        ff.load_state_dict(saved[1])
        train(model, optimizer, 1)
        assert optimizer.param_groups[0]["weight_decay"] == 0.25
    else:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        train(model, optimizer, 1)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(rate)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.slow
def test_on_the_embedded_model_it_needs_no_rate():
    """60 steps of batch 8: Adam at 1e-4 hardly moves, and 2e-3 … 1e-2 are its good rates."""
    from ffkernels.training.config import TrainConfig
    from ffkernels.training.session import open_session

    def loss(**changes):
        settings = dict(batch_size=8, steps=60, warmup_steps=0, test_examples=200, threads=1)
        with open_session(TrainConfig(**settings | changes)) as session:
            for step in range(60):
                session.step(step)
            return session.test_loss()

    found = loss(fast_forward=AUTO)
    assert found < loss(lr=1e-4) - 1.0
    assert found < loss(lr=1e-3) - 0.1
    assert loss(fast_forward=AUTO, lr=0.3) == pytest.approx(found, rel=0.02)  # from any start
