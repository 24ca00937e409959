"""One command for a GPU machine: build, test, measure and sanitize; one JSON, one table.

    make gpu-check                                   or, without make and from any checkout:
    python benchmarks/gpu_check.py --out runs/gpu-check [--only NAME …]

Nothing is installed: the package runs from the checkout and its kernels are built in place. Every stage has
its own time limit, a failing one does not stop the rest, and the JSON is rewritten after each, so that
whatever was found survives. The exit status says whether all of them passed. FFK_DRY=1 does the same in
small on the CPU; what needs a GPU says that it was left out.

--only runs the named stages (and the build before them, which is quick the second time): with a single one,
that one has all the time there is, and a benchmark measures as much longer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET_SECONDS = 530
# Before what cannot be left out, and after it: the build, starting up.
OVERHEAD_SECONDS = 100
LAST_WORDS_SECONDS = 8  # of a stage whose time is up
BENCHMARKS = {
    "bench-stage": "bench_stage.py",
    "bench-step": "bench_step_gpu.py",
    "end-to-end": "end_to_end.py",
}
# What may take how long at most, and how long each of them measures, building and writing apart.
LIMITS = {"bench-stage": (170, 140), "bench-step": (90, 55), "end-to-end": (100, 80)}
# A sweep for the tuned rate would take the time of another task. The order of cells is the benchmark's own.
END_TO_END = ["--tuned-lr", "3e-3", "--test-examples", "500", "--evaluate-every", "20", "--fresh"]
END_TO_END_DRY = ["--fast", "--fresh", "--device", "cpu"]


@dataclass
class Stage:
    """One step of the check; `command` None means that it is left out, for `reason`."""

    name: str
    command: list[str] | None
    limit: int
    reason: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def stages(out: Path, dry: bool, only: list[str]) -> list[Stage]:
    """What is run, the most valuable first; what watches memory accesses may be slow, so it is last."""
    python = sys.executable
    bench = ROOT / "benchmarks"
    script = [python, str(bench / "sanitize_step.py")]
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = "compute-sanitizer is not on PATH" if sanitizer is None else ""
    if dry:
        no_sanitizer = "dry run: there are no GPU kernels to watch"
    # The project's own options name a plugin that these tests do not need and a GPU machine may lack.
    pytest = [python, "-m", "pytest", "-m", "gpu", "-q", "-rf", "--durations=5", "-p", "no:cacheprovider"]
    pytest += ["-o", "addopts=", "--import-mode=importlib"]
    some = (
        " and not linear" if dry else ""
    )  # one of the two searches is enough to see that the tests are right
    apart = "tests/gpu/test_stage_on_gpu.py"
    profiled = "launches_and_waits"  # these profile loops on the device, on which profilers have crashed
    build = "import torch; from ffkernels import ops; print(ops.build_native())"
    if shutil.which("nvcc") or os.environ.get("CUDA_HOME"):
        build += "; print(ops.build_cuda())"
    elif not dry:
        build += "; raise SystemExit('no nvcc on PATH or in CUDA_HOME: the CUDA kernels cannot be built')"
    if not dry:  # else tests that skip and a benchmark on the CPU would pass for a check of the GPU
        build += "; torch.cuda.is_available() or exit('this torch sees no GPU; FFK_DRY=1 checks on the CPU')"
    found = [
        Stage("build", [python, "-c", build], 80),
        Stage("provenance", [python, __file__, "--provenance"], 40),
        Stage("tests", [*pytest, "-k", f"test{some}", "tests/gpu", f"--ignore={apart}"], 140),
        Stage("tests-stage", [*pytest, "-k", f"not {profiled}{some}", apart], 130),
    ]
    for name, (limit, seconds) in LIMITS.items():
        measure = [python, str(bench / BENCHMARKS[name]), "--out", str(out / f"{name}.json")]
        seconds = BUDGET_SECONDS - OVERHEAD_SECONDS if only == [name] else seconds
        if name == "end-to-end":
            measure += END_TO_END_DRY if dry else [*END_TO_END, "--minutes", f"{seconds / 60:.2f}"]
        else:
            measure += ["--dry"] if dry else ["--seconds", str(seconds)]
        found.append(Stage(name, measure, limit))
    if dry:
        found.append(Stage("sanitize", script, 60))
    found.append(Stage("tests-profile", [*pytest, "-k", profiled, apart], 45))
    for tool in ("memcheck", "racecheck"):
        # Of API errors only ours count, and those raise: torch asks drivers for functions that they lack.
        flags = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        command = None if no_sanitizer else [sanitizer, *flags, *script]
        found.append(Stage(tool, command, 100, no_sanitizer, {"CUDA_MODULE_LOADING": "LAZY"}))
    return chosen(found, only)


def chosen(found: list[Stage], only: list[str]) -> list[Stage]:
    """Those of the names in `only`, with what has to come before; all when there are none."""
    names = [stage.name for stage in found]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise SystemExit(f"--only {' '.join(unknown)}: there are {', '.join(names)}")
    if not only:
        return found
    kept = [stage for stage in found if stage.name in {"build", "provenance", *only}]
    for stage in kept:
        if [stage.name] == only:
            stage.limit = BUDGET_SECONDS
    return kept


def run(stage: Stage, out: Path, left: float) -> dict:
    """Run one stage in its own process group, so that nothing of it outlives its limit."""
    if stage.command is None:
        return {"stage": stage.name, "status": "left out", "reason": stage.reason, "seconds": 0.0}
    limit = min(stage.limit, left)
    if limit < 5:
        return {"stage": stage.name, "status": "failed", "reason": "no time was left", "seconds": 0.0}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **stage.environment}
    if os.environ.get("FFK_DRY") == "1":  # small work, which several threads only slow down on a busy machine
        environment.setdefault("OMP_NUM_THREADS", "1")
    built = ROOT / "build" / "gpu-check" if os.access(ROOT, os.W_OK) else out / "build"
    environment.setdefault("FFKERNELS_CACHE", str(built))
    log, begin = out / "gpu_check.log", time.perf_counter()
    with log.open("ab") as stream:
        stream.write(f"\n=== {stage.name}\n".encode())
        stream.flush()
        start = stream.tell()
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code, reason = process.wait(timeout=limit), ""
        except subprocess.TimeoutExpired:
            code, reason = stop(process), f"stopped after {limit:.0f} s"
    printed = log.read_bytes()[start:].decode(errors="replace").strip()
    return {
        "stage": stage.name,
        "status": "passed" if code == 0 else "failed",
        "reason": reason or ("" if code == 0 else f"exit status {code}"),
        "seconds": round(time.perf_counter() - begin, 1),
        "output": printed[-6000:],
    }


def stop(process: subprocess.Popen) -> int:
    """Ask the process to end, so that it says what it has found, then end it and all that it started."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def provenance() -> dict:
    """What ran where: enough to repeat it, nothing about who ran it."""
    sys.path.insert(0, str(ROOT))
    import torch

    from ffkernels import ops
    from ffkernels.reporting.machine import machine_info, version_info

    digest = hashlib.sha256()
    for folder in ("csrc", "ffkernels", "benchmarks", "tests/gpu"):
        for path in sorted((ROOT / folder).glob("**/*")):
            if path.suffix in {".py", ".cu", ".cpp", ".h", ".ll"}:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python benchmarks/gpu_check.py",
        "dry": os.environ.get("FFK_DRY") == "1",
        "sources_sha256": digest.hexdigest(),
        "machine": machine_info(),
        "versions": version_info(),
        "nvcc": first_line(["nvcc", "--version"], "release"),
        "implementations": {name: vars(value) for name, value in ops.available().items()},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
        found["gpu"] = {name: getattr(properties, name, None) for name in names}
        query = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.limit,driver_version"
        found["nvidia_smi"] = {
            "query": query,
            "values": first_line(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]),
        }
    return found


