"""The calls themselves, as far as they can be seen without a GPU: what is undone, and what is passed on."""

import ctypes
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ffkernels.graphs.driver import Cuda, DriverError

GPU = torch.device("cuda", 0)


class Allocator:
    """torch's bookkeeping of pools: who allocates from which, and how many references each has."""

    def __init__(self, monkeypatch) -> None:
        self.counts: dict[tuple, int] = {}
        self.underway: list[tuple] = []
        self.freed: list[tuple] = []
        for name, call in (
            ("_cuda_beginAllocateCurrentThreadToPool", self.begin),
            ("_cuda_endAllocateToPool", self.end),
            ("_cuda_releasePool", self.release),
        ):
            monkeypatch.setattr(torch._C, name, call, raising=False)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, len(self.counts) + 1))
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)

    def begin(self, device, pool) -> None:
        assert self.counts.get(pool, 1) > 0 or self.fail("no reference")
        assert pool not in self.underway or self.fail("already recording")
        self.counts[pool] = self.counts.get(pool, 0) + 1
        self.underway.append(pool)

    def end(self, device, pool) -> None:
        assert pool in self.underway or self.fail("not recording")
        self.underway.remove(pool)

    def release(self, device, pool) -> None:
        self.counts[pool] -= 1
        assert self.counts[pool] >= 0 or self.fail("released too often")

    def empty(self) -> None:
        if not self.underway:
            self.freed = [pool for pool, count in self.counts.items() if count == 0]

    @staticmethod
    def fail(text: str):
        raise RuntimeError(text)


@pytest.fixture
def allocator(monkeypatch):
    return Allocator(monkeypatch)


class Graph:
    """torch.cuda.CUDAGraph whose capture ends in an error; `tidy` says how much of it that version undoes."""

    def __init__(self, allocator: Allocator, tidy: str, broken: bool = True) -> None:
        self.allocator, self.tidy, self.broken, self.pool, self.ended = allocator, tidy, broken, None, False

    def capture_begin(self, pool, capture_error_mode) -> None:
        assert capture_error_mode == "thread_local"
        self.pool = pool
        self.allocator.begin(0, pool)

    def capture_end(self) -> None:
        if self.broken:
            if self.tidy != "nothing":
                self.allocator.end(0, self.pool)
            raise RuntimeError("operation failed due to a previous error during capture")
        self.allocator.end(0, self.pool)
        self.ended = True

    def reset(self) -> None:
        if self.ended or (self.tidy == "all" and self.pool):
            self.allocator.release(0, self.pool)
        self.pool, self.ended = None, False


@pytest.fixture
def generator(monkeypatch):
    """The device's generator; where `stuck`, it refuses to draw until its state is replaced."""
    state = SimpleNamespace(stuck=False, replaced=0)

    def draw(*size, device):
        if state.stuck:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return torch.zeros(*size)

    def replace(fresh) -> None:
        state.stuck, state.replaced = False, state.replaced + 1

    def make(device):
        return SimpleNamespace(set_state=lambda state: None)

    default = SimpleNamespace(get_state=lambda: b"seed and offset", graphsafe_set_state=replace)
    monkeypatch.setattr("ffkernels.graphs.driver.torch.empty", draw)
    monkeypatch.setattr("ffkernels.graphs.driver.torch.Generator", make)
    monkeypatch.setattr(torch.cuda, "default_generators", (default,))
    return state


def give_back(cuda, pool, allocator) -> None:
    """The pool of one capture that failed: nothing is left of it."""
    cuda.close_pool(pool, GPU, failures=1)
    assert (allocator.counts[pool], allocator.underway, allocator.freed) == (0, [], [pool])


