"""All that captured stages ask of CUDA, one method per question: torch's capture and a dozen driver calls.

Nothing is decided here: tests put an object with the same methods in the place of `cuda`. Graphs, nodes,
executables and handles are plain integers. The driver's calls come from cuda-bindings, which is imported by
the first of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from threading import get_ident
from typing import Any

import torch

_WAITED = "called a synchronizing CUDA operation"


class DriverError(RuntimeError):
    """A call of the CUDA driver was refused; the message names the call and the driver's word for it."""


class Cuda:
    """The real thing. See `tests/graphs/fake_cuda.py` for the one that runs on a CPU."""

    def __init__(self) -> None:
        self._workspaces: dict[int, Any] = {}  # by stream, the pool that theirs are in

    # ---- the machine ----

    def is_cuda(self, device: torch.device) -> bool:
        return device.type == "cuda" and torch.cuda.is_available()

    def is_rocm(self) -> bool:
        return torch.version.hip is not None

    def triton_problem(self) -> str | None:
        """Why the kernels of a search cannot be had, None when they can."""
        try:
            import ffkernels.ops.decide  # noqa: F401
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def allocator(self) -> str:
        return torch.cuda.get_allocator_backend()

    def bindings_problem(self) -> str | None:
        """Why cuda-bindings cannot be used, None when it can."""
        try:
            from cuda.bindings import driver
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None if hasattr(driver, "cuGraphConditionalHandleCreate") else "it is older than CUDA 12.4"

    def driver_version(self) -> int:
        """The CUDA version that the driver speaks, as 12040 for 12.4."""
        return int(self._call("cuDriverGetVersion"))

    def devices(self) -> list[torch.device]:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]

    def gpu(self, device: torch.device) -> dict[str, str]:
        """Which GPU that is, and with which driver."""
        properties = torch.cuda.get_device_properties(device)
        try:
            build = Path("/proc/driver/nvidia/version").read_text().split("\n")[0]
        except OSError:  # not on WSL
            build = ""
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": f"CUDA {self.driver_version()} {build}".strip(),
            "uuid": str(properties.uuid),
        }

    def is_profiled(self) -> bool:
        """Whether a profiler of torch records, in this thread or another; not while its schedule warms up."""
        return torch.autograd._profiler_enabled() or torch.autograd.profiler._is_profiler_enabled

    # ---- streams, memory, torch's capture ----

    def guard(self, device: torch.device) -> AbstractContextManager:
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def new_stream(self, device: torch.device) -> Any:
        return torch.cuda.Stream(device)

    def current_stream(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device)

    def on_stream(self, stream: Any) -> AbstractContextManager:
        return torch.cuda.stream(stream)

    def wait(self, stream: Any, earlier: Any) -> None:
        """What comes on `stream` from here on waits for what `earlier` holds by now."""
        stream.wait_stream(earlier)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def new_pool(self, device: torch.device) -> Any:
        """Memory apart from all other, held until `close_pool`."""
        pool = torch.cuda.graph_pool_handle()
        self._begin_allocating(pool, device)  # makes the pool, with one reference, which stays
        torch._C._cuda_endAllocateToPool(_index(device), pool)
        return pool

    @contextmanager
    def in_pool(self, pool: Any, device: torch.device) -> Iterator[None]:
        """What this thread allocates comes from the pool."""
        self._begin_allocating(pool, device)
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(_index(device), pool)
            torch._C._cuda_releasePool(_index(device), pool)

    def claim_workspaces(self, device: torch.device) -> None:
        """Let the matrix libraries have their workspaces for the current stream now, from memory of its own.

        A graph goes on writing to the workspaces that it was captured with, so they must be nobody else's for
        as long as it lives. torch keeps one per stream (and thread), and lets go of it when it likes: at the
        reset of any graph of that stream (from 2.12 on), when somebody clears them all, or never. Here they
        come from a pool that only this stream allocates from and that is never closed. So whatever torch lets
        go of stays the stream's, and is what it gets again; one stream costs about 34 MiB on Hopper, once.
        """
        stream = torch.cuda.current_stream(device).cuda_stream
        pool = self._workspaces.get(stream)
        if pool is None:
            pool = self._workspaces[stream] = self.new_pool(device)
        with self.in_pool(pool, device):
            torch.cuda.current_blas_handle()
            # cuBLASLt, which multiplies where there is a bias to add, may have a workspace apart.
            torch.addmm(*(torch.zeros(shape, device=device) for shape in (16, (16, 16), (16, 16))))

    def close_pool(self, pool: Any, device: torch.device, failures: int = 0) -> None:
        """Give the memory back, when the graphs that used it are reset.

        `failures` of its captures were abandoned. In some versions of torch each of those keeps a reference.
        """
        torch._C._cuda_releasePool(_index(device), pool)
        for _ in range(failures):
            # How many there are cannot be asked; but from a pool without any nothing can be allocated.
            try:
                self._begin_allocating(pool, device)
            except RuntimeError:
                break
            torch._C._cuda_endAllocateToPool(_index(device), pool)
            torch._C._cuda_releasePool(_index(device), pool)
            torch._C._cuda_releasePool(_index(device), pool)
        self.empty_cache()

    def _begin_allocating(self, pool: Any, device: torch.device) -> None:
        torch._C._cuda_beginAllocateCurrentThreadToPool(_index(device), pool)

    def empty_cache(self) -> None:
        """Give unused memory back to the device: none is looked for there while one allocates from a pool."""
        torch.cuda.empty_cache()

    def is_capturing(self) -> bool:
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def sync_is_error(self) -> Iterator[None]:
        """Whatever would make the host wait for the device raises instead, in this thread.

        torch has one switch for all threads. An error in another one, which loads data or saves a checkpoint,
        would be none of ours: so torch only warns, and the warning is an error here.
        """
        before, own = torch.cuda.get_sync_debug_mode(), get_ident()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it does not find all: a capture finds the rest
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=_WAITED)
            show, over = warnings.showwarning, False

            def show_or_raise(message: Any, *arguments: Any, **options: Any) -> None:
                # Another thread may have saved this function, and put it back when all is over.
                if over or not str(message).startswith(_WAITED):
                    show(message, *arguments, **options)
                elif get_ident() == own:
                    raise RuntimeError(str(message))

            warnings.showwarning = show_or_raise
            try:
                yield
            finally:
                over = True
                torch.cuda.set_sync_debug_mode(before)

    def random_state(self, device: torch.device) -> torch.Tensor:
        return torch.cuda.get_rng_state(device)

    def new_graph(self) -> Any:
        return torch.cuda.CUDAGraph(keep_graph=True)

    def begin(self, graph: Any, pool: Any) -> None:
        """The current stream records from here on. Other threads may do what they like meanwhile."""
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")

    def work(self, graph: Any, fn: Callable[[], Any]) -> Any:
        return fn()

    def end(self, graph: Any) -> None:
        graph.capture_end()

    def abandon(self, graph: Any, pool: Any, device: torch.device) -> None:
        """Undo what a capture leaves behind that never ended, or whose end was refused. Never raises.

        The stream stops recording with the first attempt to end it, whatever that returns. But where CUDA
        refuses the end, torch does not come to undo what it did at the beginning: allocations go on being
        sent to the pool, those of pinned memory too, and the generator refuses to draw. So the end is made to
        succeed once, on a recording of nothing that the driver is asked to begin. Where that cannot be had
        (without cuda-bindings, or when the beginning was refused already) the rest is undone piece by piece,
        except for pinned memory: from then on each request for some asks a graph that is gone whether the
        stream is its own, which may go wrong while a stream of this process captures, and not else.
        """
        try:
            graph.capture_end()
        except Exception:
            with suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nothing was recorded
                driver = self._driver()
                stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
                mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
                self._call("cuStreamBeginCapture", stream, mode)
                try:
                    graph.capture_end()
                except Exception:
                    # torch had not come to begin, as without memory for its generator's seed: it does not end
                    # what it knows nothing of, and whatever waits for the stream would be recorded.
                    self._call("cuGraphDestroy", self._call("cuStreamEndCapture", stream))
        with suppress(Exception):
            graph.reset()
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(_index(device), pool)  # raises where that has happened
        try:
            torch.empty(1, device=device).uniform_()
        except Exception:
            with suppress(Exception):
                generator = torch.cuda.default_generators[_index(device)]
                fresh = torch.Generator(device)
                fresh.set_state(generator.get_state())
                generator.graphsafe_set_state(fresh)

    def raw(self, graph: Any) -> int:
        return graph.raw_cuda_graph()

    def instantiate(self, graph: Any) -> None:
        graph.instantiate()

    def replay(self, graph: Any) -> None:
        graph.replay()

    def reset(self, graph: Any) -> None:
        graph.reset()

    # ---- the driver's graphs ----

    def graph_create(self) -> int:
        return int(self._call("cuGraphCreate", 0))

    def graph_destroy(self, graph: int) -> None:
        self._call("cuGraphDestroy", self._driver().CUgraph(graph))

    def handle_create(self, graph: int) -> int:
        """A condition for a node of `graph`; it is 0 whenever the graph is launched."""
        driver = self._driver()
        assign = driver.CU_GRAPH_COND_ASSIGN_DEFAULT
        arguments = (driver.CUgraph(graph), self._context(), 0, assign)
        return int(self._call("cuGraphConditionalHandleCreate", *arguments))

    def node_types(self, graph: int) -> list[tuple[str, int]]:
        """Per node its type, as "KERNEL", and the graph inside of it, 0 where there is none."""
        driver = self._driver()
        count = self._call("cuGraphGetNodes", driver.CUgraph(graph), 0)[1]
        nodes, count = self._call("cuGraphGetNodes", driver.CUgraph(graph), count)
        found = []
        for node in nodes[:count]:
            try:
                name = self._call("cuGraphNodeGetType", node).name.removeprefix("CU_GRAPH_NODE_TYPE_")
            except ValueError:  # newer than the bindings
                name = "UNKNOWN"
            child = int(self._call("cuGraphChildGraphNodeGetGraph", node)) if name == "GRAPH" else 0
            found.append((name, child))
        return found

    def add_child(self, graph: int, after: list[int], child: int) -> int:
        of = self._driver().CUgraph(child)
        return int(self._add("cuGraphAddChildGraphNode", graph, after, of))

    def add_kernel(self, graph: int, after: list[int], function: Any, arguments: tuple) -> int:
        """A node that runs the CUfunction in one thread; `arguments` are its values and their ctypes."""
        driver = self._driver()
        params = driver.CUDA_KERNEL_NODE_PARAMS()
        params.func, params.kernelParams = function, arguments
        params.gridDimX = params.gridDimY = params.gridDimZ = 1
        params.blockDimX = params.blockDimY = params.blockDimZ = 1
        return int(self._add("cuGraphAddKernelNode", graph, after, params))

    def add_while(self, graph: int, after: list[int], handle: int) -> int:
        """A node that repeats the graph returned, which is empty and belongs to it, while `handle` is set."""
        driver = self._driver()
        params = driver.CUgraphNodeParams()
        params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = driver.CUgraphConditionalHandle(handle)
        params.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        params.conditional.size = 1
        params.conditional.ctx = self._context()
        # 13.0 gave the plain name to the form with data on edges, which 12 calls _v2.
        edges = () if hasattr(driver, "cuGraphAddNode_v2") else (None,)
        self._add("cuGraphAddNode", graph, after, params, edges)
        return int(params.conditional.phGraph_out[0])

    def _add(self, call: str, graph: int, after: list[int], what: Any, edges: tuple = ()) -> Any:
        driver = self._driver()
        before = [driver.CUgraphNode(node) for node in after]
        return self._call(call, driver.CUgraph(graph), before, *edges, len(before), what)

    def exec_create(self, graph: int) -> int:
        return int(self._call("cuGraphInstantiate", self._driver().CUgraph(graph), 0))

    def exec_launch(self, executable: int, stream: Any) -> None:
        driver = self._driver()
        self._call("cuGraphLaunch", driver.CUgraphExec(executable), driver.CUstream(stream.cuda_stream))

    def exec_destroy(self, executable: int) -> None:
        self._call("cuGraphExecDestroy", self._driver().CUgraphExec(executable))

    # ---- cuda-bindings ----

    def _driver(self) -> Any:
        from cuda.bindings import driver

        return driver

    def _context(self) -> Any:
        context = self._call("cuCtxGetCurrent")
        if not int(context):  # this thread has not used the device yet
            torch.empty(1, device="cuda")
            context = self._call("cuCtxGetCurrent")
        return context

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the call returns beside its status: nothing, one value or a tuple."""
        status, *values = getattr(self._driver(), name)(*arguments)
        if int(status) != 0:
            raise DriverError(f"{name}: {getattr(status, 'name', status)}")
        return None if not values else values[0] if len(values) == 1 else tuple(values)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


cuda = Cuda()
