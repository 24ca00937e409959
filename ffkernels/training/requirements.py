"""What is needed beside PyTorch: imported where it is used, and named with its remedy where it is missing."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


def require(package: str, why: str = "", extra: str = "hf", otherwise: str = "") -> Any:
    """The module ``package``; a RuntimeError says ``why`` it is needed and which extra has it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        why = why or f"{package} is needed here"
        raise RuntimeError(f"{why}: pip install 'ffkernels[{extra}]' ({error}).{otherwise}") from error


def require_for_task(task: str, package: str) -> Any:
    own = " Or give a JSONL file of your own: --data FILE.jsonl."
    return require(package, f"task {task!r} needs {package}", "tasks", own)


def first_line(error: Exception) -> str:
    """Of what a library says; some go on for pages."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]


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