def recording(monkeypatch, stream, **calls) -> SimpleNamespace:
    """`stream` is the current one, and the driver has these calls."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    mode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="this thread")
    return SimpleNamespace(CUstream=lambda number: number, CUstreamCaptureMode=mode, **calls)


@pytest.mark.parametrize("stuck", [False, True])
@pytest.mark.parametrize("broken", [False, True], ids=["Python raised", "CUDA refused"])
@pytest.mark.parametrize("tidy", ["nothing", "allocations", "all"])
def test_whatever_torch_leaves_of_a_failed_capture_is_undone(allocator, generator, tidy, broken, stuck):
    cuda = Cuda()
    pool = cuda.new_pool(GPU)
    good, bad = Graph(allocator, tidy, broken=False), Graph(allocator, tidy, broken)
    cuda.begin(good, pool)
    cuda.end(good)
    cuda.begin(bad, pool)
    generator.stuck = stuck
    cuda.abandon(bad, pool, GPU)
    assert allocator.underway == [] and not generator.stuck
    assert generator.replaced == stuck, "a generator in order stays the one that other graphs draw from"
    assert allocator.counts[pool] >= 2, "the pool of a graph that lives"
    cuda.reset(good)
    give_back(cuda, pool, allocator)


@pytest.mark.parametrize("tidy", ["nothing", "allocations", "all"])
def test_a_capture_that_could_not_begin_is_undone_too(allocator, generator, tidy):
    class Refused(Graph):
        def capture_begin(self, pool, capture_error_mode) -> None:
            super().capture_begin(pool, capture_error_mode)
            raise RuntimeError("the stream is recording already")

    cuda = Cuda()
    pool, graph = cuda.new_pool(GPU), Refused(allocator, tidy)
    with pytest.raises(RuntimeError):
        cuda.begin(graph, pool)
    cuda.abandon(graph, pool, GPU)
    give_back(cuda, pool, allocator)


def test_memory_is_held_between_uses_and_then_given_back(allocator):
    cuda = Cuda()
    pool = cuda.new_pool(GPU)
    assert (allocator.counts[pool], allocator.underway) == (1, [])
    with pytest.raises(KeyError), cuda.in_pool(pool, GPU):
        assert (allocator.counts[pool], allocator.underway) == (2, [pool])
        raise KeyError
    assert (allocator.counts[pool], allocator.underway) == (1, [])
    cuda.close_pool(pool, GPU)
    assert (allocator.counts[pool], allocator.freed) == (0, [pool])


class Refusing:
    """A capture as torch 2.11 to 2.13 has it: what CUDA does not let end, torch does not undo.

    A stream that `records` may have been invalidated, as by a wait; its recording ends with an error then.
    """

    def __init__(self, allocator: Allocator, stream: SimpleNamespace) -> None:
        self.allocator, self.stream, self.registered, self.ended = allocator, stream, False, False

    def capture_begin(self, pool, capture_error_mode) -> None:
        self.pool = pool
        self.allocator.begin(0, pool)
        self.stream.pinned.append(pool)
        self.stream.records = self.registered = True

    def capture_end(self) -> None:
        records, valid = self.stream.records, self.stream.valid
        self.stream.records, self.stream.valid = False, True
        if not (records and valid):
            raise RuntimeError("operation failed due to a previous error during capture")
        if not self.registered:
            raise RuntimeError("capture_end() called before capture_begin().")
        self.registered = False
        self.allocator.end(0, self.pool)
        self.stream.pinned.remove(self.pool)
        warnings.warn("The CUDA Graph is empty.", UserWarning, stacklevel=1)
        self.ended = True

    def reset(self) -> None:
        if self.ended:
            self.allocator.release(0, self.pool)
        self.ended = False


@pytest.mark.parametrize("bound", [True, False], ids=["bindings", "no bindings"])
@pytest.mark.parametrize("seen", ["in the work", "at the end"])
def test_a_capture_whose_end_cuda_refused_is_made_to_end(allocator, generator, monkeypatch, seen, bound):
    stream = SimpleNamespace(records=False, valid=True, pinned=[], cuda_stream=77)
    cuda, begun = Cuda(), []

    def begin(of, mode):
        begun.append((of, mode, stream.records))
        stream.records = True
        return (Status.CUDA_SUCCESS,)

    driver = recording(monkeypatch, stream, cuStreamBeginCapture=begin)
    monkeypatch.setattr(cuda, "_driver", (lambda: driver) if bound else (lambda: 1 / 0))
    pool = cuda.new_pool(GPU)
    graph = Refusing(allocator, stream)
    cuda.begin(graph, pool)
    stream.valid = False  # by what was captured
    if seen == "at the end":
        with pytest.raises(RuntimeError, match="previous error"):
            cuda.end(graph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.abandon(graph, pool, GPU)
    assert begun == ([(77, "this thread", False)] if bound else [])
    assert allocator.underway == [] and not stream.records
    assert stream.pinned == ([] if bound else [pool])
    give_back(cuda, pool, allocator)
    if bound:  # nothing is left of it: the pool's next capture begins and ends
        allocator.counts[pool] = 1
        good = Refusing(allocator, stream)
        cuda.begin(good, pool)
        with pytest.warns(UserWarning, match="empty"):
            cuda.end(good)


def test_a_capture_that_torch_had_not_begun_leaves_no_stream_recording(allocator, generator, monkeypatch):
    stream, ended = SimpleNamespace(cuda_stream=77, records=False), []

    def record(on: bool):
        stream.records = on
        return (Status.CUDA_SUCCESS, 5)[: 1 if on else 2]

    driver = recording(
        monkeypatch,
        stream,
        cuStreamBeginCapture=lambda of, mode: record(True),
        cuStreamEndCapture=lambda of: record(False),
        cuGraphDestroy=lambda graph: ended.append(graph) or (Status.CUDA_SUCCESS,),
    )
    cuda = Cuda()
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    pool = cuda.new_pool(GPU)
    # It ended before it touched the stream.
    never = SimpleNamespace(capture_end=lambda: 1 / 0, reset=lambda: None)
    cuda.abandon(never, pool, GPU)
    assert not stream.records and ended == [5] and allocator.underway == []


class Workspaces:
    """What torch keeps for matrix products: per stream two, made when a product first needs them."""

    def __init__(self, allocator: Allocator, monkeypatch) -> None:
        self.allocator, self.stream, self.kept = allocator, 1, {}
        monkeypatch.setattr(torch.cuda, "current_stream", lambda d: SimpleNamespace(cuda_stream=self.stream))
        monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: self.need("cuBLAS"))
        real = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda size, device: real(size))
        monkeypatch.setattr(torch, "addmm", lambda bias, a, b: self.need("cuBLASLt"))

    def need(self, library: str) -> None:
        if (library, self.stream) not in self.kept:
            self.kept[library, self.stream] = self.allocator.underway[-1]

    @property
    def pools(self) -> set:
        return set(self.kept.values())


def test_workspaces_come_from_memory_of_their_stream_that_is_never_given_back(allocator, monkeypatch):
    workspaces, cuda = Workspaces(allocator, monkeypatch), Cuda()
    pool = cuda.new_pool(GPU)
    cuda.claim_workspaces(GPU)
    (own,) = workspaces.pools
    assert len(workspaces.kept) == 2 and own != pool and allocator.underway == []
    with cuda.in_pool(pool, GPU):  # a product in the warm-up
        workspaces.need("cuBLAS")
    assert workspaces.pools == {own}
    workspaces.kept.clear()  # at the reset of another graph of this stream, or by somebody who clears all
    cuda.empty_cache()
    assert own not in allocator.freed, "a graph that lives goes on writing there"
    cuda.claim_workspaces(GPU)
    assert workspaces.pools == {own}
    cuda.close_pool(pool, GPU)
    assert allocator.freed == [pool] and allocator.counts[own] == 1
    cuda.claim_workspaces(GPU)  # of the next capture on this stream, whether they were kept or not
    assert workspaces.pools == {own} and len(allocator.counts) == 2
    workspaces.stream = 2
    cuda.claim_workspaces(GPU)
    assert len(workspaces.pools) == 2, "streams that run side by side share nothing"


def test_a_profiler_is_seen_from_every_thread_while_it_records():
    cuda, seen = Cuda(), []
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
        for _ in range(4):
            with ThreadPoolExecutor(1) as pool:
                seen.append((cuda.is_profiled(), pool.submit(cuda.is_profiled).result()))
            profiler.step()
    assert seen == [(False, False)] * 2 + [(True, True), (False, False)]
    with torch.autograd.profiler.profile():
        assert cuda.is_profiled()
    assert not cuda.is_profiled()


@pytest.fixture
def debug_mode(monkeypatch):
    """torch's switch for waits, which is one for all threads."""
    seen = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: seen[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", seen.append)
    return seen


def wait_for_the_device() -> None:
    """What torch says where the host waits."""
    message = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:120.)"
    warnings.warn(message, UserWarning, stacklevel=2)


