"""Captures and loops where they are real. What could hang or poison a process is tried in one of its own."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ffkernels import ops
from ffkernels.graphs import core as graphs
from ffkernels.graphs import driver as graph_driver
from ffkernels.graphs import probe as graph_probe
from ffkernels.graphs import support as graph_support
from ffkernels.search.search import make_search

pytestmark = pytest.mark.gpu

SEARCHES = ("parabolic", "linear")
MIB = 1 << 20
# What a stream of captures keeps for good, on Hopper: the workspaces of matrix products, 34 MiB.
KEPT = 40 * MIB
# Seconds. A GPU that hangs in an endless loop is freed with its process.
PATIENCE = 45.0


@pytest.fixture(scope="session")
def bindings(gpu):
    problem = graph_driver.cuda.bindings_problem()
    if problem:
        pytest.skip(f"loops on the device need cuda-bindings: {problem}")
    if graph_driver.cuda.driver_version() < graph_support.WHILE_NODES:
        pytest.skip("loops on the device need driver r550 or later")


@pytest.fixture(scope="session")
def tried(gpu, bindings) -> dict[str, str]:
    """What came of the small loop with either way to set its condition: "" where it counted right."""
    uuid = graph_driver.cuda.gpu(gpu)["uuid"]

    def attempt(way: str) -> str:
        try:
            return graph_probe.attempt(gpu, uuid, way).problem or ""
        except graph_probe.NotTried as reason:
            return f"not tried: {reason}"

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(graph_probe, "LIMIT", PATIENCE)
        return dict(zip(graph_probe.WAYS, pool.map(attempt, graph_probe.WAYS), strict=True))


@pytest.mark.parametrize("way", graph_probe.WAYS)
def test_a_small_loop_counts_right(tried, way):
    assert tried[way] == "", tried[way]


def test_the_first_verdict_is_found_apart_and_kept(gpu, bindings, tmp_path, monkeypatch):
    monkeypatch.setenv("FFKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(graph_probe, "LIMIT", PATIENCE)
    first = graph_probe.verdict(gpu)
    assert first.problem is None, first.problem
    assert len(list((tmp_path / "graph-probe").glob("*.json"))) == 1
    monkeypatch.setattr(graph_probe, "attempt", None)
    assert graph_probe.verdict(gpu) == first


def test_a_process_told_of_another_gpu_does_not_try_this_one(gpu, bindings):
    with pytest.raises(graph_probe.NotTried, match="not the one that was meant"):
        graph_probe.attempt(gpu, "no-such-uuid", "inside")


@pytest.fixture
def loops(gpu, tried):
    """Where a loop works in a process of its own, it may be tried in this one."""
    from ffkernels.ops import condition

    worked = [way for way, problem in tried.items() if not problem]
    if not worked:
        pytest.skip("no loop worked in a process of its own")
    assert graphs.why_no_stage_graph(gpu) is None
    assert condition.inside(gpu) == (worked[0] == condition.INSIDE)


class Stage:
    """Weights whose loss falls for `steps` steps along the update; by graphs, or by a loop on the host."""

    def __init__(self, gpu, kernels: str, search: str, max_tau: int = 100) -> None:
        from ffkernels.ops import decide

        generator = torch.Generator().manual_seed(0)
        self.device, self.name, self.max_tau = gpu, search, max_tau
        self.start = [torch.randn(n, generator=generator).to(gpu) for n in (3, 2048, 5001)]
        self.weights = [w.clone() for w in self.start]
        self.targets = [w.clone() for w in self.start]
        self.table = ops.TensorTable(self.weights, impl=kernels)
        self.decide, self.state = decide, decide.DecideState(search, max_tau, gpu)
        self.held: list = []

    def update(self, steps: float, by: float = 0.01) -> None:
        """An optimizer's step, with the best weights `steps` times as far away."""
        for weight, start, target in zip(self.weights, self.start, self.targets, strict=True):
            weight.copy_(start)
            target.copy_(start + by * (1 + steps))
        ops.checkpoint_(self.table)
        for weight in self.weights:
            weight.add_(by)

    def validate(self) -> torch.Tensor:
        pairs = zip(self.weights, self.targets, strict=True)
        return torch.stack([(w.double() - t.double()).square().sum() for w, t in pairs]).sum()

    def prologue(self, handle: int | None = None) -> None:
        ops.delta_(self.table)
        self.decide.begin(self.state, ops.delta_absmax_on_device(self.table), handle)

    def body(self, handle: int | None = None) -> None:
        self.decide.decide(self.state, self.validate(), handle=handle)
        ops.step_(self.table, self.state.accept, self.state.k)

    def on_host(self):
        search, base = make_search(self.name, self.max_tau), 0
        ops.delta_(self.table)
        while (tau := search.propose()) is not None:
            search.observe(tau, float(self.validate()))
            base = tau if search.accepted else base
            following = search.propose()
            ops.step_(self.table, search.accepted, 0.0 if following is None else float(following - base))
        return search

    def captured(self, loop: bool) -> list:
        self.decide.prepare(self.state, with_condition=loop)
        start = graphs.Capture(self.device)
        step = graphs.Capture(self.device, pool=start)
        self.held += [start, step]
        handle = None
        if loop:
            self.held.append(graphs.WhileGraph(self.device))
            handle = self.held[-1].handle
        start.warm_up(self.prologue)
        start.capture(lambda: self.prologue(handle))
        step.warm_up(self.body)
        step.capture(lambda: self.body(handle))
        if loop:
            self.held[-1].build(start, step, self.state.go)
        return self.held

    def close(self) -> None:
        while self.held:
            self.held.pop().close()


