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


def test_a_missing_package_is_named_and_its_contenders_left_out(work, peers, monkeypatch):
    left_out = {name for name in peers.EVERY if name.startswith(tuple(peers.MISSING) or "none")}
    assert peers.EVERY.keys() - peers.PEERS.keys() == left_out
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ImportError, match=r"needs the package prodigyopt .*pip install prodigyopt"):
        peers.prodigy(work)
