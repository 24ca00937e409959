import json
from dataclasses import replace

import pytest
import torch

from ffkernels.analysis import loss_plane as module
from ffkernels.analysis import weight_space
from ffkernels.analysis.loss_plane import draw, loss_plane, what_was_seen
from ffkernels.analysis.weight_space import flat, losses_at, plane_through
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.session import open_session
from ffkernels.validation.loss import ValidationLoss

CONFIG = dict(stages=dict(interval=3, max_tau=60), steps=12)


@pytest.fixture(scope="module")
def data(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POINTS", 6)
        return loss_plane(config, grid=5, examples=12)


def weights_after(config, steps):
    with open_session(config) as session:
        for step in range(steps):
            session.step(step)
        held_out = session.task.test[:12]
        loss = ValidationLoss(session.model, held_out, collator=session.collator)
        return flat(session.trainable), float(loss()), session.test_loss()


def test_the_points_are_the_runs_own_ends(config, data):
    adam = replace(config, fast_forward=None)
    taken = data["points"]["ff"]["optimizer_steps"]
    start = weights_after(adam, 0)
    ends = {"start": start, "sgd": weights_after(adam, 12), "ff": weights_after(config, taken)}
    for name, (weights, loss, test_loss) in ends.items():
        point = data["points"][name]
        assert point["loss"] == loss and point["test_loss"] == test_loss
        moved = (weights.double() - start[0].double()).norm()
        assert point["distance"] == pytest.approx(float(moved), rel=1e-12)
        assert point["x"] ** 2 + point["y"] ** 2 == pytest.approx(float(moved) ** 2, rel=1e-9)
    plane = plane_through(*(weights for weights, *_ in ends.values()))
    with open_session(config) as session:
        loss = ValidationLoss(session.model, session.task.test[:12], collator=session.collator)
        corner = plane.weights(data["x"][4], data["y"][1])
        assert losses_at([corner], session.trainable, loss) == [data["loss"][1][4]]
    sgd, ff = data["points"]["sgd"], data["points"]["ff"]
    assert sgd["y"] == pytest.approx(0, abs=1e-12) and ff["y"] > 0
    assert data["cosine"] == pytest.approx(ff["x"] / ff["distance"], rel=1e-9)
    assert data["between"][0] == sgd["loss"] and data["between"][-1] == ff["loss"]
    assert data["kind"] == "plane" and data["examples"] == 12


def test_fast_forward_ends_at_adams_test_loss(data):
    sgd, ff = data["points"]["sgd"], data["points"]["ff"]
    assert data["until"] == "loss" and data["reached"]
    assert ff["test_loss"] <= sgd["test_loss"] + 1e-4
    assert ff["optimizer_steps"] < sgd["optimizer_steps"] == 12
    assert data["stages"] and all(step <= ff["optimizer_steps"] for step, _ in data["stages"])


def test_or_after_as_many_steps(config):
    same = loss_plane(config, until="steps", grid=3, examples=4)
    assert same["points"]["ff"]["optimizer_steps"] == 12
    assert [step for step, _ in same["stages"]] == [3, 6, 9, 12]


def test_the_ways_lead_from_the_start_to_the_ends(data):
    for name, way in data["ways"].items():
        point = data["points"][name]
        assert way[0] == [0, 0.0, 0.0]
        assert way[-1] == [point["optimizer_steps"], point["x"], point["y"]]
        steps = [step for step, _, _ in way]
        assert steps == sorted(set(steps))
    assert [step for step, _, _ in data["ways"]["sgd"]] == [0, 2, 4, 6, 8, 10, 12]
    copies = sum(len(way) for way in data["ways"].values())
    assert data["bytes_kept"] == copies * 4 * data["trainable"]


def test_the_grid_holds_everything_drawn_with_room(data):
    assert len(data["x"]) == len(data["y"]) == len(data["loss"]) == len(data["loss"][0]) == 5
    for _, x, y in data["ways"]["sgd"] + data["ways"]["ff"]:
        assert data["x"][0] < x < data["x"][-1] and data["y"][0] < y < data["y"][-1]
    json.dumps(data, allow_nan=False)


def test_a_stage_that_finds_nothing_leaves_a_line(config, monkeypatch, drawn):
    told = []
    monkeypatch.setattr(weight_space, "announce_once", lambda key, message: told.append(message))
    never = replace(config, fast_forward=FastForwardConfig(warmup=100))
    line = loss_plane(never, until="steps", grid=5, examples=4)
    assert line["kind"] == "line" and line["y"] == [0.0] and len(line["loss"]) == 1
    assert line["points"]["ff"]["x"] == line["points"]["sgd"]["x"] and line["points"]["ff"]["y"] == 0.0
    assert len(told) == 1 and "a line and no plane" in told[0]
    assert "At 9 places on the straight line" in what_was_seen(line)[1]
    assert "no barrier was seen" in what_was_seen(line)[1]
    panels = drawn(draw, line)
    assert list(panels[0].lines[0].get_ydata()) == line["loss"][0]


def test_what_was_seen_follows_the_data(data):
    seen = what_was_seen({**data, "between": [2.0, 2.5, 2.25]})
    assert "the loss rises 0.25 nats above the higher end" in seen[1]
    assert "having reached Adam's test loss" in seen[0]
    assert "without having reached" in what_was_seen({**data, "reached": False})[0]
    points = {**data["points"]}
    points["ff"] = {**points["ff"], "test_loss": points["sgd"]["test_loss"] - 0.25}
    assert "0.2500 nats below Adam's" in what_was_seen({**data, "until": "steps", "points": points})[0]
    assert f"{min(map(min, data['loss'])):.3f}" in seen[2]


def test_the_picture(data, drawn):
    panels = drawn(draw, data)
    lines = {line.get_label(): line for line in panels[0].lines}
    for label, name in (("$W_0$", "start"), ("$W_{SGD}$, Adam", "sgd"), ("$W_{FF}$, Fast Forward", "ff")):
        point = data["points"][name]
        line = lines[f"{label}: {point['loss']:.3f}"]
        assert (*line.get_xdata(), *line.get_ydata()) == (point["x"], point["y"])
    assert torch.tensor(data["loss"]).isfinite().all()
    drawn(draw, {**data, "loss": [[1.0] * 5] * 5})  # no contour to find
