"""SaLSA on a session: what it is given, what is charged, what it refuses. Its package is a stand-in here."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from ffkernels.training.config import TrainConfig
from ffkernels.training.peers import load_module, load_peer
from ffkernels.training.trainer import train

PEER = "ffkernels_peers.salsa"


class TwoProbes(torch.optim.Optimizer):
    """Called as the package's optimizer: a closure that makes the gradients, and calls that do not."""

    def __init__(self, params, init_step_size=0.1):
        self.size, self.seen = init_step_size, []
        super().__init__(list(params), {})

    def step(self, closure):
        losses = [closure(backwards=True)]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= self.size * p.grad
        losses += [closure(), closure()]
        self.seen.append([float(loss) for loss in losses])
        return losses[0]


@pytest.fixture()
def package(monkeypatch):
    module = ModuleType("salsa.SaLSA")
    module.SaLSA = TwoProbes
    monkeypatch.setitem(sys.modules, "salsa", ModuleType("salsa"))
    monkeypatch.setitem(sys.modules, "salsa.SaLSA", module)
    load_module("authors")  # the package of the peers, to which the import below adds an attribute
    monkeypatch.delitem(sys.modules, PEER, raising=False)
    yield
    sys.modules.pop(PEER, None)  # it knows the stand-in


def test_it_searches_on_the_training_batch(opened, package):
    session = opened(load_peer("salsa"), micro_batch_size=3)
    batch = session.load(0)
    loss = session.backward(batch)
    session.update(0)
    first, probe, again = session.optimizer.seen[0]
    assert first == loss.item()
    assert probe == again != first
    assert probe == pytest.approx(session.backward(batch).item(), abs=1e-6)  # of the weights as they are now
    assert session.ff.probes == 2 and session.ff.stages == []


def test_probes_are_charged_as_forwards(short, package, tmp_path):
    config = TrainConfig(**{**short, "steps": 3, "out": str(tmp_path), "micro_batch_size": 2})
    plain = train(config, save=False)
    searched = train(config, save=False, attach=load_peer("salsa"))
    # Three forwards were charged for a training step, and two more were run.
    assert searched.flops["paper"] == plain.flops["paper"] * 5 // 3
    assert searched.flops["measured"] - plain.flops["measured"] == plain.flops["paper"] * 2 // 3


def test_detached_the_session_trains_with_its_own_optimizer(opened, package):
    session = opened(load_peer("salsa"))
    session.step(0)
    searching = session.optimizer
    session.close()
    session.close()
    session.step(1)
    assert isinstance(session.optimizer, torch.optim.AdamW)
    assert len(searching.seen) == 1


def test_dropout_and_groups_are_refused(opened, package):
    with pytest.raises(ValueError, match=r"dropout=0\.1: must be 0"):
        opened(load_peer("salsa"), dropout=0.1)
    with pytest.raises(ValueError, match=r"has \d+ parameter groups.*use optimizer='adamw'"):
        opened(load_peer("salsa"), optimizer="lora-plus")


def test_without_its_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "salsa", None)
    monkeypatch.delitem(sys.modules, PEER, raising=False)
    with pytest.raises(ImportError, match="pip install SaLSa-Optimizer"):
        load_peer("salsa")
