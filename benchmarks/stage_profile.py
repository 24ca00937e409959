"""What a stage asks of the driver: kernels, launches and waits, as the profiler saw them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
CALLS = {"cuda_runtime", "cuda_driver"}
KINDS = ("on device", "reads", "launches", "graph launches", "copies", "syncs", "event syncs")


def counted(events: list[dict]) -> Counter:
    """Of a trace: what ran on the device, what the host launched and copied, and what it waited for."""
    found: Counter = Counter()
    for event in events:
        name = event.get("name", "")
        if event.get("cat") in ON_DEVICE:
            found["on device"] += 1
            found["reads"] += "DtoH" in name
        elif event.get("cat") in CALLS:
            graph = "GraphLaunch" in name
            found["graph launches"] += graph
            found["launches"] += graph or "LaunchKernel" in name or "LaunchCooperative" in name
            found["copies"] += "Memcpy" in name or "Memset" in name
            # A blocking copy waits too. Events are told apart: most have happened when they are asked for.
            event_sync = "EventSynchronize" in name
            found["event syncs"] += event_sync
            found["syncs"] += ("Synchronize" in name or name == "cudaMemcpy") and not event_sync
    return found


def traced(call: Callable[[], object], device: torch.device) -> list[dict]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def count_stage(stage: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Counts of one stage, without what the profiler does by itself.

    What runs inside a launched graph counts as far as the profiler shows it; of conditional nodes it may show
    nothing.
    """
    idle = counted(traced(lambda: None, device))
    found = counted(traced(stage, device))
    return {kind: max(0, found[kind] - idle[kind]) for kind in KINDS}


def per_step(short: dict[str, int], long: dict[str, int], more: int) -> dict[str, dict[str, float]]:
    """Of two stages, one with `more` evaluations: what each step adds, and the longer stage as a whole."""
    return {"stage": dict(long), "step": {kind: (long[kind] - short[kind]) / more for kind in KINDS}}
