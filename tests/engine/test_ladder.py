"""Which executor runs, in what order they are tried, what is said, and when a graph steps aside."""

import copy
import pickle
import signal
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from small_loops import descend
from torch import nn

from ffkernels import FastForward, FastForwardConfig, Stage, ValidationLoss
from ffkernels.engine import ladder
from ffkernels.engine.ladder import NO_LAUNCHES, PROFILED, graphs_pay
from ffkernels.graphs import executors as graph_executors
from ffkernels.graphs import rules as capture_rules
from ffkernels.graphs import support as graph_support
from ffkernels.graphs import token as tokens
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.stage.program import Pace

CPU = torch.device("cpu")


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.0, 1.0, -1.0]))

    def forward(self, shift=0.0):
        return (torch.tensor([1.0, 0.3, 2.0]) * (self.w - 3.0 - shift) ** 2).sum()


def loss(model):
    return model()


class Run:
    """A model that trains one step per stage; `stage()` returns the record of the next one."""

    def __init__(self, executor="auto", loss=loss, **config):
        self.model = Bowl()
        self.optimizer = torch.optim.SGD([self.model.w], lr=1e-3)
        config = FastForwardConfig(interval=1, executor=executor, patience=None, **config)
        self.ff = FastForward(self.model, self.optimizer, ValidationLoss(self.model, loss), config)

    def stage(self) -> Stage:
        descend(self.optimizer, self.model(torch.tensor([1.0, -1.0, 0.5]).roll(len(self.ff.stages))))
        return self.ff.stages[-1]

    def stages(self, count):
        return [self.stage() for _ in range(count)]

    def result(self):
        return [(s.tau, s.losses, s.stopped_because) for s in self.ff.stages], self.model.w.tolist()


@contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def names(stages):
    return [stage.executor for stage in stages]


def eager_result(count, **config):
    run = Run("eager", **config)
    run.stages(count)
    return run.result()


@pytest.fixture
def graphs_allowed(fake, monkeypatch):
    """Callables may be captured, and the host is all that an eager step waits for."""
    monkeypatch.setattr(capture_rules, "why_not_captured", lambda *args, **kwargs: None)
    pace(monkeypatch, 1.0, 1.0, False)
    return fake


def pace(monkeypatch, *measured):
    monkeypatch.setattr(ladder, "step_pace", lambda program: Pace(*measured))


# ---- does it pay? ----


@pytest.mark.parametrize("host", [0.9, 0.1])
@pytest.mark.parametrize(
    ("behind", "pays", "words"),
    [(True, False, "the device is late: launches hide"), (False, True, "the device waits"), (None, True, "")],
)
def test_before_a_capture_the_host_must_be_what_is_waited_for(host, behind, pays, words):
    found, reason = graphs_pay(Pace(host, 1.0, behind))
    assert found is pays
    assert f"{1000 * host:.3g} ms" in reason and "1e+03 ms" in reason and words in reason


@pytest.mark.parametrize(
    ("capture", "replay", "pays", "words"),
    [
        (1.0, 0.004, True, "after 167 steps"),
        (6.0, 0.004, True, "after 1,000 steps"),
        (6.1, 0.004, True, "after 1,017 steps"),  # spent already, and the gain is large
        (0.4, 0.0096, True, "after 1,000 steps"),
        (0.5, 0.0096, False, "after 1,250 steps, which is more than the 1,000 allowed for a gain that small"),
        (0.1, 0.010, False, "saves nothing"),
        (0.1, 0.020, False, "saves nothing"),
    ],
)
def test_after_a_capture_the_gain_must_pay_for_it(capture, replay, pays, words):
    found, reason = graphs_pay(Pace(0.009, 0.010, False), capture, replay)
    assert found is pays
    assert words in reason and "10 ms" in reason


# ---- without a GPU ----


@pytest.mark.parametrize("profiler", [nullcontext, torch.autograd.profiler.profile])
def test_a_cpu_is_eager_and_nothing_is_said(profiler):
    with silence(), profiler():
        stages = Run("auto").stages(2)
    assert [(s.executor, s.executor_reason) for s in stages] == [("eager", NO_LAUNCHES)] * 2


