"""A stage as CUDA graphs: the work is recorded once and replayed, and the device decides (docs/graphs.md).

    step graph     Δ, best and the search's begin as usual, then one replay of validate → decide → step
                   per Fast Forward step, and four bytes read after each: whether there is a next one
    stage graph    one launch of Δ, best, begin → while go: validate → decide → step
                   and one read, of the whole record

Both end with the same weights and the same record as the eager executor, bit for bit. A capture is valid as
long as its token is (`graphs.token`), and the first stage on a fresh one is checked against eager
evaluations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from time import perf_counter
from typing import Any

import torch
from torch.autograd.graph import increment_version

from ffkernels import ops
from ffkernels.graphs import driver
from ffkernels.graphs import token as tokens
from ffkernels.graphs.capture import WARM_UPS, Capture, CaptureFailed
from ffkernels.graphs.check import Snapshot, difference, follow
from ffkernels.graphs.while_graph import Part, record_loop, stage_parts
from ffkernels.ops.notices import announce_once
from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.search.significance import Rises, critical_values
from ffkernels.stage.clock import StageClock, read_later
from ffkernels.stage.program import StageProgram

MAX_CAPTURES = 4


class GraphUnsafe(RuntimeError):
    """A captured stage must not be used any more. Weights and best are as they were when the stage began."""


class GraphExecutor:
    """What both graphs share: recording when needed, checking, and the record of a stage.

    Each has a ``_build(device, prologue, body)``, which records, and a ``_launch(program, lap)``, which runs
    the stage on the device and returns the state that it read back.

    Attributes:
        captures: how often the work was recorded; at most ``MAX_CAPTURES`` times.
        capture_seconds: what the last recording cost, with its warm-up.
        step_seconds: what a Fast Forward step of the last stage took; None before the first.
        fault: why the last stage's record cannot be trusted; None where it can.
    """

    name = ""
    loops = False

    def __init__(self) -> None:
        self.captures = 0
        self.capture_seconds = 0.0
        self.step_seconds: float | None = None
        self.fault: str | None = None
        self._held: list[Any] = []
        self._made_of: dict[str, Any] = {}  # what has to stay the same, beside the model
        self._kept_alive: tuple = ()
        self._state: Any = None
        self._token: Any = None
        self._proved = False
        self._counts: list[int] | None = None

    def run(self, program: StageProgram) -> None:
        """Run the stage; records first where nothing is recorded, or what was recorded is out of date.

        Raises:
            CaptureFailed: when it cannot be recorded; the stage has not begun.
            GraphUnsafe: when the check of a fresh capture failed, or it goes out of date too often; weights
                and best are as they were when the stage began.
        """
        with driver.cuda.guard(program.table.device):
            self._record_if_needed(program)
            self._tell_of_examples(program.example_counts)
            if self._state.start != program.search.start:
                self._state.start_at(program.search.start)
            if self._proved:
                self.fault = self._run(program)
            else:
                self._prove(program)

    def close(self) -> None:
        """Give the graphs and their memory back; a later stage would record again. Idempotent."""
        held, self._held = self._held, []
        self._made_of, self._kept_alive, self._state, self._proved = {}, (), None, False
        for graph in reversed(held):
            graph.close()

    def _record_if_needed(self, program: StageProgram) -> None:
        token, table, search = tokens.token(program.validation), program.table, program.search
        made_of = {
            "the table of the weights that move": (id(table), id(table.plan)),
            "the validation loss": id(program.validation),
            "the search": (search.name, search.max_tau),
        }
        other = "it had been given back"
        if self._held:
            other = next((what for what, now in made_of.items() if self._made_of[what] != now), "")
            if not other and self._token == token:
                return
            self.close()
        if self._token is not None:
            self._record_again(token, other)
        self._token, self._made_of = token, made_of
        # So that no other gets their addresses as long as the graph has them.
        self._kept_alive = table, table.plan, program.validation, tokens.referred(program.validation)
        began = perf_counter()
        try:
            # A capture that Ctrl-C cuts is hard to clean up; it takes a few forwards.
            with interrupt_later():
                self._record(program)
        except BaseException as error:
            # The token stays: the next stage's capture counts as another one.
            self.close()
            if isinstance(error, CaptureFailed) or not isinstance(error, Exception):
                raise
            raise CaptureFailed(f"{type(error).__name__} during capture: {error}") from error
        self.capture_seconds = perf_counter() - began
        self.captures += 1

    def _record_again(self, token: Any, other: str) -> None:
        changed = tokens.describe_change(self._token, token)
        if changed == "nothing":
            changed = other
        if self.captures >= MAX_CAPTURES:
            raise GraphUnsafe(
                f"what was captured went out of date {self.captures} times, now by a change of {changed}, "
                "and capturing costs more than it saves; switch adapters and precision less often than "
                'stages come, or choose executor="eager"'
            )
        announce_once(f"captured-again-{changed}", f"the Fast Forward stage is captured again: {changed}")

    def _record(self, program: StageProgram) -> None:
        from ffkernels.ops import decide

        table, validation, search = program.table, program.validation, program.search
        checkpoint = [flat.clone() for flat in table.best_flats]
        rows = len(program.example_counts or ())
        state = self._state = decide.DecideState(search.name, search.max_tau, table.device, rows)
        self._counts = None
        decide.prepare(state, with_condition=self.loops)

        def measure() -> tuple[torch.Tensor, torch.Tensor | None]:
            return validation.evaluate_with_sums() if rows else (validation.evaluate(), None)

        prologue, body = stage_parts(table, state, measure)
        try:
            # From the second time on Δ = 0, so that the search does not begin, and best = W: a step then sets
            # W to itself. So warming up the body moves nothing.
            prologue()
            with validation.evaluator.mode():
                self._build(table.device, prologue, body)
            program.extra_validations += WARM_UPS
            if written := validation.evaluator.written_buffers:
                raise CaptureFailed(
                    f"the forward writes {', '.join(written[:3])}, which a replay would not put back; let it "
                    "write them only where self.training is True"
                )
        finally:
            with torch.no_grad():
                torch._foreach_copy_(table.best_flats, checkpoint)

    def _tell_of_examples(self, counts: list[int] | None) -> None:
        """Let the device know how long the examples are, where they are others than in the last stage."""
        if counts is None or counts == self._counts:
            return
        rises = Rises(counts)
        critical = critical_values(rises.examples, self._state.capacity)
        self._state.know(critical, rises.tokens or (), rises.weights)
        self._counts = list(counts)

    def _prove(self, program: StageProgram) -> None:
        """Run the first stage on a fresh capture, check it, and undo it where it is wrong."""
        try:
            start = Snapshot(program.table)
        except torch.OutOfMemoryError as error:
            self.close()
            raise GraphUnsafe(f"there is no memory for the copies that its check needs: {error}") from error

        def evaluate() -> float:
            program.extra_validations += 1
            return float(program.validation())

        try:
            baseline = evaluate()
            fault = self._run(program) or difference(program, start.weights, baseline, evaluate)
        except BaseException as error:
            # Until it is proved nothing that the graph left is trusted, also not when something else raises.
            with interrupt_later():
                start.restore()
            self.close()
            program.restart()
            if isinstance(error, Exception):
                raise GraphUnsafe(f"{type(error).__name__} in its first stage: {error}") from error
            raise
        if fault:
            start.restore()
            self.close()
            raise GraphUnsafe(fault)
        self.fault = None
        self._proved = bool(program.search.losses)  # a stage with nothing to search proves nothing

    def _run(self, program: StageProgram) -> str | None:
        """Run the recorded stage; says what is wrong with its record, or None."""
        # One launch cannot be interrupted: what it did is recorded before Ctrl-C is heard.
        with interrupt_later() if self.loops else nullcontext():
            lap = StageClock(program.table.device)
            decided = self._launch(program, lap)
            # Autograd is told, as by the eager moves, so that no gradient is taken by what was written.
            moved = program.table.weights if decided.losses else ()
            increment_version([*program.table.delta_flats, *program.table.best_flats, *moved])
            seconds = lap.seconds()
            program.validate_seconds += seconds
            fault = follow(program, decided)
        self.step_seconds = seconds / len(decided.losses) if decided.losses else None
        return fault


class StepGraphExecutor(GraphExecutor):
    """One graph replay and a read of four bytes per Fast Forward step.

    Args:
        ahead: how many replays are launched before the answer to an earlier one is awaited. Those after the
            search's end change nothing, but each costs a validation.
    """

    name = "step_graph"

    def __init__(self, *, ahead: int = 0) -> None:
        super().__init__()
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 0:
            raise ValueError(f"ahead={ahead!r}: must be an integer of at least 0")
        self.ahead = ahead

    def _build(self, device: torch.device, prologue: Part, body: Part) -> None:
        step = Capture(device)
        self._held.append(step)
        prologue()
        step.warm_up(body)
        step.capture(body)
        step.instantiate()

    def _launch(self, program: StageProgram, lap: StageClock) -> Any:
        from ffkernels.ops import decide

        table, state, (step,) = program.table, self._state, self._held
        with interrupt_later():
            ops.delta_(table)
            decide.begin(state, ops.delta_absmax_on_device(table))
        waiting: deque[Callable[[], list]] = deque()
        try:
            # The first replay is not waited for either: where the search has not begun it changes nothing.
            go = True
            while go:
                step.replay()
                waiting.append(read_later(state.go) if self.ahead else lambda: [state.go.item()])
                if len(waiting) > self.ahead:
                    with program.clock.reading(), lap.reading():
                        (go,) = waiting.popleft()()
        except BaseException:
            with interrupt_later():
                ops.step_(table, False, 0.0)  # W ← best
                with suppress(Exception):
                    follow(program, state.read())
            raise
        return state.read()


class StageGraphExecutor(GraphExecutor):
    """The whole stage in one launch, with one read from the device when it has ended.

    Ctrl-C is heard when the stage has ended, which ``max_tau`` guarantees on the device.
    """

    name = "stage_graph"
    loops = True

    def _build(self, device: torch.device, prologue: Part, body: Part) -> None:
        record_loop(device, prologue, body, self._state.go, self._held.append)

    def _launch(self, program: StageProgram, lap: StageClock) -> Any:
        *_, loop = self._held
        loop.launch()
        with program.clock.reading(), lap.reading():
            return self._state.read()
