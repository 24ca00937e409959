"""Say each fallback once: what is slower or different here, why, and what would cure it."""

from __future__ import annotations

import sys
import warnings

_announced: set[str] = set()


class FFKernelsNotice(UserWarning):
    """Something runs in another way than it could; the message names the cause and the cure."""


def _caller_depth() -> int:
    """The `stacklevel` at which a warning points at the first frame outside this package."""
    frame, depth = sys._getframe(2), 2
    package = __name__.partition(".")[0]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, depth = frame.f_back, depth + 1
    return depth


def announce_once(key: str, message: str) -> bool:
    """Warn at the user's own line, unless `key` was announced in this process. Returns whether it warned."""
    if key in _announced:
        return False
    _announced.add(key)
    warnings.warn(message, FFKernelsNotice, stacklevel=_caller_depth())
    return True
