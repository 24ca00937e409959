from __future__ import annotations

from dataclasses import replace

import pytest

from ffkernels.analysis.race import outcome, race, run
from ffkernels.analysis.show import Watch
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.compare import Interrupted
from ffkernels.training.config import TrainConfig
from ffkernels.training.trainer import train


@pytest.fixture(scope="module")
def config(small):
    return TrainConfig(**{**small, "steps": 16, "lr": 3e-4})


def test_every_contender_runs_to_adams_loss_as_train_does(config, tmp_path):
    told, sessions, ended = [], [], []
    ff = FastForwardConfig(interval=2)
    adam, results = race(
        config,
        {"two": ff, "none": FastForwardConfig(interval=16)},
        check_every=2,
        watch=Watch(told.append),
        on_session=sessions.append,
        on_end=lambda name, result: ended.append((name, result)),
    )
    assert [one.name for one in told] == ["adam-s0", "two-s0", "none-s0"]
    assert [s.config.name for s in sessions] == ["adam-s0", "two-s0", "none-s0"]
    assert ended == [("adam", adam), *results.items()]
    assert [s.ff is None for s in sessions] == [True, False, False]
    # What looks on changes nothing.
    alone = train(replace(config, out=str(tmp_path), fast_forward=None), save=False)
    assert adam.test_loss == alone.test_loss and adam.flops == alone.flops
    two = train(
        replace(
            config,
            out=str(tmp_path),
            fast_forward=ff,
            target_loss=adam.test_loss + 1e-4,
            evaluate_every=2,
        ),
        save=False,
    )
    assert results["two"].flops == two.flops and results["two"].test_loss == two.test_loss
    assert results["two"].reached_target and results["two"].optimizer_steps < 16
    assert not list(tmp_path.glob("*-s0*"))


def test_what_an_outcome_says(config):
    adam, results = race(config, {"two": FastForwardConfig(interval=2)})
    found = outcome(results["two"], adam)
    stages = results["two"].stages
    assert found["optimizer_steps"] == results["two"].optimizer_steps
    assert [stage["tau"] for stage in found["stages"]] == [stage.tau for stage in stages]
    assert found["stages"][0]["losses"][0] == [0, stages[0].loss_before]
    for name in ("paper", "measured"):
        assert found["saved"][name] == 1 - results["two"].flops[name] / adam.flops[name]
    assert "saved" not in outcome(adam)
    results["two"].reached_target = False
    assert outcome(results["two"], adam)["saved"] is None


def test_a_run_ends_when_its_listener_says_so(config, tmp_path):
    events = []
    result = run(
        replace(config, out=str(tmp_path), evaluate_every=3),
        Watch(event=events.append),
        stop_when=lambda event: event["event"] == "test" and event["optimizer_step"] == 6,
    )
    assert result.optimizer_steps == 6 and events[-1]["event"] == "end"


def test_ctrl_c_is_told_apart_from_that(config, tmp_path):
    def stop(event):
        if event["event"] == "step":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="run"):
        run(replace(config, out=str(tmp_path)), Watch(event=stop), stop_when=lambda event: False)