@pytest.mark.parametrize("name", ["step_graph", "stage_graph"])
def test_a_graph_asked_for_on_a_cpu_is_refused_at_once_and_leaves_no_hook_behind(name):
    model = Bowl()
    optimizer = torch.optim.SGD([model.w], lr=1e-3)
    with pytest.raises(RuntimeError, match=rf'executor="{name}" cannot run here: .*CUDA.*; or leave it at'):
        FastForward(model, optimizer, loss, FastForwardConfig(executor=name))
    with FastForward(model, optimizer, loss) as ff:
        assert ff.active


# ---- the order, and what is said ----


def test_auto_measures_first_then_takes_the_whole_stage(graphs_allowed):
    with silence():
        run = Run()
        stages = run.stages(3)
    assert names(stages) == ["eager", "stage_graph", "stage_graph"]
    assert "measured first, to see whether stage_graph pays" in stages[0].executor_reason
    assert "pay for themselves" in stages[1].executor_reason
    assert run.result() == eager_result(3)


def test_a_graph_asked_for_runs_from_the_first_stage_on(fake):
    for name in ("step_graph", "stage_graph"):
        run = Run(name)
        assert [(s.executor, s.executor_reason) for s in run.stages(2)] == [(name, "asked for")] * 2
        assert run.result() == eager_result(2)


def test_a_stage_without_an_update_measures_nothing(fake, monkeypatch):
    monkeypatch.setattr(capture_rules, "why_not_captured", lambda *args, **kwargs: None)
    monkeypatch.setattr(ladder, "graphs_pay", lambda *numbers: (True, "pays"))
    run = Run()
    run.optimizer.param_groups[0]["lr"] = 0.0
    assert names(run.stages(2)) == ["eager", "eager"]
    run.optimizer.param_groups[0]["lr"] = 1e-3
    assert names(run.stages(3)) == ["eager", "stage_graph", "stage_graph"]


def test_without_bindings_a_step_is_a_graph(graphs_allowed):
    graphs_allowed.problem = "No module named 'cuda'"
    run = Run()
    with pytest.warns(
        FFKernelsNotice, match=r"as one graph replay per step .*cuda-bindings.*pip install"
    ) as said:
        stages = run.stages(2)
    assert len(said) == 1
    assert names(stages) == ["eager", "step_graph"]
    assert "cuda-bindings" in stages[1].executor_reason and "captured step" in stages[1].executor_reason
    with pytest.raises(RuntimeError, match=r"cannot run here: .*cuda-bindings"):
        Run("stage_graph")


def test_without_any_graph_a_stage_is_eager_and_the_cause_said_once(graphs_allowed):
    graphs_allowed.backend = "cudaMallocAsync"
    with pytest.warns(
        FFKernelsNotice, match=r"run eagerly \(eager\): memory comes from cudaMallocAsync"
    ) as said:
        stages = [*Run().stages(2), *Run().stages(1)]
    assert len(said) == 1 and str(said[0].message).count("cudaMallocAsync") == 1
    assert names(stages) == ["eager"] * 3
    assert stages[0].executor_reason.startswith("memory comes from cudaMallocAsync")


def test_a_model_that_refuses(fake):
    with pytest.warns(FFKernelsNotice, match=r"run eagerly .*callable path"):
        stage = Run().stage()
    assert stage.executor == "eager" and "callable path" in stage.executor_reason


@pytest.mark.parametrize(
    ("asked", "call", "times", "said", "then"),
    [
        *((a, "exec_create", 1, "per step .*stage_graph", "step_graph") for a in ("auto", "stage_graph")),
        *((a, "end", 2, "run eagerly .*step_graph", "eager") for a in ("auto", "stage_graph", "step_graph")),
    ],
)
def test_a_stage_that_cannot_be_captured_becomes_steps_and_then_eager(
    asked, call, times, said, then, graphs_allowed
):
    run = Run(asked)
    graph_support.probe(CPU)
    graphs_allowed.fail(call, times=times)
    with pytest.warns(FFKernelsNotice, match=f"{said} could not be captured: .*PLANTED"):
        stages = run.stages(3)
    assert names(stages)[-2:] == [then] * 2
    assert run.result() == eager_result(3)
    if then == "eager":
        assert names(stages) == ["eager"] * 3 and graphs_allowed.alive() == {}
    else:
        assert "stage_graph could not be captured" in stages[-1].executor_reason


