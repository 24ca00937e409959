"""Whether a schedule has brought the learning rate near 0, where a stage would undo that.

    faded  ⇔  rate < FADED · highest       rate: the largest of the groups'; highest: the largest rate so far

A schedule falls to 0 so that the last steps average out the noise of the batches. A stage repeats such a step
until it is as long as those from before the fall.
"""

from __future__ import annotations

from typing import Any

import torch

from ffkernels.ops.notices import announce_once

__all__ = ["FADED", "FadedRate"]

FADED = 0.02


class FadedRate:
    """To be asked before every optimizer step.

    Attributes:
        highest: the largest learning rate so far; 0 before the first step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.highest = 0.0

    def look(self, due: bool) -> bool:
        """Whether the coming step's rate has faded. Rates that are tensors are read where ``due`` only."""
        rates = [group.get("lr") for group in self._optimizer.param_groups]
        if any(rate is None for rate in rates):
            return False  # the optimizer chooses its own
        if not due and any(isinstance(rate, torch.Tensor) for rate in rates):
            return False
        rate = max(map(float, rates))
        self.highest = max(self.highest, rate)
        faded = rate < FADED * self.highest
        if faded and due:
            announce_once(
                "rate-faded",
                "no Fast Forward stage where the learning rate has fallen from "
                f"{self.highest:.3g} to {rate:.3g}: it would repeat the small step until the fall is undone",
            )
        return faded

    def state_dict(self) -> dict[str, Any]:
        return {"highest_rate": self.highest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.highest = float(state.get("highest_rate", 0.0))
