"""A stage on the host, step by step: correct on every device, and the truth for every faster executor.

    prologue    Δ ← W − best ; best ← W          nothing to search when max |Δ| is 0 or not finite
    loop        loss, S ← L(W) ; sure ← a real rise, by S and best's S ; decide ;
                base = accept ? W : best ; best ← base ; W ← base + k·Δ

S are the losses by example, where the validation has them; without them every rise counts
(``significance``). A validation that raises, once one has worked, counts as NaN (``trial``).
"""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import torch

from ffkernels import ops
from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.ranks.trial import comes_of_weights, say_there_is_none
from ffkernels.search.significance import Rises
from ffkernels.stage.clock import Lag
from ffkernels.stage.program import NO_UPDATE, UPDATE_NOT_FINITE, Pace, StageProgram
from ffkernels.validation.micro_batches import read_together


class EagerExecutor:
    """The host decides after every validation: one device-to-host read of the loss per Fast Forward step."""

    name = "eager"
    _worked = False  # whether any validation has given a loss: before, what it raises is the loss's own fault

    def run(self, program: StageProgram) -> None:
        """Run the stage; W ends bit-equal to the best validated weights, also when something raises."""
        table, search = program.table, program.search
        with interrupt_later():
            ops.delta_(table)
        with program.clock.reading():
            largest = self.largest_update(table)
        program.move_seconds += program.clock.seconds()
        if largest == 0.0 or not math.isfinite(largest):
            program.stopped_because = UPDATE_NOT_FINITE if largest else NO_UPDATE
            return
        base = 0  # the τ that best holds
        counts = program.example_counts
        rises = Rises(counts)
        lag = Lag(table.device)
        labelled = getattr(program.validation, "labelled", None)
        try:
            if labelled is not None:
                labelled.before_head = lag.mark
            while (tau := search.propose()) is not None:
                start = perf_counter()
                try:
                    measured = self.measure(program, counts)
                    behind = lag.is_behind()
                    prepared = perf_counter()
                    loss, sums = read_together(*measured)
                    self._worked = computed = True
                except Exception as error:
                    if not self.forgives(error):
                        raise
                    loss, sums, computed = math.nan, None, False
                    behind, prepared = None, perf_counter()
                validated = perf_counter()
                # Nothing may interrupt from the decision to the end of the move: half a move has no undo.
                with interrupt_later():
                    search.observe(tau, loss, rises.sure(loss, sums), computed)
                    if search.accepted:
                        base = tau
                    following = search.propose()
                    k = 0 if following is None else following - base
                    ops.step_(table, search.accepted, float(k))
                end = perf_counter()
                program.moves += 1
                program.validate_seconds += validated - start
                program.move_seconds += end - validated
                program.pace.append(Pace(prepared - start + end - validated, end - start, behind))
        except BaseException:
            with interrupt_later():
                ops.step_(table, False, 0.0)  # W ← best
            raise
        finally:
            if labelled is not None:
                labelled.before_head = None

    def measure(self, program: StageProgram, counts: list[int] | None) -> tuple[Any, torch.Tensor | None]:
        """The loss, and S where there are ``counts``."""
        return (program.validation(), None) if counts is None else program.validation.measure()

    def forgives(self, error: Exception) -> bool:
        """Whether a validation that raised this counts as NaN; says so once."""
        forgiven = self._worked and comes_of_weights(error)
        if forgiven:
            say_there_is_none(error)
        return forgiven

    def largest_update(self, table: ops.TensorTable) -> float:
        """max |Δ|, which says whether there is anything to search."""
        return ops.delta_absmax(table)

    def close(self) -> None:
        """Nothing is held."""
