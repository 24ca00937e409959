"""Peers are found in the checkout, by name, and the trainer drives them as it drives Fast Forward."""

import json

import pytest

from ffkernels.training import peers
from ffkernels.training.config import TrainConfig
from ffkernels.training.trainer import train


def test_the_peers_of_this_checkout():
    assert peers.peer_names() == ["authors", "peft-prototype", "salsa"]
    assert peers.load_peer("authors") is peers.load_peer("authors")


def test_an_unknown_peer_is_named():
    with pytest.raises(
        ValueError, match="'autors' does not exist; allowed are authors, peft-prototype, salsa"
    ):
        peers.load_peer("autors")


def test_without_the_repository_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "benchmarks" / "peers")
    assert peers.peer_names() == []
    with pytest.raises(RuntimeError, match="clone the repository"):
        peers.load_peer("authors")


@pytest.mark.filterwarnings("ignore::ffkernels.ops.notices.FFKernelsNotice")
@pytest.mark.parametrize("name", ["authors", "peft-prototype"])
def test_the_trainer_drives_and_charges_a_peer(small, tmp_path, name):
    config = TrainConfig(**{**small, "steps": 7, "out": str(tmp_path), "name": name})
    plain = train(config, save=False)
    made, trainable, parameters = [], [], []

    def attach(session):
        trainable.append(sum(p.numel() for p in session.trainable))
        parameters.append(sum(p.numel() for p in session.model.parameters()))
        made.append(peers.load_peer(name)(session, cap=5))
        return made[0]

    result = train(config, save=False, attach=attach)
    (stage,) = result.stages
    assert stage is made[0].stages[0]
    assert result.validation_forwards == stage.evaluations == stage.tau >= 2
    assert result.flops["measured"] - plain.flops["measured"] == stage.flops
    # In the paper's convention one FLOP per element moved: of the prototype every parameter, frozen or not.
    model_moved = {"authors": trainable[0], "peft-prototype": parameters[0]}[name]
    one = made[0].forward_flops + model_moved
    assert result.flops["paper"] - plain.flops["paper"] == stage.evaluations * one
    assert result.seconds["validate"] == pytest.approx(stage.validate_seconds)
    assert result.seconds["move"] == pytest.approx(stage.move_seconds)
    assert result.test_loss != plain.test_loss
    events = [json.loads(line) for line in result.log.read_text(encoding="utf-8").splitlines()]
    (logged,) = [event for event in events if event["event"] == "stage"]
    assert logged["executor"] == name and logged["losses"] == [[t, loss] for t, loss in stage.losses]
    assert made[0].held == 0  # detached
