"""Whether graphs can work here: every reason names its cure, and the small loop finds a wrong count."""

import ctypes

import pytest
import torch

from ffkernels.graphs import core as graphs
from ffkernels.graphs import while_graph
from ffkernels.graphs.driver import Cuda
from ffkernels.ops import condition

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def ways(monkeypatch):
    """Which way conditions are set, as if nothing had been tried yet."""
    ways: dict[int, str] = {}
    monkeypatch.setattr(condition, "_ways", ways)
    return ways


def test_where_nothing_stands_against_it_there_is_no_reason(fake, ways):
    assert graphs.why_no_step_graph(CPU) is None
    assert fake.calls == [], "what a step graph needs is known without trying"
    assert graphs.why_no_stage_graph(CPU) is None
    assert fake.iterations == [5, 5, 0] and ways == {0: condition.INSIDE}
    assert fake.alive() == {}
    launches = len(fake.launches)
    assert graphs.probe(CPU) is None and len(fake.launches) == launches, "a device is tried once"


def test_without_a_gpu_there_is_one_reason(monkeypatch):
    monkeypatch.setattr("ffkernels.graphs.driver.cuda", Cuda())
    for why in (graphs.why_no_step_graph, graphs.why_no_stage_graph):
        assert "these are on cpu; move the model there" in why(CPU)


@pytest.mark.parametrize(
    ("name", "value", "cause", "cure", "of_any_graph"),
    [
        ("rocm", True, "ROCm", "executor='eager'", True),
        ("no_triton", "ModuleNotFoundError: triton", "ModuleNotFoundError: triton", "pip install", True),
        ("backend", "cudaMallocAsync", "cudaMallocAsync", "backend:native", True),
        ("problem", "ModuleNotFoundError: cuda", "cuda-bindings", "pip install 'ffkernels[cuda]'", False),
        ("driver", 12020, "the driver speaks CUDA 12.2", "update it to r550", False),
    ],
)
def test_what_stands_against_graphs_is_said_with_its_cure(fake, name, value, cause, cure, of_any_graph):
    setattr(fake, name, value)
    whole, step = graphs.why_no_stage_graph(CPU), graphs.why_no_step_graph(CPU)
    assert cause in whole and cure in whole and "graph_create" not in fake.calls
    assert step == (whole if of_any_graph else None)


def test_a_driver_that_does_not_answer_is_a_reason(fake):
    fake.fail("driver_version")
    assert "CUDA_ERROR_PLANTED" in graphs.why_no_stage_graph(CPU)


@pytest.mark.parametrize("name", ["graph_create", "end", "exec_create", "exec_launch"])
def test_when_the_one_way_to_set_a_condition_fails_the_other_is_used(fake, ways, name):
    fake.fail(name)
    assert graphs.probe(CPU) is None
    assert ways == {0: condition.BESIDE}
    assert fake.alive() == {}


def test_when_all_fail_the_reason_has_all(fake, ways):
    fake.fail("exec_create", times=3)
    reason = graphs.why_no_stage_graph(CPU)
    assert reason.count("CUDA_ERROR_PLANTED") == 3 and "doctor" in reason
    assert all(f"set {way} the decision" in reason for way in ("inside", "beside", "behind"))
    assert ways == {0: condition.INSIDE} and fake.alive() == {}
    assert graphs.probe(CPU) == reason, "nor is it tried again"


@pytest.fixture
def deaf(fake, monkeypatch):
    """A driver that takes no condition from captured work, which in a loop is a child graph."""
    monkeypatch.setattr(condition, "set_beside", lambda handle, go: None)


def test_where_captured_work_cannot_set_the_condition_a_node_of_the_loop_does(fake, deaf, ways):
    assert graphs.probe(CPU) is None
    assert ways == {0: condition.BEHIND}
    # Two loops that did not run, and one that did.
    assert fake.iterations == [0, 0, 5, 5, 0] and fake.alive() == {}


def test_that_node_comes_behind_the_captured_work_before_the_loop_and_in_it(fake, ways, monkeypatch):
    condition.use(CPU, condition.BEHIND)
    built, loaded, state = [], object(), fake.decide.DecideState("linear", 8, CPU)
    monkeypatch.setattr(condition, "load", lambda device: loaded)

    def noting(name):
        def noted(*arguments):
            built.append((name, *arguments, call(*arguments)))
            return built[-1][-1]

        call = getattr(fake, name)
        monkeypatch.setattr(fake, name, noted)

    for name in ("add_child", "add_kernel", "add_while"):
        noting(name)
    start = graphs.Capture(CPU)
    step, loop = graphs.Capture(CPU, pool=start), graphs.WhileGraph(CPU)
    assert loop.handle is None, "nothing that is captured sets the condition"
    for part in (start, step):
        part.capture(lambda: None)
    loop.build(start, step, state.go)
    (handle,) = fake.conditions
    arguments = ((handle, state.go.data_ptr()), (ctypes.c_uint64, ctypes.c_void_p))
    top, first = built[0][1], built[0][-1]
    before, inside, last = built[1][-1], built[2][-1], built[3][-1]
    assert built == [
        ("add_child", top, [], start.raw, first),
        ("add_kernel", top, [first], loaded, arguments, before),
        ("add_while", top, [before], handle, inside),
        ("add_child", inside, [], step.raw, last),
        ("add_kernel", inside, [last], loaded, arguments, built[4][-1]),
    ]
    for graph in (loop, step, start):
        graph.close()


@pytest.mark.parametrize("after", [0, 1])
def test_a_node_that_is_refused_leaves_nothing_behind(fake, ways, after):
    condition.use(CPU, condition.BEHIND)
    fake.fail("add_kernel", after=after)
    with pytest.raises(graphs.CaptureFailed, match="CUDA_ERROR_PLANTED"):
        while_graph.small_loop(CPU)
    assert fake.alive() == {}


def test_a_condition_that_cannot_be_set_is_found_and_does_not_hang(fake, deaf, monkeypatch):
    add_child = fake.add_child
    monkeypatch.setattr(fake, "add_kernel", lambda graph, after, *kernel: add_child(graph, [], nothing.raw))
    nothing = graphs.Capture(CPU)
    nothing.capture(lambda: None)
    reason = graphs.probe(CPU)
    assert reason.count("it counted wrong: it found [] and ended at 1.0, not at 4.0") == 3
    assert fake.iterations == [0, 0, 0]
    nothing.close()


def test_a_loop_that_counts_wrong_is_found(fake, monkeypatch):
    set_condition = fake.set_condition
    monkeypatch.setattr(condition, "set_beside", lambda handle, go: set_condition(handle, go * (go < 0)))
    assert "it found []" in while_graph.small_loop(CPU)
    calls = []

    def stops_early(handle, go) -> None:
        calls.append(1)
        set_condition(handle, go if len(calls) % 3 else torch.zeros_like(go))

    monkeypatch.setattr(condition, "set_beside", stops_early)
    assert "not at 4.0" in while_graph.small_loop(CPU)
