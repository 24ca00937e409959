"""Which implementation of the weight moves runs: what is there, which one is taken, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ffkernels.ops import native
from ffkernels.ops.notices import announce_once

IMPLEMENTATIONS = ("auto", "torch", "cpp")


@dataclass(frozen=True)
class Availability:
    """Whether an implementation can run here; if not, why, and what would change that."""

    ok: bool
    reason: str
    cure: str = ""


def available() -> dict[str, Availability]:
    """Every implementation by name."""
    loaded = native.load()
    if loaded.library is None:
        cpp = Availability(False, loaded.reason, native.CURE)
    else:
        threads = "OpenMP" if loaded.library.ffk_cpu_threaded() else "one thread, built without OpenMP"
        cpp = Availability(True, f"{loaded.path} ({native.isa()}, {threads})")
    return {"torch": Availability(True, "part of PyTorch, runs on every device"), "cpp": cpp}


def resolve(impl: str, device: torch.device | str) -> tuple[str, str]:
    """The implementation that `impl` means on `device`, and why. A named one that cannot run is an error."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; allowed are {', '.join(map(repr, IMPLEMENTATIONS))}")
    device = torch.device(device)
    if impl == "torch":
        return "torch", "asked for"
    if device.type != "cpu":
        if impl == "cpp":
            raise ValueError(
                f"impl='cpp' runs on the CPU, the tensors are on {device}; use 'auto' or 'torch'"
            )
        return "torch", f"there is no compiled kernel for {device.type}"
    cpp = available()["cpp"]
    if impl == "cpp":
        if not cpp.ok:
            raise RuntimeError(f"impl='cpp' is not available: {cpp.reason}; {cpp.cure}")
        return "cpp", "asked for"
    if cpp.ok:
        return "cpp", f"fastest on the CPU: {cpp.reason}"
    return "torch", f"{cpp.reason}; {cpp.cure}"


def choose(impl: str, device: torch.device) -> str:
    """`resolve`, and say so once where "auto" had to take the slower one on the CPU."""
    name, reason = resolve(impl, device)
    if impl == "auto" and name == "torch" and device.type == "cpu":
        announce_once("ops.cpp", f"weight moves run as plain torch ops: {reason}")
    return name