def test_a_wait_raises_every_time_and_others_only_warn(debug_mode, recwarn):
    cuda = Cuda()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"), cuda.sync_is_error():
            assert debug_mode[-1] == "warn"
            warnings.warn("something else", UserWarning, stacklevel=1)
            wait_for_the_device()
        assert debug_mode[-1] == "default"
    assert {str(said.message) for said in recwarn} == {"something else"}
    wait_for_the_device()
    assert "synchronizing" in str(recwarn[-1].message)


def test_waits_of_other_threads_are_their_own(debug_mode, recwarn):
    with ThreadPoolExecutor(1) as pool, Cuda().sync_is_error():
        pool.submit(wait_for_the_device).result()  # an error there would be raised here
    assert debug_mode == ["default", "warn", "default"] and len(recwarn) == 0


def test_afterwards_a_wait_is_none_of_its_business(debug_mode, recwarn, monkeypatch):
    with Cuda().sync_is_error():
        saved = warnings.showwarning
    monkeypatch.setattr(warnings, "showwarning", saved)  # as another thread's catch_warnings may do
    wait_for_the_device()
    assert "synchronizing" in str(recwarn[-1].message)


class Types(IntEnum):
    CU_GRAPH_NODE_TYPE_KERNEL = 0
    CU_GRAPH_NODE_TYPE_HOST = 3
    CU_GRAPH_NODE_TYPE_GRAPH = 4
    CU_GRAPH_NODE_TYPE_CONDITIONAL = 13


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


