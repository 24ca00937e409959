"""Fast Forward low-rank fine-tuning. Names load on first use: the import itself is cheap."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffkernels import ops
    from ffkernels.engine.config import FastForwardConfig
    from ffkernels.engine.fast_forward import FastForward
    from ffkernels.engine.learning_rate import Finding, find_learning_rate
    from ffkernels.search.search import LinearSearch, ParabolicSearch
    from ffkernels.stage.record import Stage
    from ffkernels.training.callback import FastForwardCallback
    from ffkernels.validation.loss import ValidationLoss
    from ffkernels.validation.pool import ValidationPool

__version__ = "0.1.0"

_HOMES = {
    "FastForward": "ffkernels.engine.fast_forward",
    "FastForwardCallback": "ffkernels.training.callback",
    "FastForwardConfig": "ffkernels.engine.config",
    "Finding": "ffkernels.engine.learning_rate",
    "LinearSearch": "ffkernels.search.search",
    "ParabolicSearch": "ffkernels.search.search",
    "Stage": "ffkernels.stage.record",
    "ValidationLoss": "ffkernels.validation.loss",
    "ValidationPool": "ffkernels.validation.pool",
    "find_learning_rate": "ffkernels.engine.learning_rate",
}

__all__ = [
    "FastForward",
    "FastForwardCallback",
    "FastForwardConfig",
    "Finding",
    "LinearSearch",
    "ParabolicSearch",
    "Stage",
    "ValidationLoss",
    "ValidationPool",
    "__version__",
    "find_learning_rate",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("ffkernels.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'ffkernels' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
