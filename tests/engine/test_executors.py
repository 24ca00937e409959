"""What a stage is made of, and the eager way to run it."""

from __future__ import annotations

import math

import pytest
import torch

from ffkernels import ops
from ffkernels.engine import executors
from ffkernels.engine.executors import (
    NO_UPDATE,
    UPDATE_NOT_FINITE,
    EagerExecutor,
    StageProgram,
    step_pace,
)
from ffkernels.engine.search import make_search


def program(loss, update=1.0, search="linear", max_tau=16):
    weight = torch.zeros(3)
    table = ops.TensorTable([weight], impl="torch")
    ops.checkpoint_(table)
    weight.add_(update)
    return StageProgram(table, lambda: loss(float(weight[0])), make_search(search, max_tau)), weight


@pytest.mark.parametrize("search", ["linear", "parabolic"])
def test_the_whole_stage_from_the_difference_on(search):
    stage, weight = program(lambda w: (w - 6.2) ** 2, search=search)
    EagerExecutor().run(stage)
    assert weight.tolist() == [6.0] * 3  # 1 from the optimizer, 5 times repeated
    assert stage.search.best_tau == 5
    assert stage.moves == len(stage.search.losses) == len(stage.pace)
    assert stage.reason == stage.search.stopped_because
    assert stage.stopped_because is None and stage.extra_validations == 0


@pytest.mark.parametrize(
    ("update", "reason"), [(0.0, NO_UPDATE), (math.nan, UPDATE_NOT_FINITE), (math.inf, UPDATE_NOT_FINITE)]
)
def test_nothing_to_search(update, reason):
    stage, weight = program(lambda w: 1 / 0, update)
    EagerExecutor().run(stage)
    assert stage.reason == stage.stopped_because == reason
    assert stage.search.losses == [] and stage.moves == 0 and step_pace(stage) is None
    assert torch.equal(weight, torch.full((3,), update)) or math.isnan(update)


def test_a_difference_that_is_cut_leaves_the_optimizers_weights(monkeypatch):
    def cut(table):
        raise KeyboardInterrupt

    stage, weight = program(lambda w: w)
    monkeypatch.setattr(ops, "delta_", cut)
    with pytest.raises(KeyboardInterrupt):
        EagerExecutor().run(stage)
    assert weight.tolist() == [1.0] * 3


def test_a_restart_forgets_the_record_but_not_its_cost():
    stage, _ = program(lambda w: (w - 6.2) ** 2)
    EagerExecutor().run(stage)
    measured = len(stage.search.losses)
    stage.stopped_because = "something"
    stage.restart()
    assert stage.search.losses == [] and stage.search.name == "linear" and stage.search.max_tau == 16
    warm = StageProgram(stage.table, stage.validation, make_search("parabolic", 16, 5))
    warm.restart()
    assert warm.search.start == 5
    assert (stage.moves, stage.pace, stage.reason) == (0, [], "")
    assert stage.extra_validations == measured


def test_the_pace_is_the_hosts_share_and_the_whole_without_the_first_step(monkeypatch):
    clock = [0.0]

    def tick():
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(executors, "perf_counter", tick)
    stage, _ = program(lambda w: torch.tensor(-w), max_tau=3)
    EagerExecutor().run(stage)
    # start, prepared, validated, end: one second each; the host waits from prepared to validated.
    assert stage.pace == [(2.0, 3.0)] * 4
    stage.pace = [(50.0, 100.0), (1.0, 5.0), (3.0, 4.0), (2.0, 9.0)]
    assert step_pace(stage) == (2.0, 5.0)
    stage.pace = [(50.0, 100.0)]
    assert step_pace(stage) == (50.0, 100.0)