def first_line(command: list[str], containing: str = "") -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if containing in line), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these stages only")
    parser.add_argument("--provenance", action="store_true", help="print what this machine is, and end")
    options = parser.parse_args()
    if options.provenance:
        print(json.dumps(provenance()))
        return 0
    # Where the toolkit is installed by default: its tools are not always on PATH.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
    # Imported late: --provenance must not fail on it.
    from end_to_end_table import end_to_end_targets
    from gpu_table import render, targets
    from stage_table import stage_targets

    dry = os.environ.get("FFK_DRY") == "1"
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = stages(out, dry, options.only)
    for name in ("gpu_check.json", "gpu_check.log", *(f"{name}.json" for name in BENCHMARKS)):
        (out / name).unlink(missing_ok=True)
    begin = time.perf_counter()
    result: dict = {"dry": dry, "provenance": None, "stages": [], **dict.fromkeys(BENCHMARKS), "targets": []}
    promised = {"bench-stage": stage_targets, "bench-step": targets, "end-to-end": end_to_end_targets}
    for stage in todo:
        done = run(stage, out, BUDGET_SECONDS - (time.perf_counter() - begin))
        if stage.name == "provenance" and done["status"] == "passed":
            # A warning may have been printed beside it.
            lines = [line for line in done.pop("output").splitlines() if line.startswith("{")]
            result["provenance"] = json.loads(lines[-1]) if lines else None
        result["stages"].append(done)
        print(f"{stage.name:16} {done['status']:8} {done['seconds']:6.1f} s  {done['reason']}", flush=True)
        if done["status"] == "failed":
            print("    " + done.get("output", "")[-2500:].replace("\n", "\n    "), flush=True)
        measured = out / f"{stage.name}.json"
        if stage.name in BENCHMARKS and measured.is_file():
            result[stage.name] = json.loads(measured.read_text(encoding="utf-8"))
            measured.unlink()
            result["targets"] += promised[stage.name](result[stage.name])
        result["seconds"] = round(time.perf_counter() - begin, 1)
        (out / "gpu_check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render(result))
    failed = [done["stage"] for done in result["stages"] if done["status"] == "failed"]
    print(f"{'failed: ' + ', '.join(failed) if failed else 'all stages passed'}; written to {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
