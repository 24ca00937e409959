"""What is needed beside PyTorch: imported where it is used, and named with its remedy where it is missing."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

__all__ = ["no_progress_bars", "require", "require_for_task"]


def require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(f"{package} is needed here: pip install 'ffkernels[hf]' ({error}).") from error


def require_for_task(task: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(
            f"task {task!r} needs {package}: pip install 'ffkernels[tasks]' ({error}). "
            "Or give a JSONL file of your own: --data FILE.jsonl."
        ) from error


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
