"""Whether a captured stage did what the eager one would have done.

After every captured stage the host's own search takes the losses that the device recorded, with its
verdicts on them (`follow`). After a stage that ran on a fresh capture, the validation loss is also measured
eagerly where the graph measured it (`difference`): a graph that replays stale addresses, or moves nothing,
shows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ffkernels import ops
from ffkernels.stage.program import StageProgram
from ffkernels.validation.evaluator import coarsest

# Relative. The same kernels run captured and not, but for one product the matrix library may choose another
# algorithm on the capture's stream, with its own workspace: the sums are taken in another order. In float32
# that is invisible here. In a 16-bit type every layer's output is rounded (to 2^-8 for bfloat16), so another
# order flips roundings, of which the mean over tokens leaves less than one.
_TOLERANCES = {
    **{torch.float64: 1e-5, torch.float32: 1e-5, "tf32": 1e-4},
    **{torch.float16: 1e-3, torch.bfloat16: 5e-3, None: 5e-3},
}
# Below it the tolerance is absolute: a difference of logits is not more exact than they are.
_SMALL_LOSS = 0.1


def loss_tolerance(validation: Any, device: torch.device) -> float:
    """How far captured and eager losses may be apart, relatively: by the coarsest precision at work."""
    wrappers = () if validation.causal_lm is None else validation.causal_lm.wrappers
    return coarsest(_TOLERANCES, validation.model, device, wrappers, validation.evaluator.autocast)


class Snapshot:
    """Weights and best as a stage begins: two more copies of the adapters, for one stage."""

    def __init__(self, table: ops.TensorTable) -> None:
        self._to = [*(weight.detach() for weight in table.weights), *table.best_flats]
        self._saved = [tensor.clone() for tensor in self._to]
        self.weights = self._saved[: len(table.weights)]

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self._to, self._saved)


def follow(program: StageProgram, decided: Any) -> str | None:
    """Let the host's search observe what the device recorded; says where they part, or None.

    Where they part the search is given the device's result: the weights are at the τ that the device kept.
    """
    fault = _part(program, decided)
    if fault:
        search = program.search
        search.losses, search.best_tau = list(decided.losses), decided.best_tau
        search.best_loss = decided.best_loss
        search.stopped_because = decided.stopped_because or fault
    program.moves = len(decided.losses)
    return fault


def _part(program: StageProgram, decided: Any) -> str | None:
    search = program.search
    if len(decided.sure) != len(decided.losses):
        return f"the device recorded {len(decided.losses)} losses and {len(decided.sure)} verdicts on them"
    for count, ((tau, loss), sure) in enumerate(zip(decided.losses, decided.sure, strict=True)):
        wanted = search.propose()
        if wanted != tau:
            asked = "ended" if wanted is None else f"asked for τ = {wanted}"
            return f"after {count} losses the device measured τ = {tau} where the host's search {asked}"
        search.observe(tau, loss, sure)
    if not decided.losses:
        program.stopped_because = decided.stopped_because
        return None if decided.stopped_because else "the device recorded no loss and no reason for that"
    host, device = (search.stopped_because, search.best_tau), (decided.stopped_because, decided.best_tau)
    if host != device:
        return f"the host's search ended with {host}, the device's with {device}"
    return None


@torch.no_grad()
def _kept(program: StageProgram, start: Sequence[Tensor]) -> bool:
    """Whether W is best, bit for bit, and W0 + τ·Δ, but for one rounding per move."""
    table, search = program.table, program.search
    if search.best_tau == 0 and not all(map(torch.equal, table.weights, start)):
        return False
    furthest = max(tau for tau, _ in search.losses)
    for weight, best, delta, begun in zip(table.weights, table.best, table.deltas, start, strict=True):
        largest = begun.abs().double() + 2 * furthest * delta.abs().double()
        slack = (program.moves + 2) * torch.finfo(weight.dtype).eps * largest
        away = (weight.double() - begun.double() - search.best_tau * delta.double()).abs()
        if not torch.equal(weight, best) or bool((away > slack).any()):
            return False
    return True


def difference(
    program: StageProgram, start: Sequence[Tensor], baseline: float, evaluate: Callable[[], float]
) -> str | None:
    """What a finished stage recorded against what an eager validation finds, in words; None where they agree.

    Args:
        program: the stage, its search as the graph left it; W and best hold the weights that were kept.
        start: the weights when the stage began.
        baseline: their loss, measured eagerly.
        evaluate: measures the loss of the weights as they are, eagerly. W is moved to the last τ that was
            tried for one of these measurements, and back.
    """
    table, search = program.table, program.search
    if not search.losses:
        return None
    tolerance = loss_tolerance(program.validation, table.device)

    def apart(where: str, recorded: float, eager: float) -> str | None:
        if recorded == eager or not (math.isfinite(recorded) or math.isfinite(eager)):
            return None
        if abs(recorded - eager) <= tolerance * max(abs(eager), _SMALL_LOSS):
            return None
        return (
            f"{where} the graph measured a validation loss of {recorded:.9g} and an eager evaluation "
            f"{eager:.9g} (allowed is a relative difference of {tolerance:g})"
        )

    recorded = dict(search.losses)
    if not _kept(program, start):
        return f"the weights are not those of τ = {search.best_tau}, which the stage kept"
    found = apart("at τ = 0", recorded[0], baseline)
    kept = evaluate()
    found = found or apart("at the weights it kept", recorded[search.best_tau], kept)
    last, last_loss = search.losses[-1]
    if found or last == search.best_tau:
        return found
    # best has not changed since the last τ was set, so this gives the very weights that were measured.
    ops.step_(table, False, float(last - search.best_tau))
    tried = evaluate()
    ops.step_(table, False, 0.0)
    found = apart(f"at τ = {last}", last_loss, tried)
    if not found and last_loss == recorded[search.best_tau] and kept == baseline != tried:
        found = f"the graph measured the same loss at τ = {last} as at τ = {search.best_tau}: nothing moved"
    return found