@pytest.fixture(params=[12, 13])
def bindings(request, monkeypatch):
    """cuda.bindings.driver as far as it is called, with the signatures of either major version."""
    calls: list[tuple] = []

    def answer(name, *values, status=Status.CUDA_SUCCESS):
        def call(*arguments):
            calls.append((name, *arguments))
            return status, *values

        return call

    def kind(node):
        if node > max(Types):
            raise ValueError(f"{node} is not a valid CUgraphNodeType")
        return Status.CUDA_SUCCESS, Types(node)

    def nodes(graph, count):
        found = [0, 4, 99] if graph == 7 else [3]
        return Status.CUDA_SUCCESS, found[:count], len(found)

    class KernelParams:
        gridDimX = gridDimY = gridDimZ = blockDimX = blockDimY = blockDimZ = 0

    class Params:
        def __init__(self):
            self.type, self.conditional = None, SimpleNamespace(phGraph_out=[55])

    driver = ModuleType("cuda.bindings.driver")
    same = lambda number: number  # noqa: E731
    for name in ("CUgraph", "CUgraphNode", "CUgraphExec", "CUstream", "CUgraphConditionalHandle"):
        setattr(driver, name, same)
    driver.CUgraphNodeParams, driver.CUgraphNodeType = Params, Types
    driver.CUDA_KERNEL_NODE_PARAMS = KernelParams
    driver.CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE="while")
    driver.CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    driver.cuCtxGetCurrent = answer("context", 77)
    driver.cuGraphConditionalHandleCreate = answer("handle", 1 << 63)
    driver.cuGraphGetNodes, driver.cuGraphNodeGetType = nodes, kind
    driver.cuGraphChildGraphNodeGetGraph = answer("inside", 8)
    driver.cuGraphAddChildGraphNode = answer("child", 21)
    driver.cuGraphAddKernelNode = answer("kernel", 24)
    driver.cuGraphAddNode = answer("add", 22)
    if request.param == 12:
        driver.cuGraphAddNode_v2 = answer("add with edges", 22)
    driver.cuGraphInstantiate = answer("instantiate", 23)
    driver.cuGraphLaunch = answer("launch", status=Status.CUDA_ERROR_NOT_SUPPORTED)
    package, parent = ModuleType("cuda"), ModuleType("cuda.bindings")
    package.bindings, parent.driver = parent, driver
    for module in (package, parent, driver):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return SimpleNamespace(version=request.param, calls=calls, driver=driver)


