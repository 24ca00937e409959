"""What would run on this machine, why, and what would make it faster.

``diagnose()`` returns plain data; ``describe()`` makes text of it. Nothing here needs more than torch.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from ffkernels import ops
from ffkernels.engine.ladder import NO_LAUNCHES
from ffkernels.graphs.core import why_no_stage_graph, why_no_step_graph
from ffkernels.ops.build import find_compiler
from ffkernels.reporting.machine import choose_device, machine_info, version_info

PACKAGES = ("safetensors", "numpy", "matplotlib", "typer", "rich")
NEEDED_TO_TRAIN = ("transformers", "peft", "safetensors")


def diagnose(device: str = "auto") -> dict[str, Any]:
    """Versions, machine, which implementation and executor ``"auto"`` means here, and advice.

    Args:
        device: the device to ask about; ``"auto"`` is what training would take.

    Raises:
        ValueError: when ``device`` is not one torch knows.
    """
    chosen = choose_device(device)
    versions = version_info(PACKAGES)
    name, reason = ops.resolve("auto", chosen)
    implementations = {
        impl: {"ok": found.ok, "reason": found.reason, "cure": found.cure}
        for impl, found in ops.available().items()
    }
    compiler = find_compiler()
    report: dict[str, Any] = {
        "versions": versions,
        "machine": {
            **machine_info(),
            "device": str(chosen),
            "compiler": " ".join(compiler) if compiler else None,
        },
        "implementations": implementations,
        "ops": {"name": name, "reason": reason},
        "executor": _executor(chosen),
    }
    report["advice"] = _advice(report, chosen)
    return report


def describe(report: dict[str, Any]) -> str:
    """The diagnosis as text for a terminal."""
    lines = ["versions"]
    lines += [f"  {name:13} {version or '-'}" for name, version in report["versions"].items()]
    lines += ["machine"]
    lines += [f"  {name:13} {_text(value)}" for name, value in report["machine"].items()]
    lines += ["weight moves"]
    for name, found in report["implementations"].items():
        lines += [f"  {name:13} {'yes' if found['ok'] else 'no '}  {found['reason']}"]
    lines += [
        "what would run",
        f"  ops           {report['ops']['name']}: {report['ops']['reason']}",
        f"  executor      {report['executor']['name']}: {report['executor']['reason']}",
        "what would make it faster" if report["advice"] else "nothing here would make it faster",
    ]
    lines += [f"  - {advice['what']}: {advice['cure']}" for advice in report["advice"]]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _executor(device: torch.device) -> dict[str, Any]:
    """The fastest executor that can run here, why not a faster one, and what would change that."""
    if device.type == "cpu":
        return {"name": "eager", "reason": NO_LAUNCHES, "refused": {}}
    refused = {
        name: problem
        for name, why_not in (("stage_graph", why_no_stage_graph), ("step_graph", why_no_step_graph))
        if (problem := why_not(device)) is not None
    }
    name = next(name for name in ("stage_graph", "step_graph", "eager") if name not in refused)
    if name == "eager":
        return {"name": name, "reason": refused["step_graph"], "refused": refused}
    reason = "a small loop on the device counted right" if name == "stage_graph" else refused["stage_graph"]
    reason += "; a model may still refuse, and where launches are not what a stage waits for, eager runs"
    return {"name": name, "reason": reason, "refused": refused}


def _advice(report: dict[str, Any], device: torch.device) -> list[dict[str, str]]:
    advice = []

    def add(what: str, cure: str) -> None:
        advice.append({"what": what, "cure": cure})

    for name, found in report["implementations"].items():
        if not found["ok"] and found["cure"]:
            cure = found["cure"]
            if name == "cpp" and report["machine"]["compiler"] is None:
                cure = f"{_how_to_get_a_compiler()}, then `ffkernels doctor --build`"
            add(f"{name} ops are not available ({found['reason']})", cure)
        elif name == "cpp" and "without OpenMP" in found["reason"]:
            # A library built at installation is taken before one that --build made.
            add(
                "the cpp ops run on one thread",
                "install the compiler's OpenMP runtime (libgomp, libomp) and reinstall ffkernels, or run "
                "`ffkernels doctor --build` and set FFKERNELS_LIBRARY to the file that it names",
            )
    for problem in dict.fromkeys(report["executor"]["refused"].values()):
        cause, _, cure = problem.rpartition("; ")
        add(f"stages run {report['executor']['name']}: {cause}", cure)
    if device.type == "cpu":
        threads, cores = report["machine"]["threads"], _physical_cores()
        if threads < cores:
            cure = f"OMP_NUM_THREADS={cores}, or --threads {cores} with train and compare"
            add(f"torch uses {threads} of {cores} cores", cure)
        if shutil.which("nvidia-smi") and not torch.cuda.is_available():
            cure = "check that the NVIDIA driver matches torch's CUDA version, and CUDA_VISIBLE_DEVICES"
            if torch.version.cuda is None:
                cure = "install a CUDA build of torch (pytorch.org/get-started)"
            add("an NVIDIA driver is installed, but torch sees no GPU", cure)
    if missing := [name for name in NEEDED_TO_TRAIN if report["versions"][name] is None]:
        add(
            f"{', '.join(missing)} not installed; train and compare need them",
            "pip install 'ffkernels[hf]'",
        )
    return advice


def _physical_cores() -> int:
    """Cores this process may use; two hardware threads of one core are one, as for torch's own default."""
    if not hasattr(os, "sched_getaffinity"):
        return torch.get_num_threads()  # no telling, no advice
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _how_to_get_a_compiler() -> str:
    if platform.system() == "Darwin":
        return "install one with `xcode-select --install`"
    for tool, command in (("apt-get", "apt-get install g++"), ("dnf", "dnf install gcc-c++")):
        if shutil.which(tool):
            return f"install a C++ compiler (`{command}`)"
    return "install a C++ compiler (g++ or clang++), or set CXX"
