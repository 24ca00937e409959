from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from ffkernels.analysis.interval_sweep import draw, interval
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.config import TrainConfig


@pytest.fixture(scope="module")
def config(small):
    stages = FastForwardConfig(search="linear", max_tau=64)
    return TrainConfig(**{**small, "steps": 20, "lr": 3e-4}, fast_forward=stages)


@pytest.fixture(scope="module")
def data(config):
    return interval(config, intervals=(1, 3, 30))


def test_each_interval_has_its_stages(config, data):
    assert data["adam"]["optimizer_steps"] == 20 and data["config"] == config.to_dict()
    assert data["target_loss"] == data["adam"]["test_loss"] + 1e-4
    one, three, never = data["runs"]
    assert [run["interval"] for run in data["runs"]] == [1, 3, 30]
    assert [s["optimizer_step"] for s in one["stages"]] == list(range(1, one["optimizer_steps"] + 1))
    assert [s["optimizer_step"] for s in three["stages"]] == list(range(3, three["optimizer_steps"] + 1, 3))
    assert one["reached"] and three["reached"] and one["optimizer_steps"] < 20
    # Without a stage it is Adam's run: all its steps and nothing saved.
    assert never["stages"] == [] and never["optimizer_steps"] == 20
    assert never["test_loss"] == data["adam"]["test_loss"]
    assert never["saved"] == {"paper": 0.0, "measured": 0.0}


def test_the_picture(data):
    figure = Figure()
    draw(figure, data)
    saved, steps = figure.axes
    measured, paper = (
        next(line for line in saved.lines if line.get_label() == f"{name} FLOPs")
        for name in ("measured", "paper")
    )
    assert list(measured.get_xdata()) == [1, 3, 30]
    assert list(measured.get_ydata()) == [100 * run["saved"]["measured"] for run in data["runs"]]
    assert list(paper.get_ydata()) == [100 * run["saved"]["paper"] for run in data["runs"]]
    assert [list(line.get_ydata()) for line in steps.lines] == [
        [20, 20, 20],
        [run["optimizer_steps"] for run in data["runs"]],
    ]


def test_a_target_that_was_not_reached_is_a_gap_with_a_mark(data):
    missed = {**data, "runs": [data["runs"][0], {**data["runs"][1], "saved": None}]}
    figure = Figure()
    draw(figure, missed)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert str(lines["measured FLOPs"].get_ydata()[1]) == "nan"
    assert list(lines["target not reached"].get_xdata()) == [3]


@pytest.mark.parametrize("intervals", [(), (2, 2)])
def test_bad_intervals(config, intervals):
    with pytest.raises(ValueError, match="must be one or more integers, each once"):
        interval(config, intervals=intervals)


def test_an_interval_of_nought(config):
    with pytest.raises(ValueError, match="interval=0: must be an integer of at least 1"):
        interval(config, intervals=(0,))
