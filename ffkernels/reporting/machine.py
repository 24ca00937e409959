"""Where something runs and was measured: device, machine, versions and commit; no names of hosts or users."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ffkernels import __version__

PACKAGES = ("transformers", "peft", "triton")


def choose_device(device: str) -> torch.device:
    """The device that ``device`` names here; ``"auto"`` is CUDA where torch sees it, else the CPU.

    Raises:
        ValueError: when torch does not know it, or it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: must be 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ValueError(f"device={device!r}: this torch sees no CUDA device")
        if (chosen.index or 0) >= count:
            raise ValueError(f"device={device!r}: this torch sees {count} CUDA device(s), counted from 0")
    return chosen


def machine_info() -> dict[str, Any]:
    """Processor, cores and threads this process has, memory, GPUs that PyTorch sees, operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": _ram_gib(),
        "gpus": _gpus(),
        "gpu_driver": _gpu_driver(),
        "os": _os_name(),
        "arch": platform.machine(),
    }


def version_info(more: Sequence[str] = ()) -> dict[str, Any]:
    """Versions of Python and libraries, None for what is not installed; the commit of a checkout."""
    versions: dict[str, Any] = {
        "ffkernels": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, such as +cpu
        "cuda": torch.version.cuda,
    }
    for name in (*PACKAGES, *more):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def command_line(arguments: Sequence[str], *program: str) -> str:
    """The command as a report tells it: of absolute paths the last part, not somebody's folders.

    ``program`` is this package's own command where it is not given.
    """
    return shlex.join(
        [*(program or ("ffkernels",)), *(re.sub(r"(^|=)[/~].*/", r"\1", part) for part in arguments)]
    )


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, with ``+changes`` if any; None elsewhere."""
    package = Path(__file__).resolve().parents[1]
    # A package installed inside somebody else's repository must not report that repository's commit.
    if _output("git", "-C", package, "ls-files", "--error-unmatch", "reporting/machine.py") is None:
        return None
    commit = _output("git", "-C", package, "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}+changes" if commit and changes else commit or None


def _cpu_model() -> str:
    if platform.system() == "Linux":
        text = _read("/proc/cpuinfo")
        for key in ("model name", "Hardware", "cpu model"):
            if found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
                return found.group(1).strip()
        if found := re.search(r"^Model name:\s*(.+)$", _output("lscpu") or "", re.MULTILINE):
            return found.group(1).strip()
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return None


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _gpu_driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else None


def _os_name() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    kernel = f"{platform.system()} {platform.release()}"
    return f"{name} ({kernel})" if name else kernel


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(*command: Any) -> str | None:
    """What the command prints; None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
