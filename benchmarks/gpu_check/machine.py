"""The first stage of every part: what this machine is, and the kernels compiled where they are not yet.

Prints one line of JSON: enough to repeat a measurement, nothing about who made it. Ends with 1 where a kernel
could not be compiled, or where there is no GPU to check (FFK_DRY=1 checks on the CPU).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata

import torch

from benchmarks import ROOT, record
from ffkernels import ops
from ffkernels.ops.build import BuildError

TOOLS = ("make", "git", "c++", "nvcc", "compute-sanitizer", "nvidia-smi")
LIBRARIES = ("cuda-bindings", "pytest", "numpy")
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.limit,driver_version"
PROPERTIES = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")


def main() -> int:
    dry = os.environ.get("FFK_DRY") == "1"
    seconds, problems = build(dry)
    if not dry and not torch.cuda.is_available():
        problems.append("this torch sees no GPU; FFK_DRY=1 checks on the CPU")
    print("\n".join(problems))
    print(json.dumps({**provenance(), "dry": dry, "build_seconds": seconds}))
    return 1 if problems else 0


def build(dry: bool) -> tuple[dict[str, float], list[str]]:
    """Seconds that each library took to compile or find, and why one could not be made."""
    seconds, problems = {}, []
    for name, make in (("cpp", ops.build_native), ("cuda", ops.build_cuda)):
        if dry and name == "cuda":
            continue  # nothing could launch them
        begin = time.perf_counter()
        try:
            make()
            seconds[name] = round(time.perf_counter() - begin, 1)
        except (BuildError, OSError) as error:
            problems.append(f"{name}: {error}")
    return seconds, problems


def provenance() -> dict:
    """What ran where."""
    sources = hashlib.sha256()
    for folder in ("csrc", "ffkernels", "benchmarks", "tests/gpu"):
        for path in sorted((ROOT / folder).glob("**/*")):
            if path.suffix in {".py", ".cu", ".cpp", ".h", ".ll"}:
                sources.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    found = {
        **record.provenance("gpu_check.machine", (), sources_sha256=sources.hexdigest()),
        "tools": {name: shutil.which(name) is not None for name in TOOLS},
        "nvcc": first_line(["nvcc", "--version"], "release"),
        "implementations": {name: vars(value) for name, value in ops.available().items()},
    }
    found["versions"] |= {name: version(name) for name in LIBRARIES}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = {name: getattr(properties, name, None) for name in PROPERTIES}
        found["nvidia_smi"] = {
            "query": CLOCKS,
            "values": first_line(["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]),
        }
    return found


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def first_line(command: list[str], containing: str = "") -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if containing in line), None)


if __name__ == "__main__":
    sys.exit(main())
