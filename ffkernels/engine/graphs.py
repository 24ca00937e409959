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

import contextlib
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
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
    "UNKNOWN": "a kind of node that this cuda-bindings does not know",
}


class CaptureFailed(RuntimeError):
    """Work that cannot become a graph. The message says what, why, and what to do about it."""


class _Place:
    """Where captures happen: a stream and memory of their own, given back by the last that leaves."""

    def __init__(self, device: torch.device) -> None:
        cuda = graph_driver.cuda
        self.device, self.guests, self.failures = device, 0, 0
        self.stream = cuda.new_stream(device)
        self.pool = cuda.new_pool(device)

    def leave(self) -> None:
        self.guests -= 1
        if not self.guests:
            graph_driver.cuda.close_pool(self.pool, self.device, self.failures)


class Capture:
    """What a function does on `device`, recorded and replayed.

    Args:
        device: where the work happens; all of it, on the stream that is current inside the function.
        pool: another capture, whose stream and memory this one shares. Such captures must be replayed in the
            order of their capture, and keep nothing in that memory between replays.
    """

    def __init__(self, device: torch.device, *, pool: Capture | None = None) -> None:
        self.device = device
        self._graph: Any = None
        self._value: Any = None
        self._place: _Place | None = None
        if pool is not None and pool._place is None:
            raise RuntimeError(
                "the capture whose memory was to be shared is closed; share that of a live one"
            )
        with _explained("be captured in a CUDA graph"), graph_driver.cuda.guard(device):
            self._place = _Place(device) if pool is None else pool._place
            self._place.guests += 1

    def warm_up(self, fn: Callable[[], Any], times: int = 2) -> None:
        """Call `fn` as often as it takes until everything is compiled, loaded and chosen.

        The last time nothing may wait for the device, as nothing can in a capture: `CaptureFailed` says
        where it did. What `fn` changes stays changed, except for the random generators.
        """
        cuda = graph_driver.cuda
        with _explained("be warmed up for a CUDA graph"), self._side_stream() as place:
            for left in reversed(range(times)):
                try:
                    self._rehearse(fn, place, strict=not left)
                except torch.OutOfMemoryError:
                    # What lies unused outside of the pool is not taken back while one allocates from it.
                    cuda.empty_cache()
                    self._rehearse(fn, place, strict=not left)

    def _rehearse(self, fn: Callable[[], Any], place: _Place, strict: bool) -> None:
        cuda = graph_driver.cuda
        with cuda.in_pool(place.pool, self.device), cuda.sync_is_error() if strict else nullcontext():
            fn()

    def capture(self, fn: Callable[[], T]) -> T:
        """Record what `fn` does, which happens with each replay only. Returns what `fn` returns.

        Tensors among that are overwritten by each replay. When this raises, stream, allocator and random
        generators are as they were.
        """
        cuda = graph_driver.cuda
        if self._graph is not None:
            raise RuntimeError("a Capture records once; make a new one")
        with _explained("be captured in a CUDA graph"), ExitStack() as undo:
            with self._side_stream() as place, _no_collection():
                graph = cuda.new_graph()
                try:
                    cuda.begin(graph, place.pool)
                    value = cuda.work(graph, fn)
                    cuda.end(graph)
                except BaseException:
                    place.failures += 1
                    cuda.abandon(graph, place.pool, self.device)
                    raise
                undo.callback(cuda.reset, graph)
            undo.pop_all()
        self._graph, self._value = graph, value
        return value

    @property
    def raw(self) -> int:
        """The cudaGraph_t."""
        return graph_driver.cuda.raw(self._recorded())

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        graph = self._recorded()
        with graph_driver.cuda.guard(self.device):
            graph_driver.cuda.replay(graph)

    def close(self) -> None:
        """Wait for the device, then give everything back; a `WhileGraph` made of it is closed before."""
        cuda = graph_driver.cuda
        graph, self._graph, self._value = self._graph, None, None
        place, self._place = self._place, None
        if place is None:
            return
        with ExitStack() as last, cuda.guard(self.device):
            last.callback(place.leave)
            if graph is not None:
                last.callback(cuda.reset, graph)
            cuda.synchronize(self.device)

    def __del__(self) -> None:
        _forgotten(self)

    def _recorded(self) -> Any:
        if self._graph is None:
            raise RuntimeError("there is nothing to replay: nothing was captured, or the capture was closed")
        return self._graph

    @contextmanager
    def _side_stream(self) -> Iterator[_Place]:
        """On the own stream, after all that the current one holds; which then waits in turn."""
        cuda, place = graph_driver.cuda, self._place
        if place is None:
            raise RuntimeError("the capture is closed; make a new one")
        with cuda.guard(self.device), keep_random_state(self.device):
            outer = cuda.current_stream(self.device)
            cuda.wait(place.stream, outer)
            try:
                with cuda.on_stream(place.stream):
                    yield place
            finally:
                cuda.wait(outer, place.stream)


