"""Which executor runs a stage: the fastest that works here and pays, and why it is not a faster one.

    stage_graph    the whole stage in one launch
    step_graph     one launch per Fast Forward step
    eager          always works

Where a rung cannot be had the next one runs, and that is said once with cause and cure. "auto" asks more:
that a graph pays (docs/graphs.md). That is not announced, as nothing is lost; the stage's record says it
with the numbers.

While a profiler is on no stage is one launch: profilers have ended the process on loops on the device
(pytorch#134308). Such stages run eagerly; what is captured stays and is used again afterwards.
"""

from __future__ import annotations

import torch

from ffkernels.graphs import driver, rules
from ffkernels.graphs.capture import CaptureFailed
from ffkernels.graphs.executors import GraphExecutor, GraphUnsafe, StageGraphExecutor, StepGraphExecutor
from ffkernels.graphs.support import why_no_stage_graph, why_no_step_graph
from ffkernels.ops.notices import announce_once
from ffkernels.stage.clock import StageClock
from ffkernels.stage.eager import EagerExecutor
from ffkernels.stage.program import Pace, StageProgram, step_pace
from ffkernels.validation.loss import ValidationLoss

NO_LAUNCHES = "on a CPU there are no launches to save"
# Fast Forward steps within which a capture has to earn what it cost: about a hundred stages of ten steps.
HORIZON = 1000
# What it cost is spent by then: a gain of such a share of an eager step is worth the memory in any case.
LARGE_GAIN = 0.05
PROFILED = (
    "a profiler is on, and profilers have ended the process on loops on the device; choose "
    'executor="step_graph" to profile captured steps'
)
_EXECUTORS: dict[str, type[GraphExecutor]] = {e.name: e for e in (StageGraphExecutor, StepGraphExecutor)}
_RUNS = {
    "stage_graph": "as one graph launch",
    "step_graph": "as one graph replay per step",
    "eager": "eagerly",
}


def graphs_pay(pace: Pace, capture: float | None = None, replay: float | None = None) -> tuple[bool, str]:
    """Whether a captured validation is worth having, and the numbers that say so.

    Args:
        pace: of an eager Fast Forward step.
        capture: seconds the capture cost; None before there is one.
        replay: seconds a captured step takes; None before there is one.
    """
    eager = pace.total
    if capture is None or replay is None:
        if pace.behind:
            return False, (
                f"a step takes {_ms(eager)}, and when the host has prepared it, after {_ms(pace.host)}, the "
                "device is late: launches hide behind the device's work, and a graph would save nothing"
            )
        late = "" if pace.behind is None else ", and the device waits for it"
        return True, f"the host needs {_ms(pace.host)} of the {_ms(eager)} that an eager step takes{late}"
    gain = eager - replay
    numbers = f"a captured step takes {_ms(replay)}, an eager one {_ms(eager)}"
    if gain <= 0:
        return False, f"{numbers}: the graph saves nothing"
    steps = capture / gain
    pays = f"the capture's {capture:.2f} s pay for themselves after {steps:,.0f} steps"
    if steps > HORIZON and gain < LARGE_GAIN * eager:
        return False, f"{numbers}; {pays}, which is more than the {HORIZON:,} allowed for a gain that small"
    return True, f"{numbers}; {pays}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def why_not(rung: str, validation: ValidationLoss, device: torch.device, *, explicit: bool) -> str | None:
    """Why "stage_graph" or "step_graph" cannot run here, as "cause; cure"; None where it can."""
    refused = why_no_step_graph(device)
    refused = refused or rules.why_not_captured(validation, device, explicit=explicit)
    # Last, as it may try a small loop.
    return refused or (why_no_stage_graph(device) if rung == "stage_graph" else None)


