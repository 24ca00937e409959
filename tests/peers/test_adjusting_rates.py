"""Published rules in our own words, beside what a pencil makes of them on one weight."""

from __future__ import annotations

from math import inf, nan, pi, sqrt
from types import SimpleNamespace

import pytest
import torch
from torch import nn


class Parabola:
    """A bench of one float64 weight, 1 at first: the loss of step k is ``curvature`` (w − centre k)² / 2.

    Step k costs 100 + k FLOPs, forward and backward 80 + k of them, the forward 30 + k.
    """

    start = 1.0
    device = torch.device("cpu")

    def __init__(self, curvature, centres):
        self.curvature, self.centres = curvature, centres
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.trainable = [self.weight]

    def model(self, centre):
        return SimpleNamespace(loss=0.5 * self.curvature * (self.weight - centre).square().sum())

    def batch(self, step):
        return {"centre": self.centres[min(step, len(self.centres) - 1)]}

    def flops(self, step):
        return 100 + step

    def gradient_flops(self, step):
        return 80 + step

    def forward_flops(self, step):
        return 30 + step

    def reset(self):
        with torch.no_grad():
            self.weight.fill_(1.0)
        self.weight.grad = None

    def wait(self):
        pass

    def test_loss(self, few=False):
        return self.model(**self.batch(0)).loss.item()


@pytest.fixture()
def rates(benchmarks):
    return benchmarks("peers.adjusting_rates")


@pytest.fixture()
def work_on(benchmarks):
    """``work_on(curvature, centres, lr)``"""
    work = benchmarks("learning_rate.contenders").Work

    def make(curvature, centres, lr=None, steps=20, **options):
        return work(Parabola(curvature, centres), steps, lr=lr, **{"warmup": 0, **options})

    return make


def gradient(work, step):
    work.bench.weight.grad = None
    loss = work.bench.model(**work.bench.batch(step)).loss
    loss.backward()
    return loss.item()


def take(work, contender, step):
    """One step of training."""
    contender.before_step(step, gradient(work, step))
    contender.optimizer.step()


def lr(contender):
    return contender.optimizer.param_groups[0]["lr"]


def losses(curvature, slope):
    """Of a parabola one update behind, one ahead, and here."""
    return curvature / 2 + slope, curvature / 2 - slope, 0.0


@pytest.mark.parametrize(
    "given, scale, expected",
    [
        (losses(2, 3), 1.0, 0.09 + 0.1 * 0.15),
        (losses(2, 3), 0.5, 0.09 + 0.05 * 0.15),
        (losses(2, 10), 1.0, 0.11),  # at most twice the rate
        (losses(2, 0.2), 1.0, 0.095),  # at least half
        (losses(-2, 3), 1.0, 0.1),
        (losses(2, -3), 1.0, 0.1),
        ((nan, 1.0, 1.0), 1.0, 0.05),
        ((1.0, inf, 1.0), 1.0, 0.05),
    ],
)
def test_gen_goes_a_tenth_of_the_way_to_the_minimum(rates, given, scale, expected):
    behind, ahead, here = (loss + 7 for loss in given)
    assert rates.next_gen_rate(0.1, scale, behind, ahead, here) == pytest.approx(expected, rel=1e-12)


def test_gen_probes_the_next_batch_and_leaves_the_weights(rates, work_on):
    work = work_on(2.0, [0.0, 0.5], lr=0.8)
    contender = rates.gen(work, every=1)
    contender.before_step(0, gradient(work, 0))
    # Adam's first update is the rate itself; the minimum of batch 1 is 0.5 away.
    assert lr(contender) == pytest.approx(0.9 * 0.8 + 0.1 * 0.5)
    assert work.bench.weight.item() == 1.0 and work.bench.weight.grad.item() == 2.0
    assert contender.optimizer.state[work.bench.weight]["step"] == 1  # its moments are of two steps then
    assert work.charged == 3 * (30 + 1) + 20


def test_gen_probes_every_fourth_step(rates, work_on):
    work = work_on(2.0, [0.0], schedule="linear", warmup=8)
    contender = rates.gen(work)
    for step in range(3):
        take(work, contender, step)
    assert contender.rate() == lr(contender) == 1e-4 and work.charged == 0  # and no warm-up
    take(work, contender, 3)
    # The minimum is far away: twice the rate, times the schedule.
    assert contender.rate() == pytest.approx(0.9e-4 + 0.1 * (1 - 3 / 20) * 2e-4)
    assert work.charged == 3 * (30 + 4) + 20


