"""What a stage asks of the driver, counted twice: at the calls themselves, and by the profiler.

At the calls: graphs launched, operators of torch that write on the device outside of graphs (a fill, a copy;
in an eager stage the whole forward; ffkernels' own kernels and other threads are not among them), and how
often torch made the host wait for the device. By the profiler: kernels launched one by one, copies, waits,
and what ran on the device. The profiler does not see launches by the driver's own API, shows one iteration of
a WHILE node at most (pytorch/kineto#1062), and has crashed on conditional nodes (pytorch/pytorch#134308): so
it comes second, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import ROOT, record
from benchmarks.stages.cases import CASES, CLEAN, EAGER, SHORT, STAGE, STEP
from benchmarks.stages.models import make_model
from benchmarks.stages.providers import Bench, makers, timed
from benchmarks.timing import traced
from ffkernels.graphs import driver as graph_driver

PROFILE_SECONDS = 120
COUNTED = 4  # evaluations of the longer of the two stages that are profiled
# Not the authors': hundreds of thousands of events, nothing promised. Last the one that may end the process.
PROFILED = (STEP, EAGER, CLEAN, STAGE)

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
CALLS = {"cuda_runtime", "cuda_driver"}
KINDS = ("on device", "reads", "launches", "copies", "syncs", "event syncs")
WAITED = "synchronizing CUDA operation"  # of torch's warning


class Operators(TorchDispatchMode):
    """Counts operators that write on `device`: their results are there, and are no views."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.kind, self.count, self.paused = device.type, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        here = any(tensor.device.type == self.kind for tensor in found)
        self.count += here and not func.is_view and not self.paused
        return result


@contextmanager
def _waits(device: torch.device) -> Iterator[list[str]]:
    """What torch says of every call that waits for the device; nothing on a CPU."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found += [str(one.message) for one in said if WAITED in str(one.message)]


def count_calls(stage: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Graphs launched through `graphs.driver`, operators outside of them, and waits for the device."""
    cuda, launches, operators = graph_driver.cuda, [], Operators(device)

    def counting(launch: Callable) -> Callable:
        def call(*arguments: object) -> None:
            launches.append(launch)
            operators.paused = True  # only a stand-in for CUDA runs operators here
            try:
                launch(*arguments)
            finally:
                operators.paused = False

        return call

    cuda.replay, cuda.exec_launch = counting(cuda.replay), counting(cuda.exec_launch)
    try:
        with _waits(device) as waited, operators:
            stage()
    finally:
        del cuda.replay, cuda.exec_launch  # the class's own again
    found = {"graphs": len(launches), "operators": operators.count}
    return found | {"waits": len(waited)} if device.type == "cuda" else found


def per_step(short: dict[str, int], long: dict[str, int], more: int) -> dict[str, dict[str, float]]:
    """Of two stages, one with `more` evaluations: what each step adds, and the longer stage as a whole."""
    return {"stage": dict(long), "step": {kind: (long[kind] - short[kind]) / more for kind in long}}


def count_both(way: Callable, provider: Any, evaluations: int, device: torch.device) -> dict[str, dict]:
    """`per_step` of a short stage and one of so many evaluations, each as after one like it."""
    counts = []
    for number in (SHORT, evaluations):
        timed(provider, number, device)
        provider.prepare(number)
        counts.append(way(lambda n=number: provider.stage(n), device))
    return per_step(*counts, evaluations - SHORT)


def count_changes(provider: Any, evaluations: int, device: torch.device) -> dict[str, dict[str, int]]:
    """What a stage asks for where it differs from the one before: in the search's start, or in its examples.

    The latter are exchanged as a `ValidationPool` does it, by copies to the same places.
    """

    def a_stage() -> dict[str, int]:
        provider.prepare(evaluations)
        return count_calls(lambda: provider.stage(evaluations), device)

    bench, found = provider.bench, {}
    try:
        provider.start = 2
        found["another start"] = a_stage()
        provider.start = 1
        timed(provider, evaluations, device)
        found["swap_batch"] = count_calls(lambda: bench.exchange(True), device)
        found["after swap_batch"] = a_stage()
    finally:
        provider.start = 1
        bench.exchange(False)
    return found


def counted(events: list[dict]) -> Counter:
    """Of a trace: what ran on the device, what the host launched and copied, and what it waited for."""
    found: Counter = Counter()
    for event in events:
        name = event.get("name", "")
        if event.get("cat") in ON_DEVICE:
            found["on device"] += 1
            found["reads"] += "DtoH" in name
        elif event.get("cat") in CALLS:
            found["launches"] += "LaunchKernel" in name or "LaunchCooperative" in name
            found["copies"] += "Memcpy" in name or "Memset" in name
            # A blocking copy waits too. Events are told apart: most have happened when they are asked for.
            event_sync = "EventSynchronize" in name
            found["event syncs"] += event_sync
            found["syncs"] += ("Synchronize" in name or name == "cudaMemcpy") and not event_sync
    return found


@cache
def idle_counts(device: torch.device) -> Counter:
    return counted(traced(lambda: None, device))


def count_stage(stage: Callable[[], object], device: torch.device) -> dict[str, int]:
    """What the profiler sees of one stage, without what it does by itself."""
    idle = idle_counts(device)
    found = counted(traced(stage, device))
    return {kind: max(0, found[kind] - idle[kind]) for kind in KINDS}


def profile_all(out: Path, device: torch.device) -> None:
    """Profile a stage of each in the smallest case; written before and after each."""
    case = replace(CASES[0], evaluations=COUNTED)
    bench = Bench(case, make_model(case.model, device, torch.bfloat16, case.method, case.rank)[0], device)
    every, found = makers(bench), {}
    for name in PROFILED:
        found[name] = {"missing": "the profiler ended the process"}
        record.write(found, out)
        provider = None
        try:
            provider = every[name]()
            found[name] = count_both(count_stage, provider, COUNTED, device)
        except Exception as error:
            found[name] = {"missing": record.reason(error)}
        finally:
            if provider is not None:
                provider.close()
        record.write(found, out)


def profile_in_a_child(out: Path, seconds: float = PROFILE_SECONDS) -> tuple[dict, str]:
    """`profile_all` in another process: what it found, and what ended it early."""
    path = out.resolve().with_suffix(".profile.json")
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.stages.profile", "--out", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
        failure = f"exit status {done.returncode}: {done.stderr[-1000:]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"stopped after {seconds:.0f} s"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.unlink(missing_ok=True)
    return found, failure


def add_profile(counts: dict[str, Any], found: dict[str, dict], failure: str) -> None:
    """Put what the profiler found beside what was counted at the calls, which stays as it is."""
    counts["profiled evaluations"] = COUNTED
    for name, kinds in found.items():
        own = counts.setdefault("providers", {}).setdefault(name, {})
        own["profile"] = kinds
    if failure:
        counts["failure"] = failure


def main() -> int:
    parser = record.parser("stages.profile", __doc__, out="runs/stages.profile.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this torch sees no GPU")
    profile_all(options.out, torch.device("cuda", torch.cuda.current_device()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
