"""One step forward with the checkpoint of what it leaves: best ← W ; W ← W + Δ, over a whole adapter set.

Four ways to do it, run in turn, round after round, so that a busy machine disturbs all alike:

    ours           ops.step_(table, accept=True, k=1), the C++ ops
    foreach        torch._foreach_copy_(best, W) ; torch._foreach_add_(W, Δ)
    loop           the same two, tensor by tensor
    state_dict     what published scripts do: clone every entry for the best weights, then a thread pool
                   walks the state dict, makes W + Δ anew and copies it back (our own rendition)

on the LoRA tensors of Pythia-1.4B (r = 8, query_key_value) and Llama-3-8B (r = 64, q, k, v, o), float32, one
thread. Shapes come from the models' configurations, so no weights are needed. Each way owns its tensors and
is timed in two states: warm, right after itself, as on a model so small that nothing evicts the adapters;
and cold, after the caches were filled with something else, as the validation forward of a large model does.

    pytest benchmarks/bench_step.py --benchmark-enable      measures, and asserts the ratios
    python benchmarks/bench_step.py --out benchmarks/results    measures, and writes step_cpu_<date>.json

Bytes moved by `ours`: read W and Δ, write W and best, 16 bytes per element; `foreach` reads W once more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles

import checkout  # noqa: F401  puts it on the path
import pytest
import torch

import ffkernels
from ffkernels import ops
from ffkernels.ops import native

Shapes = list[tuple[int, int]]
RANK_SMALL, RANK_LARGE = 8, 64


def lora(targets: list[tuple[int, int]], layers: int, rank: int) -> Shapes:
    """A [rank, in] and B [out, rank] of every adapted (in, out) matrix."""
    return [shape for _ in range(layers) for n, m in targets for shape in ((rank, n), (m, rank))]


PYTHIA = "Pythia-1.4B r=8"
LLAMA = "Llama-3-8B r=64"
ADAPTERS: dict[str, Shapes] = {
    PYTHIA: lora([(2048, 6144)], layers=24, rank=RANK_SMALL),
    LLAMA: lora([(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)], layers=32, rank=RANK_LARGE),
}
# Time of ours over time of foreach, warm, one thread. Other programs share the last-level cache, so a miss is
# measured again.
TARGETS = {PYTHIA: 0.65, LLAMA: 0.90}
TRIES = 3
ROUNDS = {PYTHIA: 31, LLAMA: 15}
# Before and during a warm timing the same way runs again and again; a large set is as cold either way.
WARM_UPS = {PYTHIA: 10, LLAMA: 1}
CALLS = {PYTHIA: 10, LLAMA: 1}


def _weights(shapes: Shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _deltas(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [weight * 2.0**-20 for weight in weights]


class Ours:
    def __init__(self, shapes: Shapes) -> None:
        self.weights = _weights(shapes)
        self.table = ops.TensorTable(self.weights, impl="cpp")
        torch._foreach_copy_(self.table.deltas, _deltas(self.weights))
        self.best = self.table.best

    def __call__(self) -> None:
        ops.step_(self.table, True, 1)


class Foreach:
    def __init__(self, shapes: Shapes) -> None:
        self.weights = _weights(shapes)
        self.deltas = _deltas(self.weights)
        self.best = [weight.clone() for weight in self.weights]

    def __call__(self) -> None:
        torch._foreach_copy_(self.best, self.weights)
        torch._foreach_add_(self.weights, self.deltas)


class Loop(Foreach):
    def __call__(self) -> None:
        for weight, delta, best in zip(self.weights, self.deltas, self.best, strict=True):
            best.copy_(weight)
            weight.add_(delta)


class StateDict:
    def __init__(self, shapes: Shapes) -> None:
        self.module = torch.nn.Module()
        for i, weight in enumerate(_weights(shapes)):
            self.module.register_parameter(f"lora_{i}", torch.nn.Parameter(weight))
        self.weights = list(self.module.parameters())
        names = self.module.state_dict().keys()
        self.deltas = dict(zip(names, _deltas([weight.detach() for weight in self.weights]), strict=True))
        self.best: list[torch.Tensor] = []

    def __call__(self) -> None:
        state = self.module.state_dict()
        self.best = [tensor.clone() for name, tensor in state.items() if "lora" in name]

        def add(name: str) -> None:
            state[name].copy_(state[name] + self.deltas[name])

        with ThreadPoolExecutor() as pool:
            list(pool.map(add, (name for name in state if "lora" in name)))


WAYS: dict[str, Callable[[Shapes], Callable[[], None]]] = {
    "ours": Ours,
    "foreach": Foreach,
    "loop": Loop,
    "state_dict": StateDict,
}


class Eviction:
    """Fills every cache with memory of its own."""

    def __init__(self, megabytes: int = 128) -> None:
        self.memory = torch.zeros(megabytes << 18)

    def __call__(self) -> None:
        self.memory.add_(1.0)


def check_agreement(ways: dict[str, Callable[[], None]]) -> None:
    """All ways leave the same bits; to be called right after each ran once."""
    expected = ways["foreach"]
    for name, way in ways.items():
        for found, right in ((way.weights, expected.weights), (way.best, expected.best)):
            if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
                raise RuntimeError(f"{name} and foreach do not agree, so there is nothing to compare")


def seconds_of(way: Callable[[], None], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        way()
    return (time.perf_counter() - start) / calls


def measure(adapter: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of every way, {"warm" | "cold": {way: [seconds of each round]}}, interleaved."""
    evict = Eviction()
    ways = {name: make(ADAPTERS[adapter]) for name, make in WAYS.items()}
    for way in ways.values():
        way()
    check_agreement(ways)
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
    elements = sum(n * m for n, m in shapes)
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


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_step(benchmark, one_thread, adapter):
    """Times ours for the benchmark table; the ratios come from the interleaved rounds, in `extra_info`."""
    if not ops.available()["cpp"].ok:
        pytest.skip(ops.available()["cpp"].reason)
    shapes = ADAPTERS[adapter]
    if benchmark.disabled:
        ways = {name: make(shapes[:4]) for name, make in WAYS.items()}
        for way in ways.values():
            way()
        check_agreement(ways)
        benchmark(ways["ours"])
        return
    ours = Ours(shapes)
    benchmark.pedantic(ours, rounds=ROUNDS[adapter], iterations=CALLS[adapter], warmup_rounds=2)
    del ours
    ratios = []
    while len(ratios) < TRIES and (not ratios or ratios[-1] > TARGETS[adapter]):
        benchmark.extra_info.update(summarise(shapes, measure(adapter)))
        ratios.append(benchmark.extra_info["modes"]["warm"]["foreach"]["ours_over_this"])
    benchmark.extra_info["ratios"] = ratios
    assert ratios[-1] <= TARGETS[adapter], f"{adapter}: ours takes {ratios} of foreach's time"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="folder for step_cpu_<date>.json; without it, only the table"
    )
    arguments = parser.parse_args()
    report = {"provenance": provenance(), "targets": TARGETS, "adapters": {}}
    torch.set_num_threads(1)
    for adapter, shapes in ADAPTERS.items():
        report["adapters"][adapter] = summarise(shapes, measure(adapter))
        for mode, rows in report["adapters"][adapter]["modes"].items():
            for name, row in rows.items():
                print(
                    f"{adapter:16} {mode:5} {name:11} {row['median_us']:10.1f} µs"
                    f"   {row['p20_us']:10.1f} – {row['p80_us']:10.1f}   ×{row['ours_over_this']:.2f}"
                )
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"step_cpu_{report['provenance']['date'][:10]}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