def test_gen_does_what_its_package_does(rates, work_on):
    package = pytest.importorskip("GeN.GeN", reason="needs gen-optim, SciPy and scikit-learn")
    work, theirs = (work_on(2.0, [0.0, 0.5, 0.3, -0.2, 0.1], lr=0.3) for _ in "ab")
    contender, optimizer = rates.gen(work, every=1), theirs.adamw(0.3)

    class Batch(dict):
        def to(self, device):
            return self

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = theirs.bench.weight

        def forward(self, **batch):
            return theirs.bench.model(**batch)

    for step in range(4):
        take(work, contender, step)
        gradient(theirs, step)
        ahead = iter([Batch(theirs.bench.batch(step + 1))])
        package.lr_parabola(Net(), optimizer, tr_iter=ahead, device="cpu", task="NLU", lr_factor=[-1, 0, 1])
        optimizer.step()
        assert lr(contender) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
    assert work.bench.weight.item() == pytest.approx(theirs.bench.weight.item(), rel=1e-6)


def second_update(first, second):
    """Adam's direction of two gradients."""
    mean = (0.09 * first + 0.1 * second) / (1 - 0.81)
    return mean / (sqrt((0.001 * 0.999 * first**2 + 0.001 * second**2) / (1 - 0.999**2)) + 1e-8)


def test_gala_follows_the_regularised_leader(rates, work_on):
    work = work_on(3.0, [0.0, 0.2, 0.4], lr=0.1)
    weight, contender = work.bench.weight, rates.gala(work, delta=2.0)
    take(work, contender, 0)
    assert weight.item() == pytest.approx(0.9) and work.charged == 0
    contender.before_step(1, gradient(work, 1))
    # One update of 1; the gradient after it, 3 (0.9 − 0.2), and the curvature of a parabola, 3.
    leader = (2 * 0.1 + 2.1) / (2 + 3)
    assert contender.rate() == lr(contender) == pytest.approx(leader)
    assert weight.item() == pytest.approx(0.9) and weight.grad.item() == pytest.approx(2.1)
    assert work.charged == 80 + 1
    contender.optimizer.step()
    update = second_update(3.0, 2.1)
    now = 0.9 - leader * update
    assert weight.item() == pytest.approx(now)
    take(work, contender, 2)
    leader = (2 * 0.1 + 2.1 + 3 * (now - 0.4) * update) / (2 + 3 + 3 * update**2)
    assert contender.rate() == pytest.approx(leader)
    assert work.charged == 80 + 1 + 80 + 2


def test_gala_alone_takes_its_start_for_one_step(rates, work_on):
    work = work_on(3.0, [0.0, 0.2], warmup=2)
    contender = rates.gala(work)
    take(work, contender, 0)
    assert lr(contender) == 0.5e-4  # the schedule multiplies
    take(work, contender, 1)
    assert contender.rate() == lr(contender) == pytest.approx(0.8 - 0.5e-4)


def test_gala_stands_still_where_gradients_disagree(rates, work_on):
    work = work_on(3.0, [0.0, 5.0, 5.0, 0.0], lr=0.1)
    contender = rates.gala(work)
    take(work, contender, 0)
    take(work, contender, 1)
    assert contender.rate() == 0.0
    stood = work.bench.weight.item()
    take(work, contender, 2)  # a step of length 0 is no curvature
    assert work.bench.weight.item() == stood == pytest.approx(0.9)


def test_a_hypergradient_adds_up(rates, work_on):
    work = work_on(3.0, [0.0, 0.2, -4.0], lr=0.1, warmup=2)
    contender = rates.hypergradient(work, beta=0.01)
    take(work, contender, 0)
    assert lr(contender) == 0.05 and work.bench.weight.item() == pytest.approx(0.95)
    take(work, contender, 1)
    # The gradient after the step, 3 · 0.75, times half an update: it was a step of half the rate.
    rate = 0.1 + 0.01 * 0.5 * 2.25
    assert contender.rate() == lr(contender) == pytest.approx(rate)
    update = second_update(3.0, 2.25)
    now = 0.95 - rate * update
    assert work.bench.weight.item() == pytest.approx(now)
    take(work, contender, 2)
    assert contender.rate() == pytest.approx(rate + 0.01 * 3 * (now + 4) * update)
    assert work.charged == 0


