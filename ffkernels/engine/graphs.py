"""Captured work: recorded once, then launched again and again without Python.

    Capture       what a function does on the GPU, as one graph          warm_up → capture → replay
    WhileGraph    prologue, then a body as long as a condition is set    build → launch

A stage as a `WhileGraph` is one launch: [prologue: Δ, max |Δ|, begin] → WHILE [validate, decide, step]. torch
records both parts, the driver puts copies of them together as child graphs. Recording straight into a WHILE
node would be one step less, but a recording that fails in there takes the process with it.

A capture has a stream and a pool of memory of its own. It is warmed up in that pool: what the warm-up leaves
behind (the workspaces of matrix products above all) is what the recording goes on to use, and nothing of it
can be given away while the graph lives. The condition of a loop is 0 until a kernel sets it, so a kernel that
cannot set it gives a loop that never runs, not one that never ends.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ffkernels.engine import graph_driver
from ffkernels.engine.evaluation_mode import keep_random_state
from ffkernels.engine.graph_support import probe, why_no_stage_graph, why_no_step_graph

__all__ = [
    "Capture",
    "CaptureFailed",
    "WhileGraph",
    "audit",
    "probe",
    "why_no_stage_graph",
    "why_no_step_graph",
]

T = TypeVar("T")

# What a node may be, by the driver's name for it, and how to say that it may not.
IN_LOOP = {"KERNEL", "MEMCPY", "MEMSET", "EMPTY", "GRAPH"}
BEFORE_LOOP = IN_LOOP | {"EVENT_RECORD", "WAIT_EVENT"}
WORDS = {
    "HOST": "a call back into the host",
    "WAIT_EVENT": "a wait for an event of another stream",
    "EVENT_RECORD": "an event for another stream",
    "MEM_ALLOC": "an allocation by the driver (cudaMallocAsync)",
    "MEM_FREE": "a release of memory by the driver (cudaFreeAsync)",
    "EXT_SEMAS_SIGNAL": "a semaphore of another process or library",
    "EXT_SEMAS_WAIT": "a wait for a semaphore of another process or library",
    "BATCH_MEM_OP": "a write to or wait for a memory location",
    "CONDITIONAL": "a conditional node of its own",
}


class CaptureFailed(RuntimeError):
    """Work that cannot become a graph. The message says what, why, and what to do about it."""


class Capture:
    """What a function does on `device`, recorded and replayed.

    Args:
        device: where the work happens; all of it, on the stream that is current inside the function.
        pool: another capture, whose stream and memory this one shares. Such captures must be replayed in the
            order of their capture, keep nothing in that memory between replays, and be closed together.
    """

    def __init__(self, device: torch.device, *, pool: Capture | None = None) -> None:
        cuda = graph_driver.cuda
        self.device = device
        self._graph: Any = None
        self._value: Any = None
        self._closed = False
        with cuda.guard(device):
            self._stream = cuda.new_stream(device) if pool is None else pool._stream
            self._pool = cuda.new_pool(device) if pool is None else pool._pool

    def warm_up(self, fn: Callable[[], Any], times: int = 2) -> None:
        """Call `fn` as often as it takes until everything is compiled, loaded and chosen.

        The last time nothing may wait for the device, as nothing can in a capture: `CaptureFailed` says
        where it did. What `fn` changes stays changed, except for the random generators.
        """
        cuda = graph_driver.cuda
        with self._side_stream(), cuda.in_pool(self._pool, self.device):
            for left in reversed(range(times)):
                try:
                    if left:
                        fn()
                    else:
                        with cuda.sync_is_error():
                            fn()
                except Exception as error:
                    raise _failed("cannot be warmed up for a CUDA graph", error) from error

    def capture(self, fn: Callable[[], T]) -> T:
        """Record what `fn` does, which happens with each replay only. Returns what `fn` returns.

        Tensors among that are overwritten by each replay. When `CaptureFailed` is raised, stream, allocator
        and random generators are as they were.
        """
        cuda = graph_driver.cuda
        if self._graph is not None or self._closed:
            raise RuntimeError("a Capture records once; make a new one")
        with self._side_stream(), _no_collection():
            graph = cuda.new_graph()
            try:
                cuda.begin(graph, self._pool)
                value = cuda.work(graph, fn)
                cuda.end(graph)
            except BaseException as error:
                cuda.abandon(graph, self._pool, self.device)
                if not isinstance(error, Exception):
                    raise
                raise _failed("cannot be captured in a CUDA graph", error) from error
        self._graph, self._value = graph, value
        return value

    @property
    def raw(self) -> int:
        """The cudaGraph_t."""
        return graph_driver.cuda.raw(self._recorded())

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        cuda = graph_driver.cuda
        graph = self._recorded()
        with cuda.guard(self.device):
            cuda.replay(graph)

    def close(self) -> None:
        """Wait for the device, then give everything back. A graph made from this one is closed before."""
        if self._closed:
            return
        self._closed = True
        graph, self._graph, self._value = self._graph, None, None
        cuda = graph_driver.cuda
        with cuda.guard(self.device):
            try:
                if graph is not None:
                    cuda.synchronize(self.device)
            finally:
                if graph is not None:
                    cuda.reset(graph)
                self._pool = self._stream = None

    def _recorded(self) -> Any:
        if self._graph is None:
            raise RuntimeError("nothing is captured" + (": the capture was closed" if self._closed else ""))
        return self._graph

    @contextmanager
    def _side_stream(self) -> Iterator[None]:
        """On the own stream, after all that the current one holds; which then waits in turn."""
        cuda = graph_driver.cuda
        with cuda.guard(self.device), keep_random_state(self.device):
            outer = cuda.current_stream(self.device)
            cuda.wait(self._stream, outer)
            try:
                with cuda.on_stream(self._stream):
                    yield
            finally:
                cuda.wait(outer, self._stream)


class WhileGraph:
    """Work that repeats itself on the device: a prologue, then a body while a condition is set.

    `handle` goes to the kernels that set the condition, so it is there before either part is captured. Both
    captures stay alive, as theirs is the memory.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = graph_driver.cuda
        self.device = device
        self._exec = 0
        with cuda.guard(device):
            cuda.current_stream(device)
            self._top = cuda.graph_create()
            try:
                self.handle = cuda.handle_create(self._top)
            except BaseException:
                self.close()
                raise

    def build(self, prologue: Capture, body: Capture) -> None:
        """Make the graph of copies of the two. The prologue must set the condition: unset, it is 0."""
        cuda = graph_driver.cuda
        if self._exec or not self._top:
            raise RuntimeError("a WhileGraph is built once; make a new one")
        bad = [f"{node} before the loop" for node in audit(prologue.raw, in_loop=False)]
        bad += [f"{node} in the loop" for node in audit(body.raw, in_loop=True)]
        if bad:
            raise CaptureFailed(
                f"a CUDA WHILE node cannot hold {', '.join(bad)}; take executor='step_graph', or remove it"
            )
        try:
            with cuda.guard(self.device):
                first = cuda.add_child(self._top, [], prologue.raw)
                inside = cuda.add_while(self._top, [first], self.handle)
                cuda.add_child(inside, [], body.raw)
                self._exec = cuda.exec_create(self._top)
        except Exception as error:
            raise _failed("cannot be put into a CUDA WHILE node", error) from error

    def launch(self) -> None:
        """Launch prologue and loop on the current stream; waits for nothing."""
        if not self._exec:
            raise RuntimeError("nothing to launch: the graph was not built, or it was closed")
        cuda = graph_driver.cuda
        with cuda.guard(self.device):
            cuda.exec_launch(self._exec, cuda.current_stream(self.device))

    def close(self) -> None:
        """Wait for the device and destroy the graph, before the captures it was built from are closed."""
        cuda = graph_driver.cuda
        executable, self._exec = self._exec, 0
        top, self._top = self._top, 0
        with cuda.guard(self.device):
            try:
                if executable:
                    cuda.synchronize(self.device)
            finally:
                try:
                    if executable:
                        cuda.exec_destroy(executable)
                finally:
                    if top:
                        cuda.graph_destroy(top)


def audit(raw: int, *, in_loop: bool) -> list[str]:
    """What a WHILE node (else: the part before it) may not hold, in words; looks into child graphs too."""
    allowed = IN_LOOP if in_loop else BEFORE_LOOP
    found: dict[str, None] = {}
    for kind, child in graph_driver.cuda.node_types(raw):
        if kind not in allowed:
            found[WORDS.get(kind, f"a node of type {kind}")] = None
        if child:
            found |= dict.fromkeys(audit(child, in_loop=in_loop))
    return list(found)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: what it frees could be a tensor of another stream or another graph."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _failed(what: str, error: Exception) -> CaptureFailed:
    return CaptureFailed(f"the work {what}: {error}")
