"""Capture, loop and close over a stand-in for CUDA, and with a failure planted at each call in turn."""

import gc
import random
import warnings
import weakref

import pytest
import torch

from ffkernels import ops
from ffkernels.graphs import capture as captures
from ffkernels.graphs import core as graphs
from ffkernels.graphs import driver as graph_driver
from ffkernels.graphs.driver import DriverError

CPU = torch.device("cpu")
GO = torch.zeros(1, dtype=torch.int32)  # of a loop that nothing sets the condition of


class Toy:
    """A stage whose loss is least where the weights are 4; each τ adds 1. Everything it opens it closes."""

    def __init__(self, fake, max_tau: int = 8) -> None:
        self.weight = torch.zeros(3)
        self.table = ops.TensorTable([self.weight], impl="torch")
        self.decide = fake.decide
        self.state = fake.decide.DecideState("linear", max_tau, CPU)
        self.held: list = []

    def update(self, by: float = 1.0) -> None:
        ops.checkpoint_(self.table)
        self.weight.add_(by)

    def prologue(self, handle: int | None = None) -> None:
        ops.delta_(self.table)
        self.decide.begin(self.state, ops.delta_absmax_on_device(self.table), handle)

    def body(self, handle: int | None = None) -> torch.Tensor:
        loss = (self.weight.double() - 4).square().sum()
        self.decide.decide(self.state, loss, handle=handle)
        ops.step_(self.table, self.state.accept, self.state.k)
        return loss

    def stage(self) -> graphs.WhileGraph:
        self.decide.prepare(self.state, with_condition=True)
        self.held.append(start := graphs.Capture(CPU))
        self.held.append(step := graphs.Capture(CPU, pool=start))
        self.held.append(loop := graphs.WhileGraph(CPU))
        start.warm_up(self.prologue)
        start.capture(lambda: self.prologue(loop.handle))
        step.warm_up(self.body)
        step.capture(lambda: self.body(loop.handle))
        loop.build(start, step, self.state.go)
        return loop

    def close(self) -> None:
        """As an executor does; says what could not be closed."""
        errors = []
        for graph in reversed(self.held):
            try:
                graph.close()
            except Exception as error:
                errors.append(error)
        self.held.clear()
        if errors:
            raise errors[0]


FOUND = [(0, 27.0), (1, 12.0), (2, 3.0), (3, 0.0), (4, 3.0)]


class TestStage:
    def test_a_stage_is_one_launch(self, fake):
        toy = Toy(fake)
        loop = toy.stage()
        for launches in (1, 2):
            toy.weight.zero_()
            toy.update()
            loop.launch()
            read = toy.state.read()
            assert (read.losses, read.best_tau, toy.weight.tolist()) == (FOUND, 3, [4.0] * 3)
            assert (fake.launches, fake.iterations) == (["while"] * launches, [5] * launches)
        toy.close()
        assert fake.alive() == {}

    def test_a_loop_cannot_draw_random_numbers(self, fake):
        start, step, loop = graphs.Capture(CPU), graphs.Capture(CPU), graphs.WhileGraph(CPU)
        for part, fn in ((start, lambda: None), (step, lambda: fake.random.add_(1))):
            part.warm_up(fn)
            part.capture(fn)
        assert (start.draws, step.draws) == (False, True)
        with pytest.raises(
            graphs.CaptureFailed, match=r"random numbers in the loop; .*executor='step_graph'"
        ):
            loop.build(start, step, GO)

    @pytest.mark.parametrize(("by", "reason"), [(0.0, "did not change"), (float("nan"), "not finite")])
    def test_without_an_update_the_loop_does_not_run(self, fake, by, reason):
        toy = Toy(fake)
        loop = toy.stage()
        toy.weight.zero_()
        toy.update(by)
        loop.launch()
        assert fake.iterations == [0]
        assert toy.state.read().losses == [] and reason in toy.state.read().stopped_because
        toy.close()

    def test_a_condition_that_nobody_sets_is_0(self, fake):
        start, step = graphs.Capture(CPU), graphs.Capture(CPU)
        loop, runs = graphs.WhileGraph(CPU), []
        start.capture(lambda: None)
        step.capture(lambda: runs.append(1))
        loop.build(start, step, GO)
        runs.clear()
        loop.launch()
        assert (fake.iterations, runs) == ([0], [])

    def test_a_body_without_a_condition_is_replayed_step_by_step(self, fake):
        toy, other = Toy(fake), Toy(fake)
        step = graphs.Capture(CPU)
        for each in (toy, other):
            each.update()
            each.prologue()
        step.warm_up(other.body)
        other.weight.copy_(toy.weight)
        other.table.best[0].copy_(toy.table.best[0])
        other.state.reset()
        loss = step.capture(other.body)
        for _ in range(5):
            expected = toy.body()
            step.replay()
            assert torch.equal(loss, expected) and torch.equal(toy.weight, other.weight)
            assert toy.state.read() == other.state.read()
        assert fake.launches == ["replay"] * 5
        step.close()


