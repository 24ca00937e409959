"""The analyze commands that look at Fast Forward's stages: loss, tau-sweep, stages."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["COMMANDS"]

COMMANDS: dict[str, Callable[..., None]] = {}