class Ladder:
    """Runs each stage on one of the executors.

    Args:
        wanted: "auto" or an executor's name. A graph that is asked for by name is not asked whether it pays.
        validation, device: what would be captured, and where the weights are.

    Attributes:
        name, reason: which executor ran the last stage, and why that one.

    Raises:
        RuntimeError: when a graph is asked for by name and cannot run here at all.
    """

    def __init__(self, wanted: str, validation: ValidationLoss, device: torch.device) -> None:
        self.name = "eager"
        self._why = "" if wanted == "auto" else "asked for"
        self._refused = ""
        self._profiled = False
        self._auto = wanted == "auto"
        self._rungs = [name for name in _EXECUTORS if self._auto or name == wanted]
        self._looked = not self._rungs
        self._eager = EagerExecutor()
        self._graph: GraphExecutor | None = None
        self._pace: Pace | None = None
        self._unpaid = 0
        if not self._auto and self._rungs:
            # Whether a loop runs is found out by running one.
            self._looked = not self._profiler_forbids(device)
            rung = wanted if self._looked else "step_graph"
            if refused := why_not(rung, validation, device, explicit=True):
                raise RuntimeError(
                    f'executor="{wanted}" cannot run here: {refused}; or leave it at "auto", which takes the '
                    "fastest that works"
                )
            if wanted == "stage_graph":
                self._rungs.append("step_graph")

    @property
    def reason(self) -> str:
        if self._profiled:
            return PROFILED
        return "; ".join(filter(None, (self._why, self._refused)))

    def run(self, program: StageProgram) -> None:
        """Run the stage; W ends bit-equal to the best validated weights, also when something raises."""
        self._profiled = self._profiler_forbids(program.table.device)
        if self._profiled:
            announce_once(
                "executor-profiled", f"Fast Forward stages run eagerly (eager) for the time being: {PROFILED}"
            )
            self.name = "eager"
            return self._eager.run(program)
        if not self._looked:
            self._looked = True
            self._look(program)
            # To look may take seconds, once per machine, which are not the stage's.
            program.clock = StageClock(program.table.device)
        while (graph := self._next_graph()) is not None:
            self.name = graph.name
            try:
                graph.run(program)
            except CaptureFailed as failure:
                self._graph = None
                self._descend(program, [f"{self._rungs.pop(0)} could not be captured: {failure}"])
            except GraphUnsafe as fault:
                self._give_up(f"the captured stage was given up and run again eagerly: {fault}")
                program.restart()
            else:
                if graph.fault:
                    self._give_up(f"captured stages are given up: {graph.fault}")
                elif self._auto:
                    self._settle(graph)
                return
        self.name = "eager"
        self._eager.run(program)
        if self._rungs:
            self._pace = step_pace(program)

    def _profiler_forbids(self, device: torch.device) -> bool:
        """Whether the next stage would be one launch, or found out whether it can be, under a profiler."""
        cuda = driver.cuda
        return self._rungs[:1] == ["stage_graph"] and cuda.is_cuda(device) and cuda.is_profiled()

    def close(self) -> None:
        """Give back what is captured; a later stage would capture again. Idempotent."""
        if self._graph is not None:
            self._graph.close()

    def _look(self, program: StageProgram) -> None:
        """Leave out, at the first stage, the rungs that cannot be had here."""
        device = program.table.device
        if self._auto and not driver.cuda.is_cuda(device):
            self._rungs = []
            self._why = NO_LAUNCHES if device.type == "cpu" else f"there are no CUDA graphs on {device}"
            return
        self._descend(program, [])

    def _descend(self, program: StageProgram, causes: list[str]) -> None:
        """To the first rung that can be had here; says why it is none before, with what is known already."""
        while self._rungs:
            refused = why_not(
                self._rungs[0], program.validation, program.table.device, explicit=not self._auto
            )
            if refused is None:
                break
            causes.append(refused)
            del self._rungs[0]
        if causes:
            name = self._rungs[0] if self._rungs else "eager"
            self._refused = "; ".join(dict.fromkeys(causes))
            if name == "eager":
                self._why = ""
            announce_once(
                f"executor-{name}-{self._refused}",
                f"Fast Forward stages run {_RUNS[name]} ({name}): {self._refused}",
            )

    def _next_graph(self) -> GraphExecutor | None:
        """The graph that the coming stage shall run on; None for eager."""
        if self._graph is None and self._rungs:
            if self._auto:
                if self._pace is None:
                    self._why = f"measured first, to see whether {self._rungs[0]} pays"
                    return None
                pays, self._why = graphs_pay(self._pace)
                if not pays:
                    self._rungs = []
                    return None
            self._graph = _EXECUTORS[self._rungs[0]]()
        return self._graph

    def _give_up(self, message: str) -> None:
        self.close()
        self._graph, self._rungs, self._why, self._refused = None, [], message, ""
        announce_once(f"executor-{message}", f'{message}. Choose executor="eager" to not try it')

    def _settle(self, graph: GraphExecutor) -> None:
        """Step aside where the graph does not pay: when two stages in a row say so, as the first launch of a
        graph also loads it onto the device."""
        if self._pace is None or graph.step_seconds is None:
            return
        pays, self._why = graphs_pay(self._pace, graph.capture_seconds, graph.step_seconds)
        self._unpaid = 0 if pays else self._unpaid + 1
        if self._unpaid == 2:
            self.close()
            self._graph, self._rungs = None, []