class TestDriver:
    def test_nodes_are_named_also_those_it_does_not_know(self, bindings):
        assert Cuda().node_types(7) == [("KERNEL", 0), ("GRAPH", 8), ("UNKNOWN", 0)]
        assert Cuda().node_types(8) == [("HOST", 0)]

    def test_a_condition_is_0_until_it_is_set(self, bindings):
        assert Cuda().handle_create(7) == 1 << 63
        assert bindings.calls[-1] == ("handle", 7, 77, 0, 1)

    def test_a_while_node_is_added_in_the_form_of_the_version(self, bindings):
        assert Cuda().add_while(7, [5], 1 << 63) == 55
        name, graph, after, *edges, count, params = bindings.calls[-1]
        assert (name, graph, after, count) == ("add", 7, [5], 1)
        assert edges == ([] if bindings.version == 12 else [None])
        assert params.type == Types.CU_GRAPH_NODE_TYPE_CONDITIONAL
        conditional = params.conditional
        assert (conditional.type, conditional.size, conditional.ctx) == ("while", 1, 77)
        assert conditional.handle == 1 << 63

    def test_a_kernel_runs_in_one_thread_with_what_it_was_given(self, bindings):
        arguments = ((1 << 63, 4096), (ctypes.c_uint64, ctypes.c_void_p))
        assert Cuda().add_kernel(7, [5], "function", arguments) == 24
        *call, params = bindings.calls[-1]
        assert call == ["kernel", 7, [5], 1]
        assert (params.func, params.kernelParams) == ("function", arguments)
        assert (params.gridDimX, params.gridDimY, params.gridDimZ) == (1, 1, 1)
        assert (params.blockDimX, params.blockDimY, params.blockDimZ) == (1, 1, 1)

    def test_copies_and_executables(self, bindings):
        assert Cuda().add_child(7, [5, 6], 9) == 21
        assert bindings.calls[-1] == ("child", 7, [5, 6], 2, 9)
        assert Cuda().exec_create(7) == 23
        assert bindings.calls[-1] == ("instantiate", 7, 0)

    def test_a_refusal_names_the_call_and_the_drivers_word(self, bindings):
        with pytest.raises(DriverError, match="cuGraphLaunch: CUDA_ERROR_NOT_SUPPORTED"):
            Cuda().exec_launch(23, SimpleNamespace(cuda_stream=4))
        assert bindings.calls[-1] == ("launch", 23, 4)

    def test_bindings_that_are_too_old_are_no_bindings(self, bindings):
        assert Cuda().bindings_problem() is None
        del bindings.driver.cuGraphConditionalHandleCreate
        assert "older than CUDA 12.4" in Cuda().bindings_problem()


def test_bindings_that_are_not_there_are_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "ModuleNotFoundError" in Cuda().bindings_problem()