class WhileGraph:
    """Work that repeats itself on the device: a prologue, then a body while a condition is set.

    `handle` goes to the kernels that set the condition, so it is there before either part is captured.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = graph_driver.cuda
        self.device = device
        self.handle = self._top = self._exec = 0
        self._parts: tuple[Capture, ...] = ()
        with _explained("be put into a CUDA WHILE node", "step_graph"), cuda.guard(device):
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
        with _explained("be put into a CUDA WHILE node", "step_graph"), cuda.guard(self.device):
            bad = [f"{node} before the loop" for node in audit(prologue.raw, in_loop=False)]
            bad += [f"{node} in the loop" for node in audit(body.raw, in_loop=True)]
            if bad:
                raise RuntimeError(f"it holds {', '.join(bad)}")
            first = cuda.add_child(self._top, [], prologue.raw)
            inside = cuda.add_while(self._top, [first], self.handle)
            cuda.add_child(inside, [], body.raw)
            self._exec = cuda.exec_create(self._top)
            # The copies work in the memory of what they were copied from.
            self._parts = (prologue, body)

    def launch(self) -> None:
        """Launch prologue and loop on the current stream; waits for nothing."""
        if not self._exec:
            raise RuntimeError("there is nothing to launch: the graph was not built, or it was closed")
        cuda = graph_driver.cuda
        with cuda.guard(self.device):
            cuda.exec_launch(self._exec, cuda.current_stream(self.device))

    def close(self) -> None:
        """Wait for the device and destroy the graph; the captures it was built from are closed afterwards."""
        cuda = graph_driver.cuda
        executable, self._exec = self._exec, 0
        top, self._top = self._top, 0
        self._parts = ()
        if not top:
            return
        with ExitStack() as last, cuda.guard(self.device):
            last.callback(cuda.graph_destroy, top)
            if executable:
                last.callback(cuda.exec_destroy, executable)
                cuda.synchronize(self.device)

    def __del__(self) -> None:
        _forgotten(self)


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


def _forgotten(graph: Capture | WhileGraph) -> None:
    """Close what nobody closed, unless that would do harm: at exit, or in the midst of another capture."""
    if not sys.is_finalizing():
        with suppress(Exception):
            if not graph_driver.cuda.is_capturing():
                graph.close()


@contextmanager
def _explained(what: str, instead: str = "eager") -> Iterator[None]:
    """Errors become `CaptureFailed`, which says where the work failed and what to do."""
    try:
        yield
    except CaptureFailed:
        raise
    except torch.OutOfMemoryError as error:
        raise CaptureFailed(
            f"the work cannot {what}: there is not enough memory for it beside the training's"
            f" ({_line(error)}); validate fewer tokens at a time, or take executor={instead!r}"
        ) from error
    except Exception as error:
        raise CaptureFailed(
            f"the work cannot {what}: {_line(error)}{_origin(error)}; change that, or take"
            f" executor={instead!r}"
        ) from error


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _origin(error: Exception) -> str:
    """The innermost line of code outside of torch and of this module that an error came through."""
    driver = sys.modules[type(graph_driver.cuda).__module__].__file__
    own = (__file__, driver, contextlib.__file__, str(Path(torch.__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)]
    return f", at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
