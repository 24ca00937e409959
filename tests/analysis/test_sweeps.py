import pytest

from ffkernels.analysis.sweeps import draw, interval, rank, rank_config

CONFIG = dict(stages=dict(interval=3), steps=12, lr=3e-4)


@pytest.fixture(scope="module")
def ranks(config):
    return rank(config, ranks=(1, 4))


@pytest.fixture(scope="module")
def swept(run_of):
    config = run_of(dict(search="linear", max_tau=64), steps=20, lr=3e-4)
    return {**interval(config, intervals=(1, 3, 30)), "given": config.to_dict()}


def test_every_rank_has_its_own_adam(ranks):
    one, four = ranks["runs"]
    assert (one["rank"], four["rank"]) == (1, 4)
    # Two layers, query_key_value 32 → 96 and dense 32 → 32: (32 + 96 + 32 + 32) weights per rank and layer.
    assert (one["trainable"], four["trainable"]) == (2 * 192, 2 * 192 * 4)
    assert one["adam"]["test_loss"] != four["adam"]["test_loss"]
    for run in ranks["runs"]:
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


def test_the_picture_of_ranks(ranks, drawn):
    saved, steps = drawn(draw, ranks)
    lines = {line.get_label(): line for line in (*saved.lines, *steps.lines)}
    assert list(lines["paper FLOPs"].get_ydata()) == [100 * r["ff"]["saved"]["paper"] for r in ranks["runs"]]
    assert list(lines["Adam"].get_ydata()) == [12, 12]
    assert [text.get_text() for text in saved.get_xticklabels()] == ["1", "4"]


def test_each_interval_has_its_stages(swept):
    assert swept["adam"]["optimizer_steps"] == 20 and swept["config"] == swept["given"]
    assert swept["target_loss"] == swept["adam"]["test_loss"] + 1e-4
    one, three, never = swept["runs"]
    assert [run["interval"] for run in swept["runs"]] == [1, 3, 30]
    assert [s["optimizer_step"] for s in one["stages"]] == list(range(1, one["optimizer_steps"] + 1))
    assert [s["optimizer_step"] for s in three["stages"]] == list(range(3, three["optimizer_steps"] + 1, 3))
    assert one["reached"] and three["reached"] and one["optimizer_steps"] < 20
    # Without a stage it is Adam's run: all its steps and nothing saved.
    assert never["stages"] == [] and never["optimizer_steps"] == 20
    assert never["test_loss"] == swept["adam"]["test_loss"]
    assert never["saved"] == {"paper": 0.0, "measured": 0.0}


def test_the_picture_of_intervals(swept, drawn):
    saved, steps = drawn(draw, swept)
    measured, paper = (
        next(line for line in saved.lines if line.get_label() == f"{name} FLOPs")
        for name in ("measured", "paper")
    )
    assert list(measured.get_xdata()) == [1, 3, 30]
    assert list(measured.get_ydata()) == [100 * run["saved"]["measured"] for run in swept["runs"]]
    assert list(paper.get_ydata()) == [100 * run["saved"]["paper"] for run in swept["runs"]]
    assert [list(line.get_ydata()) for line in steps.lines] == [
        [20, 20, 20],
        [run["optimizer_steps"] for run in swept["runs"]],
    ]


def test_a_target_that_was_not_reached_is_a_gap_with_a_mark(swept, drawn):
    missed = {**swept, "runs": [swept["runs"][0], {**swept["runs"][1], "saved": None}]}
    panels = drawn(draw, missed)
    lines = {line.get_label(): line for line in panels[0].lines}
    assert str(lines["measured FLOPs"].get_ydata()[1]) == "nan"
    assert list(lines["target not reached"].get_xdata()) == [3]
