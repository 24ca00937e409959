from dataclasses import replace
from functools import partial

import pytest

from ffkernels.analysis.convergence import convergence, draw, has_converged, switched_off_at
from ffkernels.engine.config import FastForwardConfig

CONFIG = dict(stages=dict(interval=2, patience=1), steps=60, evaluate_every=2, lr=3e-2)
ANALYSIS = partial(convergence, window=6, min_delta=0.02)


def test_both_end_when_nothing_improves(data):
    for run in data["runs"]:
        assert run["converged"] and run["optimizer_steps"] < 60
        regular = [(step, loss) for step, loss, *_ in run["tests"] if step % 2 == 0]
        assert regular[-1][0] == run["optimizer_steps"] and regular[-1][1] == run["test_loss"]
        assert has_converged(regular, 6, 0.02)
        assert not any(has_converged(regular[:n], 6, 0.02) for n in range(1, len(regular)))
        assert run["best_test_loss"] == min(loss for _, loss in regular)
        assert run["tests"][-1][2:] == [run["flops"]["paper"], run["flops"]["measured"]]


def test_fast_forward_is_off_after_its_patience(data):
    off, stages = data["switched_off_at"], data["runs"][1]["stages"]
    assert off == stages[-1]["optimizer_step"] and stages[-1]["tau"] == 0
    assert all(stage["tau"] for stage in stages[:-1])
    assert data["runs"][1]["optimizer_steps"] >= off + 2  # training went on without it


def test_flops_to_adams_lowest_loss(data):
    adam, ff = data["runs"]
    found = data["to_adams_best"]
    target = adam["best_test_loss"] + 1e-4
    reached = [test for test in ff["tests"] if test[1] <= target]
    if not reached:
        assert found is None
    else:
        there = next(test for test in adam["tests"] if test[1] <= target)
        assert found["optimizer_step"] == reached[0][0]
        assert found["saved"]["measured"] == pytest.approx(1 - reached[0][3] / there[3])


def test_looks_after_stages_do_not_count_for_fast_forward(config):
    """Stages at steps 1, 2, 3, … have test losses of their own; Adam's is looked at every fourth step."""
    ff = FastForwardConfig(interval=1, patience=None)
    config = replace(config, steps=8, evaluate_every=4, lr=3e-4, fast_forward=ff)
    data = convergence(config, window=8)
    adam, forward = data["runs"]
    assert {step for step, *_ in adam["tests"]} == {0, 4, 8}
    assert {1, 2, 3} < {step for step, *_ in forward["tests"]}
    early = [step for step, loss, *_ in forward["tests"] if loss <= adam["best_test_loss"]]
    assert early[0] < 4 and data["to_adams_best"]["optimizer_step"] == 4


def test_a_limit_of_steps_ends_a_run_that_still_improves(config):
    found = convergence(replace(config, steps=4), window=4)
    assert [run["optimizer_steps"] for run in found["runs"]] == [4, 4]
    assert [run["converged"] for run in found["runs"]] == [False, False]


def test_has_converged():
    falling = [(0, 3.0), (2, 2.0), (4, 1.5), (6, 1.4), (8, 1.45)]
    assert not has_converged(falling, 10, 0.0)  # the window has not passed
    assert not has_converged(falling, 4, 0.0)
    assert has_converged(falling, 4, 0.11)
    assert has_converged(falling, 2, 0.0)
    assert not has_converged(falling[:-1], 2, 0.0)


def test_switched_off_at():
    def stages(*taus):
        return [
            {"optimizer_step": 6 * i, "tau": tau, "losses": [[0, 1.0], [1, 0.5]]}
            for i, tau in enumerate(taus, start=1)
        ]

    assert switched_off_at(stages(3, 0, 0, 1, 0, 0, 0), 3) == 42
    assert switched_off_at(stages(0, 0, 1, 0, 0), 3) is None
    assert switched_off_at(stages(0, 0, 0), None) is None
    unsearched = {"optimizer_step": 3, "tau": 0, "losses": []}
    assert switched_off_at([unsearched, *stages(0, 0)], 3) is None


def test_the_picture(data, drawn):
    losses, taus = drawn(draw, data)
    for line, run in zip(losses.lines, data["runs"], strict=False):
        assert list(line.get_ydata()) == [loss for _, loss, *_ in run["tests"]]
    assert list(taus.lines[0].get_ydata()) == [stage["tau"] for stage in data["runs"][1]["stages"]]
    drawn(draw, {**data, "switched_off_at": None})