def test_a_loss_that_reads_on_the_host_is_named(fake):
    run = Run("step_graph", loss=lambda model: model().item())
    with pytest.warns(FFKernelsNotice, match="could not be captured: .*synchroni"):
        stage = run.stage()
    assert stage.executor == "eager" and stage.tau > 0
    assert run.result() == eager_result(1, loss=lambda model: model().item())


def test_an_error_of_the_loss_itself_is_raised(fake):
    run = Run("stage_graph", loss=lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError), pytest.warns(FFKernelsNotice, match="division by zero"):
        run.stage()


# ---- under a profiler ----


@pytest.mark.parametrize("asked", ["auto", "stage_graph"])
def test_while_a_profiler_is_on_no_stage_is_one_launch_and_then_again(asked, graphs_allowed):
    run = Run(asked)
    run.stages(2)
    assert run.ff.stages[-1].executor == "stage_graph"
    graphs_allowed.calls.clear()
    graphs_allowed.profiler = True
    told = r'\(eager\) for the time being: .*executor="step_graph"'
    with pytest.warns(FFKernelsNotice, match=told) as said:
        stages = run.stages(2)
    assert len(said) == 1
    assert [(s.executor, s.executor_reason) for s in stages] == [("eager", PROFILED)] * 2
    graphs_allowed.profiler = False
    stage = run.stage()
    assert stage.executor == "stage_graph" and "profiler" not in stage.executor_reason
    assert "begin" not in graphs_allowed.calls and "exec_launch" in graphs_allowed.calls, "captured once"
    assert run.result() == eager_result(5)


def test_what_is_first_asked_for_under_a_profiler_is_tried_when_it_is_off(fake):
    fake.profiler = True
    run = Run("stage_graph")
    with pytest.warns(FFKernelsNotice, match="a profiler is on"):
        assert run.stage().executor == "eager"
    assert fake.iterations == [] and fake.launches == []
    fake.profiler = False
    assert run.stage().executor == "stage_graph"
    fake.profiler, fake.rocm = True, True
    with pytest.raises(RuntimeError, match=r'"stage_graph" cannot run here: .*ROCm'):
        Run("stage_graph")


def test_a_pace_under_a_profiler_is_not_asked_whether_a_graph_pays(graphs_allowed, monkeypatch):
    graphs_allowed.profiler = True
    run = Run()
    with pytest.warns(FFKernelsNotice, match="a profiler is on"):
        run.stage()
    graphs_allowed.profiler = False
    stages = run.stages(2)
    assert names(stages) == ["eager", "stage_graph"]
    assert "measured first" in stages[0].executor_reason


def test_steps_are_replayed_under_a_profiler_too(fake):
    fake.profiler = True
    with silence():
        assert names(Run("step_graph").stages(2)) == ["step_graph"] * 2


# ---- stepping aside ----


@pytest.mark.parametrize(
    ("asked", "measured", "executors", "why"),
    [
        ("auto", (0.009, 0.010, True), ["eager"] * 4, "launches hide behind"),
        # Closed after two stages.
        ("auto", (1e-9, 1e-9), ["eager", "stage_graph", "stage_graph", "eager"], "the graph saves nothing"),
        ("step_graph", (1e-9, 1e-9), ["step_graph"] * 4, "asked for"),
    ],
)
def test_a_graph_that_does_not_pay_is_left_unless_it_was_asked_for(
    asked, measured, executors, why, graphs_allowed, monkeypatch
):
    pace(monkeypatch, *measured)
    run = Run(asked)
    with silence():
        stages = run.stages(4)
    assert names(stages) == executors
    assert all(why in s.executor_reason for s in stages[1:])
    assert run.result() == eager_result(4)
    if asked == "auto":
        assert graphs_allowed.alive() == {}
    if measured[-1] is True:
        assert "10 ms" in stages[2].executor_reason
        assert graphs_allowed.iterations == [5, 5, 0], "the trial's launches alone"


