"""What a user may set about Fast Forward, checked where it is set."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

from ffkernels.search.search import MAX_TAU_LIMIT, SEARCHES

EXECUTORS = ("auto", "eager", "step_graph", "stage_graph")
LEARNING_RATES = ("keep", "auto")
PAPERS_PATIENCE = 3  # section 5.1
IMPLS = ("auto", "torch", "cpp", "triton", "cuda")


@dataclass(frozen=True)
class FastForwardConfig:
    """When Fast Forward stages run, and how they search.

    Args:
        interval: optimizer steps from one stage to the next (the paper's T_interval = 6). None, with
            ``learning_rate="auto"``: no stages, only the learning rate, and no validation.
        warmup: optimizer steps before the first interval begins; the first stage follows step ``warmup +
            interval``.
        search: ``"parabolic"`` (doubling bracket and parabola vertices, some 13 validations in a first stage
            and 7 in later ones) or ``"linear"`` (the paper's: one step after the other until the loss does
            not fall).
        max_tau: the most steps one stage may take.
        patience: ``"auto"`` runs a stage at the end of an interval where the alignment of gradients and
            updates says that it pays (``engine.schedule``). A number switches Fast Forward off for good after
            so many stages in a row that found no step (the paper's section 5.1), and None runs a stage at
            every interval. With the paper's search "auto" is 3.
        executor: how a stage runs: ``"eager"``; ``"step_graph"``, one CUDA graph replay per Fast Forward
            step; ``"stage_graph"``, the whole stage as one launch; ``"auto"`` takes the fastest that works
            here and pays.
        impl: which implementation moves the weights; ``"auto"`` takes the fastest that works here.
        learning_rate: ``"keep"``; or ``"auto"``: there is no learning rate to choose, those of the
            optimizer's groups say their ratios only, and the alignment of gradients and updates moves them at
            each step (``auto_rate``); stages begin when it has risen.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    interval: int | None = 6
    warmup: int = 0
    search: str = "parabolic"
    max_tau: int = 1024
    patience: int | str | None = "auto"
    executor: str = "auto"
    impl: str = "auto"
    learning_rate: str = "keep"

    def __post_init__(self) -> None:
        self._choice("learning_rate", LEARNING_RATES)
        if self.interval is not None or self.learning_rate != "auto":
            self._integer("interval", 1, others=", or None with learning_rate='auto'")
        self._integer("warmup", 0)
        self._integer("max_tau", 1, MAX_TAU_LIMIT)
        if self.patience not in ("auto", None):
            self._integer("patience", 1, others=" or None or 'auto'")
        self._choice("search", tuple(SEARCHES))
        self._choice("executor", EXECUTORS)
        self._choice("impl", IMPLS)

    def _integer(self, field: str, low: int, high: int | None = None, others: str = "") -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high and value > high):
            allowed = f"an integer from {low} to {high}" if high else f"an integer of at least {low}"
            raise ValueError(f"{field}={value!r}: must be {allowed}{others}")

    def _choice(self, field: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in allowed:
            raise ValueError(f"{field}={value!r}: must be one of {', '.join(map(repr, allowed))}")

    def warn_of_others(self, saved: dict[str, Any]) -> None:
        """Say which settings a saved run had differently."""
        mine = asdict(self)
        differing = {k: v for k, v in saved.items() if mine.get(k, v) != v}
        if differing:
            warnings.warn(
                f"resuming with a different FastForwardConfig: the saved run had {differing}; "
                "the present settings are kept, and the run will not be the saved one's exact continuation",
                stacklevel=3,
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
