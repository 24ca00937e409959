"""Other people's contenders of ``benchmarks/learning_rate``: what they are charged, what they leave behind.

Their packages are optional; where one is not installed its test is skipped.
"""

from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture()
def peers(benchmarks):
    pytest.importorskip("transformers")
    return benchmarks("peers.learning_rates")


@pytest.fixture()
def work(benchmarks):
    pytest.importorskip("peft")
    workloads = benchmarks("learning_rate.workloads")
    bench = benchmarks("learning_rate.bench").Bench(workloads.Workload("instruction", 4), 0, 8)
    return benchmarks("learning_rate.contenders").Work(bench, 8, lr=1e-3, warmup=2)


def weights(work):
    return torch.cat([p.detach().flatten() for p in work.bench.trainable])


def test_the_loss_of_a_step_is_the_one_that_trains(work, peers):
    loss = peers.Lossy(work)(torch.tensor([1]))
    assert loss.item() == work.bench.model(**work.bench.batch(1)).loss.item()


@pytest.mark.parametrize("free", [False, True])
def test_a_range_test_is_charged_its_steps_and_undone(work, peers, free):
    before, left = weights(work).clone(), work.total

    def suggest(given, steps):
        optimizer = given.adamw(0.1)
        for step in range(steps):
            peers.Lossy(given)(torch.tensor(step)).backward()
            optimizer.step()
        assert not torch.equal(weights(given), before)
        return 0.02, steps

    contender = peers.range_test(work, suggest, free=free, steps=3)
    assert torch.equal(weights(work), before)
    assert all(p.grad is None for p in work.bench.trainable)
    assert work.charged == (0 if free else sum(work.bench.flops(step) for step in range(3)))
    assert left == 8 and (work.total == 8 if free else work.total < 6)
    assert contender.rate() == 0.02
    assert contender.optimizer.param_groups[0]["lr"] == 0.01  # the first of two warm-up steps


@pytest.mark.parametrize("steps, expected", [(100, 20), (1000, 100)])
def test_a_range_test_takes_a_fifth_of_a_short_run(work, peers, steps, expected):
    asked = []

    def suggest(given, steps):
        asked.append(steps)
        return 0.02, 0

    work.steps = steps
    peers.range_test(work, suggest)
    assert asked == [expected]


def test_greedy_lr_is_told_losses_and_validations_are_charged(work, peers):
    plain = peers.greedy(work)
    for step in range(12):
        plain.after_step(step, 3.0 - step / 10)
    assert plain.rate() == pytest.approx(1e-3 / 0.95)  # eleven falls in a row: its patience is 10
    assert work.charged == 0
    peers.greedy(work, validating=True).after_step(0, 3.0)
    assert work.charged == work.bench.validation.flops


def test_prodigy_starts_from_its_own_rate(work, peers):
    pytest.importorskip("prodigyopt")
    contender = peers.prodigy(work)
    peers.Lossy(work)(torch.tensor(0)).backward()
    contender.optimizer.step()
    assert contender.optimizer.param_groups[0]["lr"] == 0.5  # of 1, in the first of two warm-up steps
    assert contender.rate() > 0


def test_mechanic_scales_a_rate_of_one(work, peers):
    pytest.importorskip("mechanic_pytorch")
    before, contender = weights(work).clone(), peers.mechanic(work)
    assert contender.rate() is None
    peers.Lossy(work)(torch.tensor(0)).backward()
    contender.optimizer.step()
    assert contender.optimizer.param_groups[0]["lr"] == 0.5  # of 1, in the first of two warm-up steps
    # Nothing is known yet, so the first update is as small as its start: of the order of 1e-8.
    assert 0 < contender.rate() < 1e-6
    assert (weights(work) - before).abs().max() < 1e-6


def test_without_a_rate_those_that_need_one_take_their_own_default(work, peers):
    work.lr = None
    assert peers.greedy(work).rate() == 5e-5
    pytest.importorskip("schedulefree")
    assert peers.schedule_free(work).optimizer.param_groups[0]["lr"] == 0.0025
    work.lr = 0.02
    assert peers.schedule_free(work).optimizer.param_groups[0]["lr"] == 0.02


def test_each_beta_of_the_hypergradient_has_its_name(work, peers):
    names = [name for name in peers.PEERS if name.startswith("hypergradient")]
    assert names == [f"hypergradient 1e-{digit}" for digit in (7, 6, 5, 4, 3)]
    betas = [peers.PEERS[name].keywords["beta"] for name in names]
    assert betas == [float(name.split()[1]) for name in names]


def test_schedule_free_is_tested_at_its_averaged_weights(work, peers):
    pytest.importorskip("schedulefree")
    contender = peers.schedule_free(work)
    for step in range(4):
        peers.Lossy(work)(torch.tensor(step)).backward()
        contender.optimizer.step()
        contender.optimizer.zero_grad()
    training = weights(work).clone()
    with contender.evaluating():
        assert not torch.equal(weights(work), training)
    assert torch.allclose(weights(work), training, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("module, suggest", [("torch_lr_finder", 0), ("lightning", 1)])
def test_a_package_suggests_a_rate_between_its_ends(work, peers, module, suggest):
    pytest.importorskip(module)
    suggest = (peers.with_torch_lr_finder, peers.with_lightning)[suggest]
    lr, steps = suggest(work, 30)
    assert 17 <= steps <= 30 and 1e-8 < lr < 10


def test_contenders_of_a_missing_package_are_left_out(peers):
    left_out = {name for name in peers.EVERY if name.partition(",")[0] in peers.MISSING}
    assert peers.EVERY.keys() - peers.PEERS.keys() == left_out
    assert "schedule-free+" in peers.PEERS, "a rule in our words, which needs no package"


@pytest.mark.parametrize(
    "contender, module, name",
    [
        ("prodigy", "prodigyopt", "prodigyopt"),
        ("schedule_free", "schedulefree", "schedulefree"),
        ("mechanic", "mechanic_pytorch", "mechanic-pytorch"),
    ],
)
def test_what_is_missing_is_named_with_its_command(work, peers, monkeypatch, contender, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs the package {name} .*pip install {name}"):
        getattr(peers, contender)(work)
