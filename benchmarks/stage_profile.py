"""What a stage asks of the driver, counted twice: at the calls themselves, and by the profiler.

At the calls: graphs launched, and how often torch made the host wait for the device. By the profiler: kernels
launched one by one, copies, waits, and what ran on the device. The profiler does not see launches by the
driver's own API, shows one iteration of a WHILE node at most (pytorch/kineto#1062), and has crashed on
conditional nodes (pytorch/pytorch#134308): so it comes second, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from stage_cases import CASES, make_model  # noqa: E402
from stage_providers import BARE, SHORT, STAGE, Bench, makers, timed  # noqa: E402
from timing import write_json  # noqa: E402

from ffkernels.engine import graph_driver  # noqa: E402

COUNT_SECONDS = 70
COUNTED = 4  # evaluations of the longer of the two stages that are counted

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
CALLS = {"cuda_runtime", "cuda_driver"}
KINDS = ("on device", "reads", "launches", "copies", "syncs", "event syncs")


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


def count_calls(stage: Callable[[], object]) -> dict[str, int]:
    """Graphs launched through `engine.graph_driver`, and calls of torch that waited for the device."""
    cuda, launches = graph_driver.cuda, []

    def counting(launch: Callable) -> Callable:
        def call(*arguments: object) -> None:
            launches.append(launch)
            launch(*arguments)

        return call

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cuda.replay, cuda.exec_launch = counting(cuda.replay), counting(cuda.exec_launch)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            stage()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            del cuda.replay, cuda.exec_launch  # the class's own again
    waits = sum("synchronizing CUDA operation" in str(one.message) for one in said)
    return {"graphs": len(launches), "waits": waits}


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
    """What the profiler sees of one stage, without what it does by itself."""
    idle = counted(traced(lambda: None, device))
    found = counted(traced(stage, device))
    return {kind: max(0, found[kind] - idle[kind]) for kind in KINDS}


def per_step(short: dict[str, int], long: dict[str, int], more: int) -> dict[str, dict[str, float]]:
    """Of two stages, one with `more` evaluations: what each step adds, and the longer stage as a whole."""
    return {"stage": dict(long), "step": {kind: (long[kind] - short[kind]) / more for kind in long}}


def count(out: Path, device: torch.device) -> int:
    """Both counts for every provider, in the smallest case; written after each, the stage graph's last."""
    case = replace(CASES[0], evaluations=COUNTED)
    bench = Bench(case, make_model(case.model, device, torch.bfloat16, case.method, case.rank)[0], device)
    every = makers(bench)
    found: dict[str, dict] = {}
    result = {"case": case.name, "evaluations": COUNTED, "providers": found}
    for name in sorted(set(every) - {BARE}, key=lambda name: (name == STAGE, name)):
        provider = None
        try:
            provider = every[name]()

            def both(way: Callable, provider: Any = provider) -> dict[str, dict[str, float]]:
                counts = []
                for evaluations in (SHORT, COUNTED):
                    timed(provider, evaluations, device)
                    provider.prepare(evaluations)
                    counts.append(way(lambda n=evaluations: provider.stage(n)))
                return per_step(*counts, COUNTED - SHORT)

            found[name] = both(count_calls)
            found[name]["missing"] = "the profiler ended the process"
            write_json(out, result)
            profiled = both(lambda stage: count_stage(stage, device))
            del found[name]["missing"]
            for key, kinds in profiled.items():
                found[name][key] |= kinds
        except Exception as error:
            found.setdefault(name, {})["missing"] = f"{type(error).__name__}: {str(error)[:500]}"
        finally:
            if provider is not None:
                provider.close()
        write_json(out, result)
    return 0


def counts_of_a_child(out: Path) -> dict:
    """`count` in another process: as far as it came, for what ran last may have ended it."""
    path = out.with_suffix(".counts")
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COUNT_SECONDS)
        failure = done.stderr[-1000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"stopped after {COUNT_SECONDS} s"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"providers": {}}
    path.unlink(missing_ok=True)
    if failure:
        found["failure"] = failure
    return found


if __name__ == "__main__":
    sys.exit(count(Path(sys.argv[1]), torch.device("cuda", torch.cuda.current_device())))
