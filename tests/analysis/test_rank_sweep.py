from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from ffkernels.analysis.rank_sweep import draw, rank, rank_config
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.config import TrainConfig


@pytest.fixture(scope="module")
def config(small):
    return TrainConfig(**{**small, "steps": 12, "lr": 3e-4}, fast_forward=FastForwardConfig(interval=3))


@pytest.fixture(scope="module")
def data(config):
    return rank(config, ranks=(1, 4))


def test_every_rank_has_its_own_adam(data):
    one, four = data["runs"]
    assert (one["rank"], four["rank"]) == (1, 4)
    # Two layers, query_key_value 32 → 96 and dense 32 → 32: (32 + 96 + 32 + 32) weights per rank and layer.
    assert (one["trainable"], four["trainable"]) == (2 * 192, 2 * 192 * 4)
    assert one["adam"]["test_loss"] != four["adam"]["test_loss"]
    for run in data["runs"]:
        assert run["ff"]["reached"]
        assert run["ff"]["test_loss"] <= run["adam"]["test_loss"] + 1e-4
        assert run["ff"]["saved"]["measured"] == pytest.approx(
            1 - run["ff"]["flops"]["measured"] / run["adam"]["flops"]["measured"]
        )


def test_alpha_by_rank(config):
    assert (config.rank, config.alpha) == (4, 16)
    assert [rank_config(config, r, "proportional").alpha for r in (1, 4, 16)] == [4, 16, 64]
    assert [rank_config(config, r, "fixed").alpha for r in (1, 4, 16)] == [16, 16, 16]
    assert rank_config(config, 2, "fixed").rank == 2
    with pytest.raises(ValueError, match="scaling='double': must be one of 'proportional', 'fixed'"):
        rank_config(config, 2, "double")


def test_the_picture(data):
    figure = Figure()
    draw(figure, data)
    saved, steps = figure.axes
    lines = {line.get_label(): line for line in (*saved.lines, *steps.lines)}
    assert list(lines["paper FLOPs"].get_ydata()) == [100 * r["ff"]["saved"]["paper"] for r in data["runs"]]
    assert list(lines["Adam"].get_ydata()) == [12, 12]
    assert [text.get_text() for text in saved.get_xticklabels()] == ["1", "4"]


def test_what_has_no_rank(config):
    from dataclasses import replace

    with pytest.raises(ValueError, match="method='full' has no rank"):
        rank(replace(config, method="full"))
    with pytest.raises(ValueError, match=r"ranks=.*must be one or more integers, each once"):
        rank(config, ranks=(4, 4))
    with pytest.raises(ValueError, match="rank=0: must be an integer of at least 1"):
        rank(config, ranks=(4, 0))
