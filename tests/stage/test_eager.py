"""What a stage is made of, and the eager way to run it."""

import math
from types import SimpleNamespace

import pytest
import torch

from ffkernels import ValidationLoss, ops
from ffkernels.engine.ladder import graphs_pay
from ffkernels.search.search import make_search
from ffkernels.stage import clock as stage_clock
from ffkernels.stage import eager as executors
from ffkernels.stage.eager import EagerExecutor
from ffkernels.stage.program import NO_UPDATE, UPDATE_NOT_FINITE, Pace, StageProgram, step_pace


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
    assert stage.pace == [(2.0, 3.0, None)] * 4
    stage.pace = [Pace(50.0, 100.0), Pace(1.0, 5.0), Pace(3.0, 4.0), Pace(2.0, 9.0)]
    assert step_pace(stage) == (2.0, 5.0, None)
    stage.pace = [Pace(50.0, 100.0)]
    assert step_pace(stage) == (50.0, 100.0, None)


@pytest.mark.parametrize(
    ("told", "behind"),
    [([True, False, False], False), ([False, True, True], True), ([True, True, False], False)],
)
def test_most_steps_say_who_waits_and_the_first_is_not_asked(told, behind):
    stage, _ = program(lambda w: w)
    stage.pace = [Pace(1.0, 2.0, each) for each in told]
    assert step_pace(stage).behind is behind


class Machine:
    """A host that launches a validation and a device that runs it, with `DEPTH` launches pending at most.

    Args:
        launches: of a forward, before its head.
        forwards: of one validation.
        host, kernel, head: microseconds of a launch on the host, of a kernel, and of one of a head's 20.
    """

    DEPTH = 1000

    def __init__(self, launches: int, forwards: int, host: float, kernel: float, head: float) -> None:
        self.parts = [(launches, kernel), (20, head)] * forwards
        self.host, self.now, self.ends, self.calls = host, 0.0, [0.0], 0
        self.labelled, self.before_head = self, None

    def __call__(self) -> float:
        for count, kernel in self.parts:
            if count == 20:
                self.before_head()
            for _ in range(count):
                self.now = max(self.now + self.host, self.ends[-self.DEPTH :][0])
                self.ends.append(max(self.now, self.ends[-1]) + kernel)
        self.calls += 1
        return float(-self.calls)

    def event(self, device) -> SimpleNamespace:
        at = self.ends[-1]
        return SimpleNamespace(query=lambda: self.now >= at)

    def read(self, loss, sums):
        self.now = max(self.now, self.ends[-1])
        return loss, sums


MACHINES = {
    "a small model": ((1900, 1, 6, 2, 2), False),
    "a small model with a large vocabulary": ((500, 1, 6, 2, 200), False),
    "a small model in several forwards": ((1900, 3, 6, 5, 20), False),
    "a large model": ((2000, 4, 6, 100, 100), True),
    "a large model in one forward": ((2000, 1, 6, 100, 100), True),
    "a large model of few launches": ((300, 1, 6, 100, 100), True),
    "a device that is a little slower": ((1900, 1, 6, 8, 8), True),
}


@pytest.mark.parametrize("name", MACHINES)
def test_an_event_tells_who_waits_for_whom_where_the_hosts_time_does_not(name, monkeypatch):
    sizes, behind = MACHINES[name]
    machine = Machine(*sizes)
    monkeypatch.setattr(executors, "perf_counter", lambda: machine.now)
    monkeypatch.setattr(executors, "read_together", machine.read)
    monkeypatch.setattr(stage_clock, "_recorded_event", machine.event)
    stage, _ = program(None, max_tau=2)
    monkeypatch.setattr(stage, "validation", machine)
    monkeypatch.setattr(stage.clock, "_start", None)
    EagerExecutor().run(stage)
    pace = step_pace(stage)
    assert pace.behind is behind and machine.before_head is None
    assert graphs_pay(pace)[0] is not behind
    if name == "a large model":
        assert pace.host / pace.total > 0.85, "the host waits while it launches"


def test_the_mark_is_set_between_backbone_and_head_of_each_forward(tiny_model, padded_batch):
    model = tiny_model("llama")
    validation = ValidationLoss(model, [padded_batch(6, 24)], micro_batch_tokens=48)
    order = []
    model.model.register_forward_hook(lambda *_: order.append("backbone"))
    model.lm_head.register_forward_pre_hook(lambda *_: order.append("head"))
    validation.labelled.before_head = lambda: order.append("mark")
    validation.measure()
    forwards = len(validation.labelled.micro_batches)
    assert forwards > 1 and order == ["backbone", "mark", "head"] * forwards
