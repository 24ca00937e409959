"""Files that cannot be written, told with their path: of a full disk libraries say what they like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written(path: Path, raised: type[Exception] = OSError) -> Iterator[None]:
    """Raise OSError with ``path`` and the system's reason for an error inside of the kind ``raised``."""
    try:
        yield
    except raised as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        said = cause.strerror if isinstance(cause, OSError) and cause.strerror else error
        raise OSError(f"{path} cannot be written: {said}") from error


def write_json(path: Path, data: Any, indent: int) -> None:
    """``data`` of JSON's own types, without NaN and infinities."""
    write_text(path, json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with written(path):
        path.write_text(text, encoding="utf-8")
