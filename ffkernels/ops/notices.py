"""Say each fallback once: what is slower or different here, why, and what would cure it."""

from __future__ import annotations

import warnings

_announced: set[str] = set()


class FFKernelsNotice(UserWarning):
    """Something runs in another way than it could; the message names the cause and the cure."""


def announce_once(key: str, message: str, *, stacklevel: int = 2) -> bool:
    """Warn with `message` unless `key` was announced in this process. Returns whether it warned."""
    if key in _announced:
        return False
    _announced.add(key)
    warnings.warn(message, FFKernelsNotice, stacklevel=stacklevel + 1)
    return True
