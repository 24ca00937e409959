"""Ways to do one thing to a whole adapter set on the CPU, measured in turn: for bench_step and bench_align.

Every way is made from the shapes of a set, owns its tensors and is called without arguments. The ways run one
after the other, round after round, so that a busy machine disturbs all alike, in two states: warm, right
after itself, as on a model so small that nothing evicts the adapters; and cold, after the caches were filled
with something else, as the forward of a large model does. Float32, one thread.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import checkout  # noqa: F401  puts it on the path
import pytest
import torch
from adapter_sets import all_sets

import ffkernels
from ffkernels import ops
from ffkernels.ops import native

Shapes = tuple[tuple[int, ...], ...]
Way = Callable[[], object]
Ways = dict[str, Callable[[Shapes], Way]]  # "ours" and its peers

PYTHIA = "Pythia-1.4B r=8"
LLAMA = "Llama-3-8B r=64"
ADAPTERS: dict[str, Shapes] = {one.name: one.shapes for one in all_sets() if one.name in (PYTHIA, LLAMA)}
# Other programs share the last-level cache, so a miss of a target is measured again.
TRIES = 3
ROUNDS = {PYTHIA: 31, LLAMA: 15}
# Before and during a warm timing the same way runs again and again; a large set is as cold either way.
WARM_UPS = {PYTHIA: 10, LLAMA: 1}
CALLS = {PYTHIA: 10, LLAMA: 1}


def random_tensors(shapes: Shapes, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Eviction:
    """Fills every cache with memory of its own."""

    def __init__(self, megabytes: int = 128) -> None:
        self.memory = torch.zeros(megabytes << 18)

    def __call__(self) -> None:
        self.memory.add_(1.0)


def seconds_of(way: Callable[[], None], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        way()
    return (time.perf_counter() - start) / calls


def run_all(ways: dict[str, Way], check: Callable[[dict[str, Way]], None]) -> None:
    """Each once; `check` raises where they do not agree."""
    for way in ways.values():
        way()
    check(ways)


def measure(adapter: str, makers: Ways, check: Callable) -> dict[str, dict[str, list[float]]]:
    """Seconds of every way, {"warm" | "cold": {way: [seconds of each round]}}, interleaved."""
    evict = Eviction()
    ways = {name: make(ADAPTERS[adapter]) for name, make in makers.items()}
    run_all(ways, check)
    seconds = {mode: {name: [] for name in ways} for mode in ("warm", "cold")}
    order = list(ways)
    for _ in range(ROUNDS[adapter]):
        order.append(order.pop(0))
        for name in order:
            seconds_of(ways[name], WARM_UPS[adapter])
            seconds["warm"][name].append(seconds_of(ways[name], CALLS[adapter]))
            evict()
            seconds["cold"][name].append(seconds_of(ways[name]))
    return seconds


def summarise(shapes: Shapes, seconds: dict[str, dict[str, list[float]]]) -> dict:
    """Medians with the 20th and 80th percentiles in microseconds, and ours over each alternative."""
    elements = sum(math.prod(shape) for shape in shapes)
    result: dict = {"tensors": len(shapes), "megabytes": elements * 4 / 1e6, "modes": {}}
    for mode, by_way in seconds.items():
        middle = {name: median(times) for name, times in by_way.items()}
        rows = {}
        for name, times in by_way.items():
            fifths = quantiles(times, n=5)
            rows[name] = {
                "median_us": middle[name] * 1e6,
                "p20_us": fifths[0] * 1e6,
                "p80_us": fifths[-1] * 1e6,
                "ours_over_this": middle["ours"] / middle[name],
                "rounds": len(times),
            }
        rows["ours"]["gigabytes_per_second"] = elements * 16 / middle["ours"] / 1e9
        result["modes"][mode] = rows
    return result


def hold_to_target(benchmark, adapter: str, makers: Ways, check: Callable, target: float) -> None:
    """Time ours for pytest-benchmark's table, and its share of foreach's time, from interleaved rounds.

    The rounds go into `extra_info`. Where benchmarks are off, the ways only have to agree, on few tensors.
    """
    if not ops.available()["cpp"].ok:
        pytest.skip(ops.available()["cpp"].reason)
    shapes = ADAPTERS[adapter]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if benchmark.disabled:
            ways = {name: make(shapes[:4]) for name, make in makers.items()}
            run_all(ways, check)
            benchmark(ways["ours"])
            return
        ours = makers["ours"](shapes)
        benchmark.pedantic(ours, rounds=ROUNDS[adapter], iterations=CALLS[adapter], warmup_rounds=2)
        del ours
        ratios: list[float] = []
        while len(ratios) < TRIES and (not ratios or ratios[-1] > target):
            benchmark.extra_info.update(summarise(shapes, measure(adapter, makers, check)))
            ratios.append(benchmark.extra_info["modes"]["warm"]["foreach"]["ours_over_this"])
        benchmark.extra_info["ratios"] = ratios
        assert ratios[-1] <= target, f"{adapter}: ours takes {ratios} of foreach's time"
    finally:
        torch.set_num_threads(before)


def provenance() -> dict:
    """What a number needs to be believed: the machine, the versions, the command, the day."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line
        )
        known = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = ", ".join(
            f"{label}{known[key]}"
            for label, key in (
                ("", "model name"),
                ("family ", "cpu family"),
                ("model ", "model"),
                ("", "cache size"),
            )
            if key in known
        )
    compiler = subprocess.run(
        ["c++", "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    system = f"{platform.system()} {platform.machine()}"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "system": system, "load": os.getloadavg()},
        "versions": {
            "ffkernels": ffkernels.__version__,
            "commit": commit or None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "compiler": compiler[0] if compiler else None,
        },
        "instruction_set": native.isa(),
        "threads": 1,
    }


def main(
    description: str,
    stem: str,
    makers: Ways,
    check: Callable,
    targets: dict[str, float],
    more: Callable[[Shapes], dict] = lambda shapes: {},
) -> None:
    """Print the table, and write <stem>_<date>.json where --out says so; `more` adds to a set's entry."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help=f"folder for {stem}_<date>.json; without it, only the table")
    arguments = parser.parse_args()
    report = {"provenance": provenance(), "targets": targets, "adapters": {}}
    torch.set_num_threads(1)
    for adapter, shapes in ADAPTERS.items():
        summary = summarise(shapes, measure(adapter, makers, check)) | more(shapes)
        report["adapters"][adapter] = summary
        for mode, rows in summary["modes"].items():
            for name, row in rows.items():
                print(
                    f"{adapter:16} {mode:5} {name:11} {row['median_us']:10.1f} µs"
                    f"   {row['p20_us']:10.1f} – {row['p80_us']:10.1f}   ×{row['ours_over_this']:.2f}"
                )
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"{stem}_{report['provenance']['date'][:10]}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {path}")
