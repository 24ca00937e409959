"""Work that repeats itself on the device, in one launch: a prologue, then a CUDA WHILE node.

torch records both parts, the driver puts copies of them together as child graphs: a recording straight into
a WHILE node that fails takes the process with it. The condition is set by a kernel within these, or by a
node behind them (`ops.condition`); until then it is 0, so a kernel that cannot set it gives a loop that
never runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ffkernels import ops
from ffkernels.graphs import driver
from ffkernels.graphs.capture import Capture, close_forgotten, explained
from ffkernels.ops import condition

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


class WhileGraph:
    """Work that repeats itself on the device: a prologue, then a body while a condition is set.

    Attributes:
        handle: goes to the kernels that set the condition, so it is there before either part is captured;
            None where no kernel in these is to set it, since a node of this graph does.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = driver.cuda
        self.device = device
        self.handle: int | None = None
        self._handle = self._top = self._exec = 0
        self._parts: tuple[Capture | torch.Tensor, ...] = ()
        with explained("be put into a CUDA WHILE node", "step_graph"), cuda.guard(device):
            self._top = cuda.graph_create()
            try:
                self._handle = cuda.handle_create(self._top)
            except BaseException:
                self.close()
                raise
        if not condition.behind(device):
            self.handle = self._handle

    def build(self, prologue: Capture, body: Capture, go: torch.Tensor) -> None:
        """Make the graph of copies of the two, both captured with `handle`.

        `go`, int32[1] on the device, is where either leaves whether the loop is to go on.
        """
        cuda = driver.cuda
        if self._exec or not self._top:
            raise RuntimeError("a WhileGraph is built once; make a new one")
        with explained("be put into a CUDA WHILE node", "step_graph"), cuda.guard(self.device):
            bad = [f"{node} before the loop" for node in audit(prologue.raw, in_loop=False)]
            bad += [f"{node} in the loop" for node in audit(body.raw, in_loop=True)]
            if body.draws:  # torch gives a graph fresh ones with each replay, of which a loop has none
                bad.append("random numbers in the loop")
            if bad:
                raise RuntimeError(f"it holds {', '.join(bad)}")
            first = self._add(self._top, prologue, go)
            inside = cuda.add_while(self._top, [first], self._handle)
            self._add(inside, body, go)
            self._exec = cuda.exec_create(self._top)
            # The copies work in the memory of what they were copied from.
            self._parts = (prologue, body, go)

    def _add(self, graph: int, part: Capture, go: torch.Tensor) -> int:
        """A copy of `part`; returns the node after which the condition is set."""
        cuda = driver.cuda
        node = cuda.add_child(graph, [], part.raw)
        if self.handle is not None:
            return node
        return cuda.add_kernel(
            graph, [node], condition.load(self.device), condition.arguments(self._handle, go)
        )

    def launch(self) -> None:
        """Launch prologue and loop on the current stream; waits for nothing."""
        if not self._exec:
            raise RuntimeError("there is nothing to launch: the graph was not built, or it was closed")
        cuda = driver.cuda
        with cuda.guard(self.device):
            cuda.exec_launch(self._exec, cuda.current_stream(self.device))

    def close(self) -> None:
        """Wait for the device and destroy the graph; the captures it was built from are closed afterwards."""
        cuda = driver.cuda
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
        close_forgotten(self)


Part = Callable[..., None]


def stage_parts(
    table: ops.TensorTable, state: Any, measure: Callable[[], tuple[Tensor, Tensor | None]]
) -> tuple[Part, Part]:
    """What a stage does before its loop and in it; either takes the handle of the loop's condition, or None.

    Args:
        state: the search, an `ops.decide.DecideState`.
        measure: the loss, 0-dim float64, and the sums by example, where the state has rows for them.
    """
    from ffkernels.ops import decide

    def prologue(handle: int | None = None) -> None:
        ops.delta_(table)
        decide.begin(state, ops.delta_absmax_on_device(table), handle)

    def body(handle: int | None = None) -> None:
        loss, sums = measure()
        decide.decide(state, loss, sums, handle)
        ops.step_(table, state.accept, state.k)

    return prologue, body


def record_loop(
    device: torch.device, prologue: Part, body: Part, go: Tensor, hold: Callable[[Any], object]
) -> WhileGraph:
    """Warm both parts up, capture them and make a loop of them.

    `hold` gets each graph as soon as it is there; they are closed in the reverse order.
    """
    start = Capture(device)
    hold(start)
    step = Capture(device, pool=start)
    hold(step)
    loop = WhileGraph(device)
    hold(loop)
    # A condition can be set inside a graph only: what is warmed up goes without it.
    start.warm_up(prologue)
    start.capture(lambda: prologue(loop.handle))
    step.warm_up(body)
    step.capture(lambda: body(loop.handle))
    loop.build(start, step, go)
    return loop


def audit(raw: int, *, in_loop: bool) -> list[str]:
    """What a WHILE node (else: the part before it) may not hold, in words; looks into child graphs too."""
    allowed = IN_LOOP if in_loop else BEFORE_LOOP
    found: dict[str, None] = {}
    for kind, child in driver.cuda.node_types(raw):
        if kind not in allowed:
            found[WORDS.get(kind, f"a node of type {kind}")] = None
        if child:
            found |= dict.fromkeys(audit(child, in_loop=in_loop))
    return list(found)


def small_loop(device: torch.device) -> str | None:
    """Search W = 1, 2, 3, … for a loss that is least at 4, twice over; then without an update to search.

    Returns what was wrong, None when it counted right; raises what CUDA raises.
    """
    from ffkernels.ops import decide

    weight = torch.zeros(5, device=device)
    table = ops.TensorTable([weight])
    state = decide.DecideState("linear", 8, device)
    expected = [(tau, 5.0 * (3 - tau) ** 2) for tau in range(5)]
    with ExitStack() as closing:
        decide.prepare(state, with_condition=True)
        parts = stage_parts(table, state, lambda: ((weight.double() - 4).square().sum(), None))
        loop = record_loop(device, *parts, state.go, lambda graph: closing.callback(graph.close))
        for _ in range(2):
            weight.fill_(0.0)
            ops.checkpoint_(table)
            weight.fill_(1.0)
            loop.launch()
            found = state.read()
            if found.losses != expected or found.best_tau != 3 or weight.tolist() != [4.0] * 5:
                ended = weight.tolist()[0]
                return f"it counted wrong: it found {found.losses} and ended at {ended}, not at 4.0"
        loop.launch()
        found = state.read()
        if found.losses or not math.isinf(found.best_loss):
            return f"it counted wrong: it went on without an update and found {found.losses}"
    return None