def test_a_wrong_graph_is_given_up_and_the_stage_run_again(graphs_allowed, monkeypatch):
    class Lying(ValidationLoss):
        def evaluate(self):
            return super().evaluate() + 1

    monkeypatch.setitem(globals(), "ValidationLoss", Lying)
    run = Run("stage_graph")
    with pytest.warns(FFKernelsNotice, match="given up and run again eagerly: at τ = 0 the graph measured"):
        stages = run.stages(2)
    assert names(stages) == ["eager"] * 2
    assert "at τ = 0" in stages[1].executor_reason
    assert run.result() == eager_result(2)
    assert graphs_allowed.alive() == {}
    per_loss = 0  # a bowl has no matrix products
    assert stages[0].flops == per_loss + 2 * 3 * stages[0].evaluations


def test_a_later_fault_ends_the_graphs_with_the_devices_record(fake, monkeypatch):
    run = Run("stage_graph")
    run.stage()
    read = fake.decide.DecideState.read

    def tampered(state):
        decided = read(state)
        return type(decided)(**{**vars(decided), "stopped_because": "weather"})

    monkeypatch.setattr(fake.decide.DecideState, "read", tampered)
    with pytest.warns(FFKernelsNotice, match="captured stages are given up: .*weather"):
        stage = run.stage()
    assert (stage.executor, stage.stopped_because) == ("stage_graph", "weather")
    assert run.model().item() == stage.loss_after
    assert run.stage().executor == "eager"
    assert fake.alive() == {}


def test_what_goes_out_of_date_all_the_time_is_given_up(fake, monkeypatch):
    counter = iter(range(100))
    token = tokens.token
    monkeypatch.setattr(tokens, "token", lambda v: token(v)._replace(version=(next(counter), "fast")))
    run = Run("step_graph")
    with pytest.warns(FFKernelsNotice, match="went out of date 4 times") as said:
        stages = run.stages(7)
    most = graph_executors.MAX_CAPTURES
    assert names(stages) == ["step_graph"] * most + ["eager"] * (7 - most)
    assert any("captured again: the validation set's buffers" in str(w.message) for w in said)
    assert run.result() == eager_result(7)
    assert fake.alive() == {}


@pytest.mark.parametrize(
    ("name", "told"), [("step_graph", "out of memory"), ("stage_graph", "no memory for the copies")]
)
def test_no_memory_for_a_capture_or_for_its_check_is_not_the_end(name, told, fake, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run = Run(name)
    if name == "step_graph":
        monkeypatch.setattr(fake, "begin", full)
    else:
        monkeypatch.setattr(graph_executors, "Snapshot", full)
    with pytest.warns(FFKernelsNotice, match=told):
        assert run.stage().executor == "eager"
    assert run.result() == eager_result(1) and fake.alive() == {}


def test_ctrl_c_in_a_captured_stage_is_recorded_with_what_was_found(fake, monkeypatch):
    run = Run("stage_graph")
    run.stage()
    launch = fake.exec_launch

    def interrupted(*args):
        launch(*args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fake, "exec_launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.stage()
    stage = run.ff.stages[-1]
    assert (stage.executor, stage.stopped_because) == ("stage_graph", "interrupted by KeyboardInterrupt")
    assert stage.tau > 0 and run.model().item() == stage.loss_after
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- the record ----


def test_a_stage_says_which_executor_and_why_also_when_read_from_old_records():
    stage = Run("eager").stage()
    record = stage.to_dict()
    assert record["executor_reason"] == "asked for"
    assert Stage.from_dict(record) == stage
    del record["executor_reason"]
    assert Stage.from_dict(record).executor_reason == ""


def test_warming_up_and_checking_are_charged(fake):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    def loss(model):
        return (model(x) ** 2).mean()

    flops = {}
    for name in ("eager", "stage_graph"):
        model = nn.Linear(8, 4, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        config = FastForwardConfig(interval=1, executor=name)
        with FastForward(model, optimizer, ValidationLoss(model, loss), config) as ff:
            loss(model).backward()
            for _ in range(2):
                optimizer.step()
        flops[name] = [stage.flops for stage in ff.stages]
    one = 2 * 16 * 8 * 4
    extra = graph_executors.WARM_UPS + 2 + (ff.stages[0].losses[-1][0] != ff.stages[0].tau)
    assert flops["stage_graph"] == [flops["eager"][0] + extra * one, flops["eager"][1]]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_fast_forward_cannot_be_copied(copied):
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict\(\)"):
        copied(Run("eager").ff)
