"""What a value has to be: rules that settings and arguments are checked by, each said as it is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """``allowed`` says in words what ``holds`` is true of."""

    holds: Callable[[Any], object]
    allowed: str

    @property
    def or_none(self) -> Rule:
        return Rule(lambda value: value is None or self.holds(value), f"{self.allowed} or None")


def check(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError, with the name, the value and what is allowed, unless the rule holds."""
    if not rule.holds(value):
        raise ValueError(f"{name}={value!r}: must be {rule.allowed}")


def whole(low: int) -> Rule:
    """An integer of at least ``low``; True and False are none."""
    return Rule(lambda value: _is(value, int) and value >= low, f"an integer of at least {low}")


def number(inside: Callable[[float], bool] = lambda value: True, said: str = "") -> Rule:
    """A finite number ``inside`` a range that is ``said`` in words."""
    return Rule(
        lambda value: _is(value, int | float) and math.isfinite(value) and inside(value),
        f"a number {said}".rstrip(),
    )


ABOVE_0 = number(lambda value: value > 0, "above 0")
FRACTION = number(lambda value: 0 <= value < 1, "from 0 to below 1")


def at_least(low: float) -> Rule:
    return number(lambda value: value >= low, f"of at least {low}")


def one_of(values: Iterable[Any]) -> Rule:
    values = tuple(values)
    return Rule(lambda value: value in values, f"one of {', '.join(map(repr, values))}")


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
