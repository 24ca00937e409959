"""What the command line needs beside PyTorch, and how to get it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["no_progress_bars", "require"]


def require(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise RuntimeError(f"{package} is needed here: pip install 'ffkernels[hf]' ({error}).") from error


@contextlib.contextmanager
def no_progress_bars(quiet: bool = True) -> Iterator[None]:
    """Files that are at hand need no progress bar."""
    logging = require("transformers").utils.logging
    shown = logging.is_progress_bar_enabled()
    if quiet and shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet and shown:
            logging.enable_progress_bar()
