"""What is known of loops on this machine, kept in the user's cache.

graph-probe/ there has one JSON file for each combination of GPU, driver, versions and sources:

    key         that combination
    way         to set a condition (`ops.condition`) in which a loop counted right, null where none did
    problems    what a loop did instead, by way
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ffkernels.ops.condition import WAYS
from ffkernels.ops.native import cache_dir

_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    *("graphs/capture.py", "graphs/driver.py", "graphs/probe.py", "graphs/support.py"),
    *("graphs/verdicts.py", "graphs/while_graph.py"),
    *("ops/condition.ll", "ops/condition.py", "ops/decide.py", "ops/decide_state.py", "ops/moves.py"),
)


def key(gpu: dict[str, str]) -> dict[str, Any]:
    """All that a verdict on `gpu`, as `graphs.driver.Cuda.gpu` describes it, depends on."""
    sources = hashlib.sha256()
    for name in _SOURCES:
        sources.update((_PACKAGE / name).read_bytes())
    return {
        **{name: value for name, value in gpu.items() if name != "uuid"},
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda-bindings": _version("cuda.bindings"),
        "sources": sources.hexdigest()[:16],
        # Profilers look into graphs, and have crashed on loops.
        "profiler": bool(os.environ.get("CUDA_INJECTION64_PATH")),
    }


def _version(module: str) -> str | None:
    try:
        return str(import_module(module).__version__)
    except Exception:
        return None


def path(key: dict[str, Any]) -> Path:
    """Where the verdict with that key is, or would be."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "graph-probe" / f"{name}.json"


def read(key: dict[str, Any]) -> dict[str, Any] | None:
    """The "way" and "problems" as they were kept; None where there is no such file, or not a whole one."""
    try:
        kept = json.loads(path(key).read_text(encoding="utf-8"))
        # That nothing works is known where no way was left untried, as by a version that had fewer.
        known = kept["way"] in WAYS or (kept["way"] is None and set(kept["problems"]) == set(WAYS))
        whole = kept["key"] == key and known
        return {"way": kept["way"], "problems": dict(kept["problems"])} if whole else None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError):
        return None


def keep(key: dict[str, Any], found: dict[str, Any]) -> None:
    """In one move, so that no other process reads half of it; where it cannot be written, next time again."""
    with suppress(OSError, RuntimeError):
        target = path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
            whole = Path(scratch) / target.name
            whole.write_text(json.dumps({"key": key, **found}, indent=2) + "\n", encoding="utf-8")
            os.replace(whole, target)
