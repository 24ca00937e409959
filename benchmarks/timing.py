"""How a call is timed.

On a GPU, eagerly and as a replayed CUDA graph, with a cold and with a warm L2 cache:

    eager cold   one call on an idle device whose cache holds something else: what a single call costs
    eager warm   many calls in a row: the host's or the device's time per call, whichever is longer
    graph cold   one replay, queued behind the read that empties the cache, so that the host does not count
    graph warm   one replay of a graph that holds the call many times, per call: kernels and the gaps between

On a CPU warm, right after itself, as on a model so small that nothing evicts the adapters; and cold, after
the caches were filled with something else, as the forward of a large model does.

All sides are interleaved: each round measures each of them once, in an order drawn anew, so that a busy
machine disturbs all alike. A GPU's cache is emptied by reading a large buffer, not by writing it: dirty lines
would be written back during the measurement.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Call = Callable[[], object]

FLUSH_BYTES = 512 << 20
# A warm measurement repeats a call until so many launches are in it, at most MOST_REPEATS times.
LAUNCHES_PER_MEASUREMENT, MOST_REPEATS = 400, 20


class GpuTimer:
    """Samples of one call in every mode, in microseconds."""

    modes = ("graph cold", "graph warm", "eager cold", "eager warm")

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


class HostTimer:
    """The same on a CPU; a warm sample is the mean of ``repeats`` calls, after as many that do not count."""

    modes = ("warm", "cold")

    def __init__(self, repeats: int = 1) -> None:
        self.repeats = repeats
        self.memory = torch.zeros(32 << 20)  # 128 MiB

    def prepare(self, name: str, call: Call, launches: int | None) -> None:
        call()

    def sample(self, name: str, call: Call, mode: str) -> float:
        if mode == "cold":
            self.memory.add_(1.0)
            return 1e6 * seconds_of(call)
        for _ in range(self.repeats):
            call()
        begin = time.perf_counter()
        for _ in range(self.repeats):
            call()
        return (time.perf_counter() - begin) * 1e6 / self.repeats


def timer_for(device: torch.device) -> GpuTimer | HostTimer:
    return GpuTimer(device) if device.type == "cuda" else HostTimer()


def wait(device: torch.device | None) -> None:
    """Until a GPU has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device | None = None) -> float:
    """Of one call, by the host's clock, from an idle device to an idle device."""
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def summary(samples: list[float], scale: float = 1.0, unit: str = "") -> dict[str, float | int]:
    """Median and the 20th and 80th percentile, times ``scale``; ``unit`` ends their names."""
    ordered = sorted(scale * sample for sample in samples)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    found = {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8)}
    return {**{name + unit: value for name, value in found.items()}, "samples": len(ordered)}


def interleave(
    timer: GpuTimer | HostTimer,
    calls: Mapping[str, Call],
    seconds: float,
    least: int = 7,
    modes: tuple[str, ...] | None = None,
    launches: Mapping[str, int | None] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Rounds over all calls until ``seconds`` are over, at least ``least``: {name: {mode: samples in µs}}"""
    modes = modes or timer.modes
    for name, call in calls.items():
        timer.prepare(name, call, (launches or {}).get(name))
    samples = {name: {mode: [] for mode in modes} for name in calls}
    draw, begin, rounds = random.Random(0), time.perf_counter(), 0
    while rounds < least or (time.perf_counter() - begin < seconds and rounds < 100):
        for mode in modes:
            for name in draw.sample(list(calls), len(calls)):
                samples[name][mode].append(timer.sample(name, calls[name], mode))
        rounds += 1
    return samples


def traced(call: Call, device: torch.device) -> list[dict]:
    """The profiler's events of one call on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def count_launches(call: Call, device: torch.device) -> int | None:
    """Kernels, copies and fills that one call starts on the device, by the profiler; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in traced(call, device))


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """GB/s of a device-to-device copy of ``nbytes``, read and written bytes counted: median of 20."""
    source = torch.ones(nbytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    timer = timer_for(device)
    taken = interleave(timer, {"copy": lambda: target.copy_(source)}, 0.0, 20, timer.modes[:1], {"copy": 1})
    return 2 * nbytes / statistics.median(taken["copy"][timer.modes[0]]) / 1000