class TestCapture:
    def test_nothing_happens_before_the_replay_which_writes_what_was_returned(self, fake):
        x = torch.ones(3)
        capture = graphs.Capture(CPU)
        total = capture.capture(lambda: x.add_(1).sum())
        assert x.tolist() == [1.0] * 3 and fake.launches == []
        capture.replay()
        assert (x.tolist(), total.item()) == ([2.0] * 3, 6.0)
        capture.replay()
        assert (x.tolist(), total.item()) == ([3.0] * 3, 9.0)

    def test_it_happens_on_a_stream_of_its_own_in_order_with_the_current_one(self, fake):
        capture, seen = graphs.Capture(CPU), []
        capture.warm_up(lambda: seen.append(fake.stream))
        capture.capture(lambda: seen.append(fake.stream))
        (own,) = set(seen)
        assert own is not fake.stream
        assert own.waited_for == fake.streams * 2 and fake.stream.waited_for == [own] * 2

    def test_captures_that_share_memory_share_the_stream_and_the_last_gives_back(self, fake):
        first = graphs.Capture(CPU)
        second, streams = graphs.Capture(CPU, pool=first), []
        first.capture(lambda: streams.append(fake.stream))
        second.capture(lambda: streams.append(fake.stream))
        assert streams[0] is streams[1]
        first.close()
        assert fake.alive() == {"pools": 1, "graphs": 1}
        second.close()
        assert fake.alive() == {}
        with pytest.raises(RuntimeError, match="closed; share that of a live one"):
            graphs.Capture(CPU, pool=first)

    @pytest.mark.parametrize("times", [1, 2, 3])
    def test_only_the_last_warm_up_must_not_wait(self, fake, times):
        calls = []

        def fn() -> None:
            calls.append(1)
            if len(calls) < times:
                torch.ones(1).item()

        graphs.Capture(CPU).warm_up(fn, times=times)
        assert len(calls) == times

    def test_a_wait_that_torch_warns_of_is_said_to_be_where_it_is(self, fake, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
        monkeypatch.setattr(fake, "sync_is_error", graph_driver.Cuda().sync_is_error)
        capture = graphs.Capture(CPU)

        def warn() -> None:
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

        with pytest.raises(graphs.CaptureFailed, match=r'test_graphs.py:\d+: warnings.warn\("called a sync'):
            capture.warm_up(warn, times=1)
        capture.close()

    def test_a_wait_is_said_to_be_where_it_is(self, fake):
        x = torch.ones(3)

        def waits() -> None:
            if x.sum() > 100:
                x.zero_()

        for record in (graphs.Capture(CPU).warm_up, graphs.Capture(CPU).capture):
            with pytest.raises(graphs.CaptureFailed) as caught:
                record(waits)
            text = str(caught.value)
            assert "called a synchronizing CUDA operation" in text and "executor='eager'" in text
            assert "test_graphs.py" in text and "if x.sum() > 100:" in text

    def test_no_garbage_is_collected_while_recording(self, fake):
        collecting = []
        graphs.Capture(CPU).capture(lambda: collecting.append(gc.isenabled()))
        assert collecting == [False] and gc.isenabled()
        gc.disable()
        try:
            graphs.Capture(CPU).capture(lambda: None)
            assert not gc.isenabled()
        finally:
            gc.enable()

    def test_random_numbers_go_on_as_if_nothing_had_been_drawn(self, fake):
        capture = graphs.Capture(CPU)
        torch.manual_seed(3)
        random.seed(3)
        expected = torch.rand(2), random.random()
        torch.manual_seed(3)
        random.seed(3)
        capture.warm_up(lambda: (torch.rand(5), random.random()))
        capture.capture(lambda: (torch.rand(5), random.random()))
        assert torch.equal(torch.rand(2), expected[0]) and random.random() == expected[1]

    def test_memory_that_lies_unused_elsewhere_is_made_room(self, fake):
        calls = []

        def fn() -> None:
            calls.append(1)
            if "empty_cache" not in fake.calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        graphs.Capture(CPU).warm_up(fn)
        assert len(calls) == 3

        def too_much() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

        with pytest.raises(graphs.CaptureFailed, match=r"not enough memory.*2 TiB.*fewer tokens.*eager"):
            graphs.Capture(CPU).warm_up(too_much)

    def test_an_error_does_not_keep_what_the_work_had_allocated(self, fake):
        held = []

        def fails(error: Exception) -> None:
            activations = torch.ones(1000)
            held.append(weakref.ref(activations))
            raise error

        for error in (ValueError("no"), torch.OutOfMemoryError("no")):
            for record in (graphs.Capture(CPU).capture, graphs.Capture(CPU).warm_up):
                with pytest.raises(graphs.CaptureFailed) as caught:
                    record(lambda error=error: fails(error))
                assert caught.value is not None and all(each() is None for each in held)
        assert len(held) == 5, "without memory a warm-up is tried twice"

    def test_what_fails_leaves_everything_as_it_was(self, fake):
        x, capture = torch.ones(3), graphs.Capture(CPU)
        torch.manual_seed(3)
        before = torch.get_rng_state()

        def fails() -> None:
            x.add_(1)
            torch.rand(1)
            raise ValueError("sliding windows\nand more")

        with pytest.raises(
            graphs.CaptureFailed, match="cannot be captured in a CUDA graph: sliding windows, at"
        ):
            capture.capture(fails)
        assert torch.equal(torch.get_rng_state(), before) and x.tolist() == [1.0] * 3
        assert (fake.capturing, len(fake.streams), gc.isenabled()) == (None, 1, True)
        with pytest.raises(RuntimeError, match="nothing to replay"):
            capture.replay()
        capture.capture(lambda: x.add_(1))  # and it can be tried again
        capture.replay()
        assert x.tolist() == [2.0] * 3

    def test_ctrl_c_ends_a_capture_and_is_heard(self, fake):
        capture = graphs.Capture(CPU)

        def interrupted() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            capture.capture(interrupted)
        assert (fake.capturing, len(fake.streams), gc.isenabled()) == (None, 1, True)
        capture.close()
        assert fake.alive() == {}

    def test_misuse_is_refused(self, fake):
        capture, loop = graphs.Capture(CPU), graphs.WhileGraph(CPU)
        with pytest.raises(RuntimeError, match="nothing was captured"):
            _ = capture.raw
        capture.capture(lambda: None)
        with pytest.raises(RuntimeError, match="records once"):
            capture.capture(lambda: None)
        with pytest.raises(RuntimeError, match="was not built"):
            loop.launch()
        loop.build(capture, capture, GO)
        with pytest.raises(RuntimeError, match="built once"):
            loop.build(capture, capture, GO)
        for _ in range(2):
            loop.close()
            capture.close()
        with pytest.raises(RuntimeError, match="it was closed"):
            loop.launch()
        with pytest.raises(RuntimeError, match="was closed"):
            capture.replay()
        with pytest.raises(graphs.CaptureFailed, match="the capture is closed"):
            capture.capture(lambda: None)

    def test_what_nobody_closes_is_closed_when_it_is_forgotten(self, fake):
        start = graphs.Capture(CPU)
        step, loop = graphs.Capture(CPU, pool=start), graphs.WhileGraph(CPU)
        start.capture(lambda: None)
        step.capture(lambda: None)
        loop.build(start, step, GO)
        del start, step
        assert fake.alive() == {"pools": 1, "graphs": 2, "tops": 2, "execs": 1}, "a loop keeps its parts"
        del loop
        assert fake.alive() == {}
        forgotten = graphs.Capture(CPU)
        fake.capturing = object()  # somebody records: waiting for the device would break that
        del forgotten
        assert fake.alive() == {"pools": 1}
        fake.capturing = None


class TestStreams:
    """torch keeps workspaces by stream: as few streams as can be, and never two live places on one."""

    @staticmethod
    def recorded(fake) -> tuple[graphs.Capture, object]:
        """A capture, and the stream that it was warmed up and recorded on."""
        capture, seen = graphs.Capture(CPU), []
        capture.warm_up(lambda: seen.append(fake.stream))
        capture.capture(lambda: seen.append(fake.stream))
        (stream,) = set(seen)
        return capture, stream

    def test_captures_one_after_another_use_one_stream(self, fake):
        streams = []
        for _ in range(3):
            capture, stream = self.recorded(fake)
            streams.append(stream)
            capture.close()
        assert len(set(streams)) == 1 and fake.calls.count("new_stream") == 1
        assert fake.alive() == {}

    def test_two_at_once_use_two_and_those_after_them_the_same(self, fake):
        pairs = []
        for _ in range(2):
            pair = [self.recorded(fake) for _ in range(2)]
            pairs.append({stream for _, stream in pair})
            for capture, _ in pair:
                capture.close()
                capture.close()  # is given back once
        assert len(pairs[0]) == 2 and pairs[0] == pairs[1]
        assert fake.calls.count("new_stream") == 2

    def test_a_stream_is_free_when_the_last_that_shares_it_is_closed(self, fake):
        first, shared = self.recorded(fake)
        second = graphs.Capture(CPU, pool=first)
        first.close()
        other, stream = self.recorded(fake)
        assert stream is not shared
        second.close()
        last, stream = self.recorded(fake)
        assert stream is shared
        for capture in (other, last):
            capture.close()

    def test_devices_do_not_share_streams(self, fake):
        for device in (CPU, torch.device("cpu", 0), CPU):
            graphs.Capture(device).close()
        assert fake.calls.count("new_stream") == 2

    @pytest.mark.parametrize("name", ["new_pool", "claim_workspaces", "new_graph", "begin", "work", "end"])
    def test_a_capture_that_fails_gives_its_stream_back(self, fake, name):
        fake.fail(name)
        with pytest.raises(graphs.CaptureFailed):
            self.recorded(fake)
        gc.collect()
        self.recorded(fake)[0].close()
        assert fake.calls.count("new_stream") == 1 and fake.alive() == {}

    @pytest.mark.parametrize("asked", ["records still", "cannot be asked"])
    def test_a_stream_that_a_failure_spoilt_is_not_lent_again(self, fake, asked, monkeypatch):
        capture = graphs.Capture(CPU)
        with monkeypatch.context() as patch:
            patch.setattr(fake, "is_capturing", lambda: True if asked == "records still" else 1 / 0)
            with pytest.raises(graphs.CaptureFailed):
                capture.capture(lambda: 1 / 0)
        capture.close()
        self.recorded(fake)[0].close()
        assert fake.calls.count("new_stream") == 2 and fake.alive() == {}

    def test_workspaces_are_there_before_anything_is_run_or_recorded(self, fake):
        self.recorded(fake)[0].close()
        steps = [call for call in fake.calls if call in ("claim_workspaces", "in_pool", "begin")]
        assert steps == ["claim_workspaces", "in_pool"] * 2 + ["claim_workspaces", "begin"]


WORDS = [
    ("HOST", "a call back into the host"),
    ("WAIT_EVENT", "a wait for an event"),
    ("EVENT_RECORD", "an event for"),
    ("MEM_ALLOC", "cudaMallocAsync"),
    ("MEM_FREE", "cudaFreeAsync"),
    ("EXT_SEMAS_WAIT", "semaphore"),
    ("EXT_SEMAS_SIGNAL", "semaphore"),
    ("CONDITIONAL", "a conditional node"),
    ("UNKNOWN", "does not know"),
    ("SOMETHING_NEW", "a node of type SOMETHING_NEW"),
]


class TestAudit:
    @pytest.mark.parametrize(("kind", "words"), WORDS)
    def test_what_a_loop_cannot_hold_is_found_and_said(self, fake, kind, words):
        fake.nodes = ["KERNEL", kind, "MEMCPY", kind]
        capture = graphs.Capture(CPU)
        capture.capture(lambda: None)
        (found,) = graphs.audit(capture.raw, in_loop=True)
        assert words in found
        assert len(graphs.audit(capture.raw, in_loop=False)) == (kind not in ("WAIT_EVENT", "EVENT_RECORD"))

    def test_also_inside_of_child_graphs(self, fake):
        outer, inner = graphs.Capture(CPU), graphs.Capture(CPU)
        fake.nodes = ["KERNEL", "HOST", "MEM_ALLOC"]
        inner.capture(lambda: None)
        fake.nodes = ["KERNEL", "MEMSET", "MEMCPY", "EMPTY", "GRAPH"]
        outer.capture(lambda: None)
        assert graphs.audit(outer.raw, in_loop=True) == []
        fake._graphs[outer.raw].nodes[-1] = ("GRAPH", inner.raw)
        assert len(graphs.audit(outer.raw, in_loop=True)) == 2

    def test_a_loop_with_such_a_node_is_not_built(self, fake):
        start, step, loop = graphs.Capture(CPU), graphs.Capture(CPU), graphs.WhileGraph(CPU)
        fake.nodes = ["KERNEL", "MEM_FREE"]
        start.capture(lambda: None)
        fake.nodes = ["KERNEL", "HOST", "WAIT_EVENT"]
        step.capture(lambda: None)
        with pytest.raises(graphs.CaptureFailed) as caught:
            loop.build(start, step, GO)
        text = str(caught.value)
        assert "cudaFreeAsync) before the loop, a call back into the host in the loop, a wait for" in text
        assert "executor='step_graph'" in text
        assert "add_child" not in fake.calls


# Every call of a whole stage, from the first capture to the last close, and what a failed one may leave.
CALLS = dict.fromkeys(
    """new_stream new_pool graph_create handle_create wait in_pool claim_workspaces new_graph begin work end
    raw node_types add_child add_while exec_create exec_launch synchronize exec_destroy graph_destroy reset
    close_pool""".split(),
    frozenset(),
) | {"exec_destroy": {"execs"}, "graph_destroy": {"tops"}, "close_pool": {"pools"}}
BEFORE_LAUNCH = list(CALLS)[: list(CALLS).index("exec_launch")]


def run_stage(fake) -> list[tuple[int, float]]:
    toy = Toy(fake)
    try:
        loop = toy.stage()
        toy.weight.zero_()
        toy.update()
        loop.launch()
        return toy.state.read().losses
    finally:
        toy.close()


@pytest.mark.parametrize("name", CALLS)
def test_a_failure_of_any_call_leaks_nothing_and_leaves_all_as_it_was(fake, name):
    assert run_stage(fake) == FOUND
    assert set(fake.calls) == set(CALLS)
    for before in range(fake.calls.count(name)):
        captures._idle.clear()  # as in a new process
        fake.fail(name, after=before)
        torch.manual_seed(3)
        rng = torch.get_rng_state()
        with pytest.raises(RuntimeError, match=f"{name}: CUDA_ERROR_PLANTED") as caught:
            run_stage(fake)
        if name in BEFORE_LAUNCH:
            assert isinstance(caught.value, graphs.CaptureFailed)
            assert "executor='" in str(caught.value) and isinstance(caught.value.__cause__, DriverError)
        assert (fake.capturing, len(fake.streams), gc.isenabled()) == (None, 1, True)
        assert torch.equal(torch.get_rng_state(), rng)
        assert set(fake.alive()) <= CALLS[name]
        for lost in (fake._execs, fake._tops, fake._graphs, fake._pools):
            lost.clear()
        assert run_stage(fake) == FOUND, "and the next one works"


def test_the_stand_in_has_every_call_of_the_real_thing(fake):
    real = {name for name in dir(graph_driver.Cuda) if not name.startswith("_")}
    assert real <= set(dir(fake)) and set(CALLS) <= real
