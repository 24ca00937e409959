"""Optional packages: imported where they are used, and named with their remedy where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def require_for_task(task: str, package: str) -> ModuleType:
    """The module ``package``, or a RuntimeError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(
            f"task {task!r} needs {package}: pip install 'ffkernels[tasks]' ({error}). "
            "Or give a JSONL file of your own: --data FILE.jsonl."
        ) from error
