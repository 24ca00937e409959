"""How a stage runs: the loop ``validate → decide → step`` over one search.

``StageProgram`` says what a stage is made of; an executor runs it. ``EagerExecutor`` is the plain loop on
the host, correct on every device and the truth for every faster one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from ffkernels import ops
from ffkernels.engine.interrupts import interrupt_later
from ffkernels.engine.search import Search


@dataclass
class StageProgram:
    """One stage: W and best hold the same weights, Δ the last update, and the search is fresh.

    Args:
        table: the weights with their Δ and best.
        validation: the loss of the weights as they are, a 0-dim tensor or a float.
        search: which τ to try, in what order.
    """

    table: ops.TensorTable
    validation: Callable[[], torch.Tensor | float]
    search: Search

    validate_seconds: float = 0.0
    move_seconds: float = 0.0
    moves: int = 0


class EagerExecutor:
    """The host decides after every validation: one device-to-host read of the loss per Fast Forward step."""

    name = "eager"

    def run(self, program: StageProgram) -> None:
        """Run the stage; W ends bit-equal to the best validated weights, also when something raises."""
        table, search = program.table, program.search
        base = 0  # the τ that best holds
        try:
            while (tau := search.propose()) is not None:
                start = perf_counter()
                loss = float(program.validation())
                validated = perf_counter()
                # Nothing may interrupt from the decision to the end of the move: half a move has no undo.
                with interrupt_later():
                    search.observe(tau, loss)
                    if search.accepted:
                        base = tau
                    following = search.propose()
                    k = 0 if following is None else following - base
                    ops.step_(table, search.accepted, float(k))
                program.moves += 1
                program.validate_seconds += validated - start
                program.move_seconds += perf_counter() - validated
        except BaseException:
            with interrupt_later():
                ops.step_(table, False, 0.0)  # W ← best
            raise
