"""How a call is timed: eagerly and as a replayed CUDA graph, with a cold and with a warm L2 cache.

    eager cold   one call on an idle device whose cache holds something else: what a single call costs
    eager warm   many calls in a row: the host's or the device's time per call, whichever is longer
    graph cold   one replay, queued behind the read that empties the cache, so that the host does not count
    graph warm   one replay of a graph that holds the call many times, per call: kernels and the gaps between

All sides are interleaved: each round measures each of them once, in an order drawn anew. A cache is emptied
by reading a large buffer, not by writing it: dirty lines would be written back during the measurement.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[], object]

MODES = ("graph cold", "graph warm", "eager cold", "eager warm")
FLUSH_BYTES = 512 << 20
# A warm measurement repeats a call until so many launches are in it, at most MOST_REPEATS times.
LAUNCHES_PER_MEASUREMENT, MOST_REPEATS = 400, 20


class GpuTimer:
    """Samples of one call in every mode, in microseconds."""

    modes = MODES

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self.graphs: dict[tuple[str, str], torch.cuda.CUDAGraph] = {}
        self.repeats: dict[str, int] = {}

    def prepare(self, name: str, call: Call, launches: int | None) -> None:
        """Warm the call up and capture it, once alone and once repeated."""
        self.repeats[name] = max(1, min(MOST_REPEATS, LAUNCHES_PER_MEASUREMENT // max(1, launches or 1)))
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        for mode, times in (("graph cold", 1), ("graph warm", self.repeats[name])):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(times):
                    call()
            graph.replay()
            self.graphs[name, mode] = graph
        torch.cuda.synchronize(self.device)

    def sample(self, name: str, call: Call, mode: str) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = self.repeats[name] if mode.endswith("warm") else 1
        if mode == "graph cold":
            self.cache.sum()
            begin.record()
            self.graphs[name, mode].replay()
        elif mode == "graph warm":
            self.graphs[name, mode].replay()
            begin.record()
            self.graphs[name, mode].replay()
        else:
            if mode == "eager cold":
                self.cache.sum()
            else:
                call()
            torch.cuda.synchronize(self.device)
            begin.record()
            for _ in range(times):
                call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / times

    def forget(self) -> None:
        self.graphs.clear()
        self.repeats.clear()


class HostTimer:
    """The same interface on a CPU, where there are no graphs: for the dry run."""

    modes = ("eager warm",)

    def prepare(self, name: str, call: Call, launches: int | None) -> None:
        call()

    def sample(self, name: str, call: Call, mode: str) -> float:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e6

    def forget(self) -> None:
        pass


def summary(samples: list[float]) -> dict[str, float | int]:
    """Median and the 20th and 80th percentile."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8), "samples": len(ordered)}


def write_json(path: Path, result: dict) -> None:
    """In one move: whoever stops this process finds a whole file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1), encoding="utf-8")
    part.replace(path)


def interleave(
    timer: GpuTimer | HostTimer,
    calls: dict[str, Call],
    modes: tuple[str, ...],
    seconds: float,
    least: int = 7,
) -> dict[str, dict[str, dict]]:
    """Rounds over all calls until `seconds` are over, at least `least`: {name: {mode: summary in µs}}"""
    samples = {name: {mode: [] for mode in modes} for name in calls}
    draw, begin, rounds = random.Random(0), time.perf_counter(), 0
    while rounds < least or (time.perf_counter() - begin < seconds and rounds < 100):
        for mode in modes:
            for name in draw.sample(list(calls), len(calls)):
                samples[name][mode].append(timer.sample(name, calls[name], mode))
        rounds += 1
    return {name: {mode: summary(taken) for mode, taken in by.items()} for name, by in samples.items()}


def count_launches(call: Call, device: torch.device) -> int | None:
    """Kernels, copies and fills that one call starts on the device, by the profiler; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """GB/s of a device-to-device copy of `nbytes`, read and written bytes counted: median of 20."""
    source = torch.ones(nbytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    timer = GpuTimer(device) if device.type == "cuda" else HostTimer()
    mode = "graph cold" if device.type == "cuda" else "eager warm"

    def copy() -> None:
        target.copy_(source)

    timer.prepare("copy", copy, 1)
    taken = [timer.sample("copy", copy, mode) for _ in range(20)]
    return 2 * nbytes / statistics.median(taken) / 1000
