"""What a stage asks of the driver: kernels, launches and waits, as the profiler saw them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from stage_cases import CASES, make_model  # noqa: E402
from stage_providers import BARE, SHORT, STAGE, Bench, makers, timed  # noqa: E402
from timing import write_json  # noqa: E402

COUNT_SECONDS = 60
COUNTED = 4  # evaluations of the longer of the two stages that are counted

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


def count(out: Path, device: torch.device) -> int:
    """What a stage of each provider asks of the driver, of the smallest case; written after each.

    A process of its own: what runs after a profiler was there is slower, and a profiler that meets a kind of
    graph it does not know may take its process along. The stage graph's turn is the last.
    """
    case = replace(CASES[0], evaluations=COUNTED)
    bench = Bench(case, make_model(case.model, device, torch.bfloat16, case.method, case.rank)[0], device)
    every = makers(bench)
    found: dict[str, dict] = {}
    for name in sorted(set(every) - {BARE}, key=lambda name: (name == STAGE, name)):
        counts = []
        try:
            provider = every[name]()
            try:
                for evaluations in (SHORT, COUNTED):
                    timed(provider, evaluations, device)
                    provider.prepare(evaluations)
                    counts.append(count_stage(lambda p=provider, n=evaluations: p.stage(n), device))
            finally:
                provider.close()
            found[name] = per_step(*counts, COUNTED - SHORT)
        except Exception as error:
            found[name] = {"missing": f"{type(error).__name__}: {str(error)[:500]}"}
        write_json(out, {"case": case.name, "evaluations": COUNTED, "providers": found})
    return 0


def counts_of_a_child(out: Path) -> dict:
    """`count` in another process, as far as it came."""
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
        found["providers"].setdefault(STAGE, {"missing": f"the counting process failed: {failure}"})
    return found


if __name__ == "__main__":
    sys.exit(count(Path(sys.argv[1]), torch.device("cuda", torch.cuda.current_device())))
