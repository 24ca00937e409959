"""``learning_rate="find"`` inside a running training: what ``RateProbe`` finds is kept, and set everywhere.

    every step until then     the probe looks on; no stage runs
    the step find_after       weights stay at s*; every lr, and every scheduler's base_lrs, times scale

A loop that writes the learning rate itself at each step has to multiply it by ``FastForward.lr_scale``; one
that forgets is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ffkernels import ops
from ffkernels.engine.config import FastForwardConfig
from ffkernels.engine.distributed import Ranks
from ffkernels.engine.interrupts import interrupt_later
from ffkernels.engine.optimizer_probe import require_step_sizes
from ffkernels.engine.rate_finding import Finding, every_scheduler, rates, scale_learning_rates
from ffkernels.engine.rate_probe import RateProbe
from ffkernels.engine.validation import ValidationLoss
from ffkernels.ops.notices import announce_once

__all__ = ["LearningRateMode", "require_the_scheduler", "tell_of_overwriting"]


class LearningRateMode:
    """What FastForward does about the learning rate: nothing, or find it once.

    Attributes:
        seeking: whether it is still to be found.
        finding: what was found.

    Raises:
        RuntimeError: for "find" in a job of several processes.
        ValueError, TypeError: for an optimizer whose update does not scale with lr, or a wrong scheduler.
    """

    def __init__(
        self,
        config: FastForwardConfig,
        ranks: Ranks | None,
        validation: ValidationLoss,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
    ) -> None:
        self._config, self._validation, self._optimizer = config, validation, optimizer
        self._schedulers = every_scheduler(scheduler, optimizer)
        self.finding: Finding | None = None
        self._scale = 1.0
        self._probe: RateProbe | None = None
        self._expected: list[float] | None = None  # the rates that were set, until the next step
        if config.learning_rate == "keep":
            return
        if ranks is not None:
            raise RuntimeError(
                'learning_rate="find" works in one process: find it before the job with '
                "ffkernels.find_learning_rate, and start all processes with what it found"
            )
        require_step_sizes(optimizer)
        self._begin()

    def _begin(self) -> None:
        self._probe = RateProbe(self._validation, self._optimizer, self._schedulers, self._config.find_after)

    @property
    def seeking(self) -> bool:
        return self._probe is not None

    @property
    def scale(self) -> float:
        """What learning rates have been multiplied by in all."""
        return self._scale * (self._probe.applied if self._probe is not None else 1.0)

    def before_step(self, table: ops.TensorTable) -> None:
        require_the_scheduler(self._optimizer, self._schedulers)
        self._probe.before_step(table)

    def after_step(self, table: ops.TensorTable, step: int) -> None:
        """Run what is due after an optimizer step; the finding is made, kept and set in one of them."""
        probe = self._probe
        try:
            finding = probe.after_step(table, step)
            if finding is None:
                return
            with interrupt_later():
                scale_learning_rates(self._optimizer, self._schedulers, finding.scale / probe.applied)
                self._scale *= finding.scale
                self.finding, self._probe = finding, None
                self._expected = rates(self._optimizer)
        except BaseException:
            if self._probe is not None:  # begin again at the next step, from what has been applied
                self._scale = self.scale
                self._begin()
            raise

    def look_whether_it_was_overwritten(self) -> None:
        """At the first step after the finding: whether somebody has set the old learning rate again."""
        expected, self._expected = self._expected, None
        if expected is None:
            return
        tell_of_overwriting(expected, rates(self._optimizer), self._scale)

    def state_dict(self) -> dict[str, Any]:
        """Empty for "keep", so that nothing about it is in anybody's checkpoint."""
        if self._config.learning_rate == "keep" and self.finding is None:
            return {}
        return {
            "learning_rate": {
                "scale": self._scale,
                "finding": self.finding.to_dict() if self.finding is not None else None,
                "probe": self._probe.state_dict() if self._probe is not None else None,
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; the learning rates themselves are in the optimizer's and the schedulers' states."""
        saved = state.get("learning_rate")
        if saved is None:
            return
        self._expected = None
        self._scale = float(saved["scale"])
        self.finding = Finding.from_dict(saved["finding"]) if saved["finding"] is not None else None
        self._probe = None
        if self.finding is None and self._config.learning_rate == "find":
            self._begin()
            if saved["probe"] is not None:
                self._probe.load_state_dict(saved["probe"])


def require_the_scheduler(optimizer: torch.optim.Optimizer, schedulers: Sequence[Any]) -> None:
    """Refuse an optimizer that has a scheduler where none was given."""
    if not schedulers and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise RuntimeError(
            "this optimizer has a learning rate scheduler, which would overwrite what is found: pass it "
            "as FastForward(..., scheduler=scheduler)"
        )


def tell_of_overwriting(expected: Sequence[float], now: Sequence[float], scale: float) -> None:
    """Say once where rates that were multiplied by ``scale`` have been set back to what they were."""
    factor = math.log(scale)
    # Only a way back counts: a warm-up goes on rising.
    back = _log_ratio(now, expected) if factor < 0 else _log_ratio(expected, now)
    if abs(factor) > math.log(2) and back > 0.5 * abs(factor):
        announce_once(
            "learning-rate-overwritten",
            f"Fast Forward found the learning rate {expected[0]:g} and set it, and something has set "
            f"{now[0]:g} since: multiply what you set by FastForward.lr_scale ({scale:g}), or "
            "pass the scheduler as FastForward(..., scheduler=scheduler)",
        )


def _log_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    pairs = [(a, b) for a, b in zip(above, below, strict=True) if a > 0 and b > 0]
    return max((math.log(a / b) for a, b in pairs), default=0.0)
