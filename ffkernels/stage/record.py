"""What one Fast Forward stage did, as a record of plain numbers and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

INTERRUPTED = "interrupted"  # begins the reason of a stage that was


@dataclass
class Stage:
    """What one Fast Forward stage did.

    Attributes:
        optimizer_step: the optimizer step it followed, counted from 1.
        tau: how many times the update was repeated in the end; 0 leaves the plain optimizer's weights.
        losses: every validation ``(τ, loss)`` in the order of the search; empty when there was nothing to
            search.
        seconds: wall time of the stage, with the checkpoint before the step; of it ``validate_seconds`` in
            the validation loss and ``move_seconds`` in moving weights. Of a captured stage, where the two
            are one launch, both are in ``validate_seconds``. What is left is the capture itself, its check
            and bookkeeping.
        flops: FLOPs of the validations (measured), also of those that warmed up or checked a capture, plus 2
            per element and weight move; 0 for an interrupted stage. Of several processes, this one's.
        executor: which executor ran it: "eager", "step_graph" or "stage_graph".
        executor_reason: why that one; empty in records from before there was a choice.
        price: of one validation, in optimizer steps (``engine.price``); None where it was not asked for.
        alignment: the mean cosine of gradients and updates in the interval's second half (``alignment``);
            None where it is not known.
        stopped_because: why the search ended.
        draw: which examples of a ``ValidationPool`` its losses are of; None where they are always the same.
            Losses of stages with different draws do not compare.
    """

    optimizer_step: int
    tau: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    validate_seconds: float = 0.0
    move_seconds: float = 0.0
    flops: int = 0
    executor: str = "eager"
    executor_reason: str = ""
    stopped_because: str = ""
    draw: int | None = None
    price: float | None = None
    alignment: float | None = None

    @property
    def evaluations(self) -> int:
        """How many validation losses were measured."""
        return len(self.losses)

    @property
    def loss_before(self) -> float:
        """The validation loss at τ = 0; NaN when none was measured."""
        return self.losses[0][1] if self.losses else math.nan

    @property
    def loss_after(self) -> float:
        """The validation loss at the τ that was kept; NaN when none was measured."""
        return next((loss for tau, loss in self.losses if tau == self.tau), math.nan)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return {**asdict(self), "losses": [[tau, loss] for tau, loss in self.losses]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stage:
        """The inverse of ``to_dict``."""
        return cls(**{**values, "losses": [(int(tau), float(loss)) for tau, loss in values["losses"]]})


def next_start(stages: Sequence[Stage]) -> int:
    """Where the next search begins: at the τ of the last stage that compared any, and at least at 1."""
    for stage in reversed(stages):
        if stage.evaluations > 1 and not stage.stopped_because.startswith(INTERRUPTED):
            return max(1, stage.tau)
    return 1
