from dataclasses import replace
from functools import partial

import pytest

from ffkernels.analysis.loss_curve import along_the_path, draw, loss_curve
from ffkernels.training.session import open_session

CONFIG = dict(stages=dict(interval=3, patience=None, max_tau=32), lr=3e-4, steps=8)
ANALYSIS = partial(loss_curve, evaluate_every=2)


@pytest.mark.parametrize("part", ["fast_forward", "optimizer"])
def test_the_runs_are_those_that_nobody_watched(config, data, part):
    unwatched = config if part == "fast_forward" else replace(config, fast_forward=None)
    with open_session(unwatched) as session:
        assert data[part]["start"] == session.test_loss()
        for step in range(session.steps):
            assert data[part]["steps"][step]["train_loss"] == session.step(step)
            found = data[part]["steps"][step]["test_loss"]
            staged = part == "fast_forward" and (step + 1) % 3 == 0
            assert (found is not None) == (staged or (step + 1) % 2 == 0)
            assert found is None or found == session.test_loss()
        if part == "fast_forward":
            stages = session.ff.stages
            assert [stage["tau"] for stage in data[part]["stages"]] == [stage.tau for stage in stages]
            assert [stage["losses"] for stage in data[part]["stages"]] == [
                [list(pair) for pair in stage.losses] for stage in stages
            ]


def test_a_stage_has_a_test_loss_at_every_tau_it_tried(data):
    forward = data["fast_forward"]
    assert [stage["optimizer_step"] for stage in forward["stages"]] == [3, 6]
    assert any(stage["tau"] > 1 for stage in forward["stages"])
    for stage in forward["stages"]:
        assert [tau for tau, _ in stage["test_losses"]] == [tau for tau, _ in stage["losses"]]
        # Where the stage stopped is where the run went on.
        after = forward["steps"][stage["optimizer_step"] - 1]["test_loss"]
        assert dict(stage["test_losses"])[stage["tau"]] == after


def test_reached_is_the_first_step_as_good_as_the_optimizers_last(data):
    final = data["optimizer"]["steps"][-1]["test_loss"]
    tested = [(s["optimizer_step"], s["test_loss"]) for s in data["fast_forward"]["steps"] if s["test_loss"]]
    assert data["reached"] == next((step for step, loss in tested if loss <= final), None)
    assert data["reached"] is not None


RUN = {
    "start": 9.0,
    "steps": [
        {"optimizer_step": 1, "train_loss": 8.5, "test_loss": None},
        {"optimizer_step": 2, "train_loss": 8.0, "test_loss": 5.0},
        {"optimizer_step": 3, "train_loss": 4.0, "test_loss": 4.5},
    ],
    "stages": [
        {
            "optimizer_step": 2,
            "tau": 3,
            "losses": [[0, 7.0], [1, 6.0], [2, 5.0], [4, 5.5], [3, 4.0]],
            "test_losses": [[0, 7.5], [1, 6.5], [2, 6.6], [4, 5.5], [3, 5.0]],
        }
    ],
}


def test_the_path_is_as_long_as_its_steps():
    points, stages = along_the_path(RUN)
    assert points == [(0.0, 9.0), (2, 7.5), (6, 4.5)]
    assert stages == [[(2, 7.5), (3, 6.5), (4, 6.6), (5, 5.0)]]


def test_a_stage_with_nothing_to_search_is_a_step_like_others():
    run = {**RUN, "stages": [{"optimizer_step": 2, "tau": 0, "losses": [], "test_losses": []}]}
    assert along_the_path(run) == ([(0.0, 9.0), (2, 5.0), (3, 4.5)], [])


def test_the_picture(data, drawn):
    walk, both, path = drawn(draw, data)
    assert len(walk.lines[0].get_xdata()) == 8  # a point per optimizer step
    assert len(walk.lines) == len(path.lines) == 1 + 2  # and a line per stage
    points, stages = along_the_path(data["fast_forward"])
    assert [tuple(map(float, p)) for p in zip(*path.lines[0].get_data(), strict=True)] == points
    assert [len(line.get_xdata()) for line in path.lines[1:]] == [len(stage) for stage in stages]
    plain, forward = both.lines[0].get_ydata(), both.lines[1].get_ydata()
    assert plain[0] == forward[0] == data["optimizer"]["start"]
    assert plain[-1] == data["optimizer"]["steps"][-1]["test_loss"]
