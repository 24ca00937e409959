"""A CUDA that records and replays on the CPU: everything that `ffkernels.graphs.driver.Cuda` can do.

    fake = FakeCuda.install(monkeypatch)        # graphs, probe and condition now run on it, with CPU tensors

    table = ops.TensorTable(weights)            # as always, on the CPU
    state = fake.decide.DecideState(...)        # ffkernels.ops.decide under Triton's interpreter; it is also
                                                # what `from ffkernels.ops import decide` now gives
    body = graphs.Capture(torch.device("cpu")); body.warm_up(fn); body.capture(fn); body.replay()

What a capture does: `fn` is called once, then every tensor of the process gets its former content back, so
that nothing has happened, as on a GPU. A replay calls `fn` again and copies what it returns into what the
capture returned. Reading a value on the host (`.item()`, `if tensor`) during a capture or the last warm-up
raises, as on a GPU. A WHILE node repeats its body while its condition is not 0: `decide` sets it, or a node
behind.

    fake.fail("exec_create")                    # the next call of that method raises; (..., times=3, after=1)
    fake.nodes = ["KERNEL", "HOST"]             # what captures from here on are found to consist of
    fake.driver = 12020; fake.problem = "..."   # an old driver; no cuda-bindings; also rocm, backend,
                                                # no_triton, profiler
    fake.random += 1                            # inside captured work: it draws random numbers on the device
    fake.calls                                  # names of all calls so far
    fake.launches                               # "replay" or "while", one per launch
    fake.iterations                             # of the body, one number per launch of a WHILE graph
    fake.alive()                                # what is not given back: {} when all is
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ffkernels.graphs.driver import DriverError

FOREVER = 100_000  # iterations of a loop that nobody stops
# Shared by all fakes: a graph that one test forgot, closed in another, must not mean one of the other's.
_NUMBERS = itertools.count(1000)


@cache
def interpreted_decide() -> ModuleType:
    """A copy of `ffkernels.ops.decide` for Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    spec = importlib.util.find_spec("ffkernels.ops.decide")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


