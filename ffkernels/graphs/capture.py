"""Work recorded once, then replayed again and again without Python: warm_up → capture → replay.

A capture has a stream and a pool of memory of its own. It is warmed up in that pool: what the warm-up
leaves behind is what the recording goes on to use, and nothing of it can be given away while the graph
lives.

The workspaces of matrix products are apart. torch keeps them by stream, before 2.12 for good, 34 MiB each
on Hopper; from 2.12 on the reset of one graph lets go of those of its stream, whatever other graph goes on
writing to them (pytorch#193402). So streams are kept and lent to one place of captures after the other, and
their workspaces come from memory that is the stream's alone (`Cuda.claim_workspaces`). Only a stream that
still records after a capture failed on it is not lent again.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from ffkernels.graphs import driver
from ffkernels.ranks.interrupts import no_collection
from ffkernels.validation.restore import keep_random_state

T = TypeVar("T")

WARM_UPS = 2


class CaptureFailed(RuntimeError):
    """Work that cannot become a graph. The message says what, why, and what to do about it."""


_idle: dict[torch.device, list[Any]] = {}  # streams that captures may have


class _Place:
    """Where captures happen: a stream and memory of their own, given back by the last that leaves."""

    def __init__(self, device: torch.device) -> None:
        cuda = driver.cuda
        self.device, self.guests, self.failures, self.spoilt = device, 0, 0, False
        try:
            self.stream = _idle.setdefault(device, []).pop()
        except IndexError:
            self.stream = cuda.new_stream(device)
        try:
            self.pool = cuda.new_pool(device)
        except BaseException:
            _idle[device].append(self.stream)
            raise

    def abandon(self, graph: Any) -> None:
        """Undo a capture that failed, on the stream."""
        cuda = driver.cuda
        self.failures += 1
        cuda.abandon(graph, self.pool, self.device)
        try:
            self.spoilt |= cuda.is_capturing()
        except Exception:
            self.spoilt = True

    def leave(self) -> None:
        self.guests -= 1
        if not self.guests:
            driver.cuda.close_pool(self.pool, self.device, self.failures)
            if not self.spoilt:
                _idle.setdefault(self.device, []).append(self.stream)


class Capture:
    """What a function does on `device`, recorded and replayed.

    Args:
        device: where the work happens; all of it, on the stream that is current inside the function.
        pool: another capture, whose stream and memory this one shares. Such captures must be replayed in the
            order of their capture, and keep nothing in that memory between replays.

    Attributes:
        draws: whether a warm-up drew random numbers on the device.
    """

    def __init__(self, device: torch.device, *, pool: Capture | None = None) -> None:
        self.device = device
        self.draws = False
        self._graph: Any = None
        self._value: Any = None
        self._place: _Place | None = None
        if pool is not None and pool._place is None:
            raise RuntimeError(
                "the capture whose memory was to be shared is closed; share that of a live one"
            )
        with explained("be captured in a CUDA graph"), driver.cuda.guard(device):
            self._place = _Place(device) if pool is None else pool._place
            self._place.guests += 1

    def warm_up(self, fn: Callable[[], Any], times: int = WARM_UPS) -> None:
        """Call `fn` as often as it takes until everything is compiled, loaded and chosen.

        The last time nothing may wait for the device, as nothing can in a capture: `CaptureFailed` says
        where it did. What `fn` changes stays changed, except for the random generators.
        """
        with explained("be warmed up for a CUDA graph"), self._side_stream() as place:
            for left in reversed(range(times)):
                try:
                    self._rehearse(fn, place, last=not left)
                    continue
                except torch.OutOfMemoryError as error:
                    traceback.clear_frames(error.__traceback__)
                # What lies unused outside of the pool is not taken back while one allocates from it.
                driver.cuda.empty_cache()
                self._rehearse(fn, place, last=not left)

    def _rehearse(self, fn: Callable[[], Any], place: _Place, last: bool) -> None:
        cuda = driver.cuda
        before = cuda.random_state(self.device)
        cuda.claim_workspaces(self.device)
        with cuda.in_pool(place.pool, self.device), cuda.sync_is_error() if last else nullcontext():
            fn()
        self.draws |= not torch.equal(cuda.random_state(self.device), before)

    def capture(self, fn: Callable[[], T]) -> T:
        """Record what `fn` does, which happens with each replay only. Returns what `fn` returns.

        Tensors among that are overwritten by each replay. When this raises, stream, allocator and random
        generators are as they were.
        """
        cuda = driver.cuda
        if self._graph is not None:
            raise RuntimeError("a Capture records once; make a new one")
        with explained("be captured in a CUDA graph"), ExitStack() as undo:
            # What a collection frees could be a tensor of another stream or another graph.
            with self._side_stream() as place, no_collection():
                cuda.claim_workspaces(self.device)
                graph = cuda.new_graph()
                try:
                    cuda.begin(graph, place.pool)
                    value = cuda.work(graph, fn)
                    cuda.end(graph)
                except BaseException:
                    place.abandon(graph)
                    raise
                undo.callback(cuda.reset, graph)
            undo.pop_all()
        self._graph, self._value = graph, value
        return value

    @property
    def raw(self) -> int:
        """The cudaGraph_t."""
        return driver.cuda.raw(self._recorded())

    def instantiate(self) -> None:
        """Make the graph ready to be replayed, which takes longest where it has thousands of nodes.

        The first replay does that otherwise. A graph that others are made of needs none of it.
        """
        with explained("be made ready to launch as a CUDA graph"), driver.cuda.guard(self.device):
            driver.cuda.instantiate(self._recorded())

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        graph = self._recorded()
        with driver.cuda.guard(self.device):
            driver.cuda.replay(graph)

    def close(self) -> None:
        """Wait for the device, then give everything back; a `WhileGraph` made of it is closed before."""
        cuda = driver.cuda
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
        close_forgotten(self)

    def _recorded(self) -> Any:
        if self._graph is None:
            raise RuntimeError("there is nothing to replay: nothing was captured, or the capture was closed")
        return self._graph

    @contextmanager
    def _side_stream(self) -> Iterator[_Place]:
        """On the own stream, after all that the current one holds; which then waits in turn."""
        cuda, place = driver.cuda, self._place
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


def close_forgotten(graph: Any) -> None:
    """Close what nobody closed, unless that would do harm: at exit, or in the midst of another capture."""
    if not sys.is_finalizing():
        with suppress(Exception):
            if not driver.cuda.is_capturing():
                graph.close()


@contextmanager
def explained(what: str, instead: str = "eager") -> Iterator[None]:
    """Errors become `CaptureFailed`, which says where the work failed and what to do."""
    try:
        yield
    except CaptureFailed:
        raise
    except Exception as error:
        said = f"{driver.first_line(error).rstrip('.')}{_origin(error)}; change that"
        if isinstance(error, torch.OutOfMemoryError):
            said = (
                f"there is not enough memory for it beside the training's ({driver.first_line(error)}); "
                "validate fewer tokens at a time"
            )
        # As long as the error lives, its frames would keep what the work had allocated.
        traceback.clear_frames(error.__traceback__)
        raise CaptureFailed(f"the work cannot {what}: {said}, or take executor={instead!r}") from error


def _origin(error: Exception) -> str:
    """The innermost line outside of torch and of this module that an error came through."""
    here = (__file__, str(Path(__file__).with_name("while_graph.py")), driver.__file__)
    stand_in = sys.modules[type(driver.cuda).__module__].__file__
    own = (*here, stand_in, contextlib.__file__, warnings.__file__, str(Path(torch.__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)]
    return f", at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
