from dataclasses import replace

import pytest

from ffkernels.analysis.race import outcome, race, run
from ffkernels.analysis.show import Watch
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.compare import Interrupted
from ffkernels.training.trainer import train

CONFIG = dict(steps=16, lr=3e-4)


def test_every_contender_runs_to_adams_loss_as_train_does(config, tmp_path):
    told, sessions, ended = [], [], []
    ff = FastForwardConfig(interval=2)
    outcomes = race(
        config,
        {"two": ff, "none": FastForwardConfig(interval=16)},
        check_every=2,
        watch=Watch(told.append),
        on_session=sessions.append,
        on_end=ended.append,
    )
    assert [one.name for one in told] == [s.config.name for s in sessions] == ["adam-s0", "two-s0", "none-s0"]
    assert ended == list(outcomes) == ["adam", "two", "none"]
    assert [s.ff is None for s in sessions] == [True, False, False]
    # What looks on changes nothing.
    alone = train(replace(config, out=str(tmp_path), fast_forward=None), save=False)
    assert outcomes["adam"] == outcome(alone) and "saved" not in outcomes["adam"]
    target = {"target_loss": alone.test_loss + 1e-4, "evaluate_every": 2}
    two = train(replace(config, out=str(tmp_path), fast_forward=ff, **target), save=False)
    assert outcomes["two"] == outcome(two, alone)
    assert outcomes["two"]["reached"] and outcomes["two"]["optimizer_steps"] < 16
    assert not list(tmp_path.glob("*-s0*"))


def test_what_an_outcome_says(config, tmp_path):
    config = replace(config, out=str(tmp_path))
    adam = train(config, save=False)
    two = replace(config, fast_forward=FastForwardConfig(interval=2), target_loss=adam.test_loss)
    result = train(two, save=False)
    found = outcome(result, adam)
    assert found["optimizer_steps"] == result.optimizer_steps
    assert [stage["tau"] for stage in found["stages"]] == [stage.tau for stage in result.stages]
    assert found["stages"][0]["losses"][0] == [0, result.stages[0].loss_before]
    for name in ("paper", "measured"):
        assert found["saved"][name] == 1 - result.flops[name] / adam.flops[name]
    result.reached_target = False
    assert outcome(result, adam)["saved"] is None


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