class HostReads(TorchDispatchMode):
    """Raises where the host would wait for a value, except for the weight moves' own reads on a CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and not self._in_moves():
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _in_moves() -> bool:
        frame = sys._getframe()
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if file.endswith("triton/runtime/interpreter.py") or (
                file.endswith("ops/moves.py") and function == "_scalar"
            ):
                return True
            frame = frame.f_back
        return False


class Contents:
    """What every tensor of the process holds, to be put back."""

    def __init__(self) -> None:
        self.saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        for found in gc.get_objects():
            if not issubclass(type(found), torch.Tensor) or found.device.type != "cpu":
                continue
            try:
                storage = found.untyped_storage()
                address = storage.data_ptr()
            except (NotImplementedError, RuntimeError):  # a tensor that compilation left behind
                continue
            if storage.nbytes() and address not in self.saved:
                self.saved[address] = (storage, storage.clone())

    def put_back(self) -> None:
        for storage, content in self.saved.values():
            storage.copy_(content)


@dataclass(eq=False)
class Stream:
    name: str
    waited_for: list[Stream] = field(default_factory=list)


@dataclass(eq=False)
class Graph:
    """What torch.cuda.CUDAGraph is: captured work, or none yet."""

    nodes: list[tuple[str, int]] = field(default_factory=list)
    pool: int | None = None
    fn: Callable[[], Any] | None = None
    value: Any = None
    autocast: dict[str, Any] = field(default_factory=dict)  # as it was when this was recorded
    before: Contents | None = None
    raw: int = 0

    @torch.no_grad()  # a graph knows of no autograd, and of no other autocast than that of its recording
    def run(self) -> None:
        with torch.autocast("cpu", **self.autocast, cache_enabled=False):
            value = self.fn()
        for old, new in zip(tree_leaves(self.value), tree_leaves(value), strict=True):
            if isinstance(old, torch.Tensor) and old is not new:
                old.detach().copy_(new)


@dataclass(eq=False)
class DriverGraph:
    """What the driver puts together: nodes that run in the order in which they were added."""

    nodes: list[tuple[str, Any]] = field(default_factory=list)
    after: dict[int, list[int]] = field(default_factory=dict)  # per node those that it waits for


class FakeCuda:
    """See the top of the file."""

    def __init__(self) -> None:
        self.driver, self.rocm, self.backend, self.profiler = 13000, False, "native", False
        self.problem: str | None = None
        self.no_triton: str | None = None
        self.nodes = ["KERNEL", "MEMSET", "KERNEL"]
        self.calls: list[str] = []
        self.launches: list[str] = []
        self.iterations: list[int] = []
        self.random = torch.zeros(1, dtype=torch.int64)
        self.capturing: Graph | None = None
        self.streams = [Stream("default")]
        self.conditions: dict[int, int] = {}
        self.decide = interpreted_decide()
        self._failures: dict[str, list[Exception | None]] = {}
        self._numbers = _NUMBERS
        self._pools: set[int] = set()
        self._graphs: dict[int, Graph] = {}
        self._tops: dict[int, DriverGraph] = {}
        self._execs: dict[int, DriverGraph] = {}

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        """In the place of CUDA until the test ends."""
        from ffkernels import ops
        from ffkernels.graphs import capture
        from ffkernels.graphs import driver as graph_driver
        from ffkernels.graphs import probe as graph_probe
        from ffkernels.graphs import support as graph_support
        from ffkernels.ops import condition

        fake = cls()
        monkeypatch.setattr(graph_driver, "cuda", fake)
        monkeypatch.setattr(capture, "_idle", {})
        monkeypatch.setattr(graph_support, "_probed", {})
        # No process is started; `test_graph_probe.py` puts the real one back.
        allowed = graph_probe.Verdict(graph_probe.WAYS)
        monkeypatch.setattr(graph_probe, "verdict", lambda device: allowed)
        monkeypatch.setattr(condition, "load", lambda device: None)
        monkeypatch.setattr(condition, "set_beside", fake.set_condition)
        monkeypatch.setitem(sys.modules, "ffkernels.ops.decide", fake.decide)
        monkeypatch.setattr(ops, "decide", fake.decide, raising=False)
        return fake

    # ---- for tests ----

    def fail(self, name: str, error: Exception | None = None, *, times: int = 1, after: int = 0) -> None:
        """Let `times` calls of a method raise, after the next `after` calls went well."""
        if not callable(getattr(self, name, None)):
            raise AttributeError(f"there is no call {name!r}")
        failure = error or DriverError(f"{name}: CUDA_ERROR_PLANTED")
        self._failures[name] = [None] * after + [failure] * times

    def alive(self) -> dict[str, int]:
        gc.collect()
        held = {"pools": self._pools, "graphs": self._graphs, "tops": self._tops, "execs": self._execs}
        return {name: len(what) for name, what in held.items() if len(what)}

    @property
    def stream(self) -> Stream:
        return self.streams[-1]

    def set_condition(self, handle: int, go: torch.Tensor) -> None:
        if handle not in self.conditions:
            raise DriverError(f"cudaGraphSetConditional: {handle} is no handle")
        self.conditions[handle] = int(go.item()) if self.capturing is None else 0

    def _called(self, name: str, *, during_capture: bool = True) -> None:
        self.calls.append(name)
        if planned := self._failures.get(name):
            failure = planned.pop(0)
            if failure is not None:
                raise failure
        if self.capturing is not None and not during_capture:
            raise DriverError(f"{name}: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    # ---- the machine ----

    def is_cuda(self, device) -> bool:
        return True

    def driver_version(self) -> int:
        self._called("driver_version")
        return self.driver

    def devices(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def gpu(self, device) -> dict[str, str]:
        self._called("gpu")
        driver = f"CUDA {self.driver}"
        return {"gpu": "Fake 100", "capability": "9.0", "driver": driver, "uuid": "fake-uuid"}

    # ---- streams, memory, torch's capture ----

    @contextmanager
    def guard(self, device) -> Iterator[None]:
        yield

    def new_stream(self, device) -> Stream:
        self._called("new_stream")
        return Stream(f"stream {next(self._numbers)}")

    def current_stream(self, device) -> Stream:
        return self.stream

    @contextmanager
    def on_stream(self, stream) -> Iterator[None]:
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def wait(self, stream, earlier) -> None:
        self._called("wait", during_capture=False)
        stream.waited_for.append(earlier)

    def new_pool(self, device) -> int:
        self._called("new_pool", during_capture=False)
        pool = next(self._numbers)
        self._pools.add(pool)
        return pool

    @contextmanager
    def in_pool(self, pool, device) -> Iterator[None]:
        self._called("in_pool")
        if pool not in self._pools:
            raise RuntimeError("there is no such pool")
        yield

    def claim_workspaces(self, device) -> None:
        self._called("claim_workspaces", during_capture=False)
        if self.stream.name == "default":
            raise RuntimeError("the workspace of a stream that nothing is captured on")

    def close_pool(self, pool, device, failures=0) -> None:
        self._called("close_pool", during_capture=False)
        if any(graph.pool == pool for graph in self._graphs.values()):
            raise RuntimeError("the pool of a graph that lives")
        self._pools.remove(pool)

    def is_capturing(self) -> bool:
        return self.capturing is not None

    @contextmanager
    def sync_is_error(self) -> Iterator[None]:
        with HostReads():
            yield

    def random_state(self, device) -> torch.Tensor:
        return self.random.clone()

    def new_graph(self) -> Graph:
        self._called("new_graph")
        return Graph()

    def begin(self, graph, pool) -> None:
        self._called("begin", during_capture=False)
        if self.stream.name == "default":
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if pool not in self._pools:
            raise RuntimeError("there is no such pool")
        graph.before, graph.pool, self.capturing = Contents(), pool, graph

    def work(self, graph, fn) -> Any:
        self._called("work")
        graph.fn = fn
        graph.autocast = {
            "enabled": torch.is_autocast_enabled("cpu"),
            "dtype": torch.get_autocast_dtype("cpu"),
        }
        with HostReads():
            graph.value = fn()
        return graph.value

    def end(self, graph) -> None:
        self._called("end")
        self._stop(graph)
        graph.raw = next(self._numbers)
        graph.nodes = [(kind, 0) for kind in self.nodes]
        self._graphs[graph.raw] = graph

    def _stop(self, graph) -> None:
        if self.capturing is graph:
            self.capturing = None
            graph.before.put_back()
            graph.before = None

    def abandon(self, graph, pool, device) -> None:
        self.calls.append("abandon")
        self._stop(graph)
        with suppress(Exception):
            self.reset(graph)

    def raw(self, graph) -> int:
        self._called("raw")
        return graph.raw

    def replay(self, graph) -> None:
        self._called("replay", during_capture=False)
        if graph.fn is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.launches.append("replay")
        graph.run()

    def reset(self, graph) -> None:
        # torch's goes on after an error, and what it could not destroy goes with the object.
        self._graphs.pop(graph.raw, None)
        graph.fn = graph.value = graph.pool = None
        self._called("reset")

    # ---- the driver's graphs ----

    def graph_create(self) -> int:
        self._called("graph_create")
        return self._new_top()

    def _new_top(self) -> int:
        number = next(self._numbers)
        self._tops[number] = DriverGraph()
        return number

    def graph_destroy(self, graph: int) -> None:
        self._called("graph_destroy")
        top = self._tops.pop(graph)
        for kind, content in top.nodes:
            if kind == "CONDITIONAL":
                del self._tops[content[1]]

    def handle_create(self, graph: int) -> int:
        self._called("handle_create")
        self._tops[graph]
        handle = next(self._numbers)
        self.conditions[handle] = 0
        return handle

    def node_types(self, graph: int) -> list[tuple[str, int]]:
        self._called("node_types")
        return list(self._graphs[graph].nodes)

    def _add(self, graph: int, after: list[int], kind: str, content: Any) -> int:
        top, node = self._tops[graph], next(self._numbers)
        if not set(after) <= set(top.after):
            raise DriverError(f"there is no such node to wait for: CUDA_ERROR_INVALID_VALUE, {after}")
        top.nodes.append((kind, content))
        top.after[node] = after
        return node

    def add_child(self, graph: int, after: list[int], child: int) -> int:
        self._called("add_child")
        return self._add(graph, after, "GRAPH", self._graphs[child])

    def add_kernel(self, graph: int, after: list[int], function, arguments) -> int:
        """It can only be the one that sets a condition."""
        self._called("add_kernel")
        (handle, go), _ = arguments
        return self._add(graph, after, "KERNEL", (handle, go))

    def add_while(self, graph: int, after: list[int], handle: int) -> int:
        self._called("add_while")
        inside = self._new_top()
        self._add(graph, after, "CONDITIONAL", (handle, inside))
        return inside

    def exec_create(self, graph: int) -> int:
        self._called("exec_create", during_capture=False)
        number = next(self._numbers)
        self._execs[number] = self._tops[graph]
        return number

    def exec_launch(self, executable: int, stream) -> None:
        self._called("exec_launch", during_capture=False)
        self.launches.append("while")
        for kind, content in self._execs[executable].nodes:
            if kind == "CONDITIONAL":
                self.conditions[content[0]] = 0
        self._run_nodes(self._execs[executable])

    def _run_nodes(self, graph: DriverGraph) -> None:
        for kind, content in graph.nodes:
            if kind == "GRAPH":
                self._run(content)
            elif kind == "KERNEL":
                handle, go = content
                self.conditions[handle] = ctypes.c_int32.from_address(go).value
            else:
                self._repeat(*content)

    def _repeat(self, handle: int, inside: int) -> None:
        count = 0
        while self.conditions[handle]:
            self._run_nodes(self._tops[inside])
            count += 1
            if count > FOREVER:
                raise AssertionError("the loop never ends")
        self.iterations.append(count)

    @staticmethod
    def _run(graph: Graph) -> None:
        if graph.fn is None:
            raise DriverError("a graph was launched whose memory was given back")
        graph.run()

    def exec_destroy(self, executable: int) -> None:
        self._called("exec_destroy")
        del self._execs[executable]


# Questions that an attribute answers, and calls of which nothing comes but that they were made.
for name, attribute in {
    "is_rocm": "rocm",
    "triton_problem": "no_triton",
    "allocator": "backend",
    "bindings_problem": "problem",
    "is_profiled": "profiler",
}.items():
    setattr(FakeCuda, name, lambda self, attribute=attribute: getattr(self, attribute))
for name in ("synchronize", "empty_cache", "instantiate"):
    setattr(FakeCuda, name, lambda self, *of, name=name: self._called(name, during_capture=False))