@pytest.fixture
def stage(gpu):
    made = []

    def make(*arguments) -> Stage:
        made.append(Stage(gpu, *arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


UPDATES = [(17.3, 0.01), (0.0, 0.01), (250.0, 0.01), (1.0, 0.5), (-1.0, 0.01), (60.0, -0.02)]


def same_as_on_host(twin: Stage, other: Stage, search) -> None:
    found = other.state.read()
    assert found.losses == search.losses and found.best_tau == search.best_tau
    assert found.stopped_because == search.stopped_because
    for a, b in zip(twin.weights, other.weights, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_stage_as_one_launch_is_the_loop_on_the_host(loops, stage, kernels, name):
    host, device = stage(kernels, name), stage(kernels, name)
    *_, loop = device.captured(loop=True)
    for update in UPDATES * 2:
        host.update(*update)
        device.update(*update)
        search = host.on_host()
        loop.launch()
        same_as_on_host(host, device, search)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_stage_replayed_step_by_step_is_the_loop_on_the_host(stage, kernels, name):
    host, device = stage(kernels, name), stage(kernels, name)
    start, step = device.captured(loop=False)
    for update in UPDATES:
        host.update(*update)
        device.update(*update)
        search, replays = host.on_host(), 0
        start.replay()
        while device.state.go.item():
            step.replay()
            replays += 1
        assert replays == len(search.losses)
        same_as_on_host(host, device, search)


@pytest.mark.parametrize(
    ("by", "reason"), [(0.0, "did not change"), (math.nan, "not finite"), (math.inf, "not")]
)
def test_without_an_update_a_loop_does_not_run(loops, stage, kernels, by, reason):
    device = stage(kernels, "linear")
    *_, loop = device.captured(loop=True)
    device.update(3.0, by)
    loop.launch()
    found = device.state.read()
    assert found.losses == [] and reason in found.stopped_because


def test_a_launch_waits_for_nothing_and_follows_the_current_stream(loops, stage, kernels, gpu):
    device, host = stage(kernels, "parabolic"), stage(kernels, "parabolic")
    *_, loop = device.captured(loop=True)
    host.update(17.3)
    search = host.on_host()
    stream = torch.cuda.Stream(gpu)
    stream.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what comes next must wait for this stream, not for the default one
        device.update(17.3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        same_as_on_host(host, device, search)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 0.5, 3.4e38, math.inf, math.nan])
def test_a_search_begins_with_an_update_that_is_one(gpu, largest):
    from ffkernels.ops import decide

    state = decide.DecideState("parabolic", 8, gpu)
    decide.begin(state, torch.tensor(largest, device=gpu))
    good = 0 < largest < math.inf
    assert state.go.item() == good and state.read().losses == []
    assert (state.read().stopped_because is None) == good


def healthy(gpu) -> None:
    """The stream does not record, the allocator serves everybody, the generator draws."""
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.get_sync_debug_mode() == 0
    synced = torch.cuda.memory_stats(gpu)["num_sync_all_streams"]
    torch.cuda.empty_cache()  # does that only where nobody is thought to record
    assert torch.cuda.memory_stats(gpu)["num_sync_all_streams"] > synced
    assert torch.rand(3, device=gpu).shape == (3,)
    torch.zeros(MIB, device=gpu).sum().item()


def waits(x) -> None:
    x.add_(1)
    torch.rand(1, device=x.device)
    if x.sum().item() > 0:
        x.add_(1)


def raises(x) -> None:
    x.add_(torch.rand(64 * MIB, device=x.device)[:4])
    raise ValueError("not this one")


@pytest.mark.parametrize("fails", [waits, raises])
def test_a_failed_capture_leaves_everything_as_it_was(gpu, fails):
    x = torch.ones(4, device=gpu)
    healthy(gpu)
    torch.manual_seed(5)
    rng, reserved = torch.cuda.get_rng_state(gpu), torch.cuda.memory_reserved(gpu)
    for _ in range(3):
        capture = graphs.Capture(gpu)
        with pytest.raises(graphs.CaptureFailed, match="cannot be captured"):
            capture.capture(lambda: fails(x))
        assert torch.equal(torch.cuda.get_rng_state(gpu), rng)
        capture.close()
    assert x.tolist() == [1.0] * 4
    assert torch.cuda.memory_reserved(gpu) <= reserved + KEPT, "for three captures as for one"
    pinned = torch.empty(MIB, pin_memory=True)
    assert pinned.to(gpu, non_blocking=True).shape == (MIB,)
    healthy(gpu)
    # Ours and torch's own work afterwards.
    capture = graphs.Capture(gpu)
    total = capture.capture(lambda: x.add_(1).sum())
    capture.replay()
    assert (total.item(), x.tolist()) == (8.0, [2.0] * 4)
    capture.close()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = torch.rand(3, device=gpu)
    graph.replay()
    first = drawn.tolist()
    graph.replay()
    assert drawn.tolist() != first


def test_a_wait_is_found_in_the_warm_up_and_said_to_be_where_it_is(gpu):
    x, capture = torch.ones(4, device=gpu), graphs.Capture(gpu)
    with pytest.raises(
        graphs.CaptureFailed, match=r"test_graph_core_on_gpu.py:\d+: if x.sum\(\).item\(\) > 0:"
    ):
        capture.warm_up(lambda: waits(x))
    capture.close()
    healthy(gpu)


def test_closing_gives_the_memory_back(gpu):
    x = torch.ones(4, device=gpu)

    def work() -> torch.Tensor:
        large = torch.ones(256 * MIB // 4, device=gpu)
        return (large.view(-1, 4) * x).sum()

    healthy(gpu)
    before = torch.cuda.memory_reserved(gpu)
    for _ in range(3):
        capture = graphs.Capture(gpu)
        capture.warm_up(work)
        total = capture.capture(work)
        assert torch.cuda.memory_reserved(gpu) >= before + 256 * MIB
        capture.replay()
        assert total.item() == 256 * MIB // 4
        del total
        capture.close()
        assert torch.cuda.memory_reserved(gpu) <= before + KEPT, "after each round the same"
    healthy(gpu)


def test_graphs_live_side_by_side(gpu):
    """Matrix products have workspaces: closing one graph, or clearing them all, must not take another's."""
    draw = torch.Generator(gpu).manual_seed(1)
    a = torch.randn(512, 512, device=gpu, generator=draw)
    expected = a @ a
    captures, outputs = [], []
    for _ in range(3):
        captures.append(graphs.Capture(gpu))
        captures[-1].warm_up(lambda: a @ a)
        outputs.append(captures[-1].capture(lambda: a @ a))
    own, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(gpu)
    side.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(side):
        a @ a
    torch.cuda.current_stream(gpu).wait_stream(side)
    with torch.cuda.graph(own):
        theirs = a @ a
    captures.pop(1).close()
    del outputs[1]
    filler = [torch.full((512, 512), math.nan, device=gpu) for _ in range(64)]
    for output in (*outputs, theirs):
        output.zero_()
    for graph in (*captures, own):
        graph.replay()
    for output in (*outputs, theirs):
        torch.testing.assert_close(output, expected)
    torch._C._cuda_clearCublasWorkspaces()
    filler += [torch.full((MIB,), math.nan, device=gpu) for _ in range(64)]
    for graph, output in zip(captures, outputs, strict=True):
        output.zero_()
        graph.replay()
        torch.testing.assert_close(output, expected)
        graph.close()
    assert all(each.isnan().all() for each in filler), "no replay wrote where it does not belong"


@pytest.mark.parametrize("bias", [False, True], ids=["product", "product and bias"])
def test_a_stream_that_is_lent_again_has_its_workspaces_to_itself(gpu, bias):
    """Whatever torch lets go of between two captures, or while one lives, no replay writes elsewhere."""
    draw = torch.Generator(gpu).manual_seed(1)
    a, b = (torch.randn(shape, device=gpu, generator=draw) for shape in ((512, 512), (512,)))

    def work() -> torch.Tensor:
        return torch.addmm(b, a, a) if bias else a @ a

    expected, filler, streams = work(), [], set()
    for cleared in (False, True, False):
        capture = graphs.Capture(gpu)
        streams.add(capture._place.stream)
        capture.warm_up(work)
        output = capture.capture(work)
        if cleared:
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        filler += [torch.full((MIB,), math.nan, device=gpu) for _ in range(64)]
        output.zero_()
        capture.replay()
        torch.testing.assert_close(output, expected)
        del output
        capture.close()
    assert len(streams) == 1
    assert all(each.isnan().all() for each in filler)


def test_what_a_loop_cannot_hold_is_found(bindings, gpu):
    x = torch.ones(4, device=gpu)
    plain = graphs.Capture(gpu)
    plain.capture(lambda: x.add_(1).zero_().copy_(torch.ones_like(x)))
    assert graphs.audit(plain.raw, in_loop=True) == []
    event = torch.cuda.Event(external=True)

    def signals() -> None:
        x.add_(1)
        event.record()

    capture = graphs.Capture(gpu)
    capture.capture(signals)
    assert graphs.audit(capture.raw, in_loop=True) == ["an event for another stream"]
    loop = graphs.WhileGraph(gpu)
    with pytest.raises(graphs.CaptureFailed, match="an event for another stream in the loop"):
        loop.build(plain, capture, torch.zeros(1, dtype=torch.int32, device=gpu))
    for graph in (loop, capture, plain):
        graph.close()
    healthy(gpu)