def test_a_hypergradient_may_turn_the_rate_round(rates, work_on):
    work = work_on(3.0, [0.0, 5.0])
    contender = rates.hypergradient(work, beta=1.0)
    take(work, contender, 0)
    take(work, contender, 1)
    assert contender.rate() == pytest.approx(1e-4 + 3 * (1 - 1e-4 - 5))


def test_the_polyak_step_is_averaged(rates, work_on):
    work = work_on(1.0, [0.0])
    weight, contender = work.bench.weight, rates.schedule_free_plus(work)
    take(work, contender, 0)
    # f / (|g| √(π/2)) = 0.5 / √(π/2); Adam's first update is 1, and all of it is taken over.
    first = 0.5 / sqrt(pi / 2)
    assert contender.rate() == pytest.approx(first) and weight.item() == pytest.approx(1 - first)
    y = 1 - first
    take(work, contender, 1)
    second = 0.5 * y / sqrt(pi / 2)
    mean = (0.09 + 0.1 * y) / (1 - 0.81)
    square = (0.05 * 0.95 + 0.05 * y**2) / (1 - 0.95**2)
    z = y - second * mean / sqrt(square)
    x = (y + z) / 2  # the weights are of the longest step so far: the first, in both
    y = 0.9 * x + 0.1 * z
    assert contender.rate() == pytest.approx(second) and weight.item() == pytest.approx(y)
    with contender.evaluating():
        assert weight.item() == pytest.approx(x)
    assert weight.item() == pytest.approx(y)
    take(work, contender, 2)
    assert contender.rate() == pytest.approx((0.5 * y**2 + 0.9 * y * (z - x)) / (y * sqrt(pi / 2)))
    assert work.charged == 0


def test_the_polyak_step_warms_up_without_an_average(rates, work_on):
    work = work_on(1.0, [0.0], warmup=2)
    contender, weight = rates.schedule_free_plus(work), work.bench.weight
    take(work, contender, 0)
    assert contender.rate() == pytest.approx(0.25 / sqrt(pi / 2))
    take(work, contender, 1)
    y = weight.item()
    with contender.evaluating():
        assert weight.item() == y  # x is z is y
    take(work, contender, 2)
    with contender.evaluating():
        assert weight.item() == pytest.approx(
            contender.optimizer.state[weight]["z"].item()
        )  # the first of them
    contender.before_step(3, -9.0)
    gradient(work, 3)
    contender.optimizer.step()
    assert contender.rate() == 0.0  # a loss below the lowest one gives no length


@pytest.mark.parametrize("name", ["gen", "gala", "schedule_free_plus", "hypergradient"])
def test_a_run_takes_what_is_left_of_its_budget(benchmarks, rates, work_on, name):
    main = benchmarks("learning_rate.__main__")
    options = {"beta": 1e-3} if name == "hypergradient" else {}
    work = work_on(2.0, [0.0], lr=1e-2, steps=40)
    line = main.train(lambda given: getattr(rates, name)(given, **options), work)
    assert line["loss"] < 0.9 and line["start"] == 1.0
    taken = line["taken"]
    spent = sum(100 + step for step in range(taken)) + work.charged
    probes = [step for step in range(taken) if step % 4 == 3]
    own = {
        "gen": sum(3 * (31 + step) + 20 for step in probes),
        "gala": sum(80 + step for step in range(1, taken)),
    }.get(name, 0)
    assert work.charged == own
    assert (spent > work.budget - 300) and (taken == 40) == (own == 0)


def test_before_a_step_its_gradients_are_there(benchmarks, work_on):
    contenders, main = benchmarks("learning_rate.contenders"), benchmarks("learning_rate.__main__")
    work, seen = work_on(2.0, [0.0, 0.5], lr=0.1, steps=2), []

    def make(given):
        def before(step, loss):
            seen.append((step, loss, given.bench.weight.item(), given.bench.weight.grad.item()))

        return contenders.Contender(given.adamw(0.1), before_step=before)

    main.train(make, work)
    assert seen[0] == (0, 1.0, 1.0, 2.0)
    assert seen[1] == pytest.approx((1, 0.16, 0.9, 0.8))
