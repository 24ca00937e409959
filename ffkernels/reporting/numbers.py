"""Numbers as people read them, with a real minus sign, and as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP"))


def flop_unit(largest: float) -> tuple[float, str]:
    """The unit that keeps ``largest`` between 1 and 1000, as (size, name)."""
    return next(((size, name) for size, name in UNITS if largest >= size), UNITS[-1])


def percent(share: float | None, digits: int = 0) -> str:
    """0.425 as "42 %"; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f} %".replace("-", "−")


def number(value: float | None, form: str) -> str:
    """A number in ``form``; a dash for None and for what is not finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def plain(value: Any) -> Any:
    """JSON's own types; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
