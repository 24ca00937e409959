"""Which implementation of the weight moves runs: what is there, which one is taken, and why."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import torch

from ffkernels.ops import native, native_cuda
from ffkernels.ops.notices import announce_once
from ffkernels.ops.plan import GPU_CHUNK, make_plan

IMPLEMENTATIONS = ("auto", "torch", "cpp", "triton", "cuda")
# What "auto" tries on each kind of device, best first; plain torch ops come last everywhere.
ORDER = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}

NO_GPU = "this torch sees no GPU"
GET_TRITON = "install it: `pip install 'triton>=3.6'`"


@dataclass(frozen=True)
class Availability:
    """Whether an implementation can run here; if not, why, and what would change that."""

    ok: bool
    reason: str
    cure: str = ""


def available() -> dict[str, Availability]:
    """Every implementation by name, on this machine's CPU and current GPU."""
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    return {
        "torch": Availability(True, "part of PyTorch, runs on every device"),
        "cpp": _cpp(),
        "triton": _triton(gpu),
        "cuda": _cuda(gpu),
    }


def _cpp() -> Availability:
    loaded = native.load()
    if loaded.library is None:
        return Availability(False, loaded.reason, native.CURE)
    threads = "OpenMP" if loaded.library.ffk_cpu_threaded() else "one thread, built without OpenMP"
    return Availability(True, f"{loaded.path} ({native.isa()}, {threads})")


def _cuda(device: torch.device | None) -> Availability:
    if device is None or not torch.cuda.is_available():
        return Availability(False, NO_GPU)
    if torch.version.cuda is None:
        return Availability(False, "this torch was not built for NVIDIA GPUs")
    loaded = native_cuda.load()
    if loaded.library is None:
        return Availability(False, loaded.reason, native_cuda.CURE)
    refused = native_cuda.usable(_index(device))
    if refused is not None:
        return Availability(
            False, refused, "update the driver; the kernels need compute capability 8.0 or later"
        )
    return Availability(True, str(loaded.path))


def _triton(device: torch.device | None) -> Availability:
    if device is not None and device.type == "cpu":
        if not interpreting():
            return Availability(False, "Triton kernels run on the CPU only with TRITON_INTERPRET=1 set")
    elif device is None or not torch.cuda.is_available():
        return Availability(False, NO_GPU)
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "triton is not installed", GET_TRITON)
    # A trial waits for the device, which nothing may do during a capture.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    refused = None if capturing else _triton_trial(device.type, _index(device))
    if refused is not None:
        return Availability(False, refused, "install a C compiler and a triton that suits this torch and GPU")
    return Availability(True, f"triton {importlib.import_module('triton').__version__}")


def interpreting() -> bool:
    """Whether Triton kernels are interpreted, which is slow and meant for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _index(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _triton_trial(kind: str, index: int) -> str | None:
    """None when a kernel compiles and runs there, else why not: better found out now than inside a stage."""
    device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
    try:
        from ffkernels.ops import triton_ops

        with torch.inference_mode(False):
            source = torch.arange(3, dtype=torch.float32, device=device)
            target = torch.full_like(source, -1)
            triton_ops.checkpoint_(make_plan([source], None, [target], chunk=GPU_CHUNK))
            triton_ops.prepare(device)
            return None if torch.equal(source, target) else "a Triton trial kernel gave a wrong result"
    except Exception as error:  # whatever a compiler, a driver or a mismatched package may raise
        return f"a Triton trial kernel failed: {type(error).__name__}: {str(error).strip()[:300]}"


def _check(impl: str, device: torch.device) -> Availability:
    if impl == "cpp":
        return _cpp()
    return _cuda(device) if impl == "cuda" else _triton(device)


def _allowed(impl: str, device: torch.device) -> None:
    """Refuse a named implementation on a kind of device that it is not for."""
    if impl == "cpp" and device.type != "cpu":
        raise ValueError(f"impl='cpp' runs on the CPU, the tensors are on {device}; use 'auto' or 'torch'")
    here = device.type == "cuda" or (impl == "triton" and device.type == "cpu" and interpreting())
    if impl in ("triton", "cuda") and not here:
        raise ValueError(
            f"impl={impl!r} runs on a GPU, the tensors are on {device}; move them with `.to('cuda')`, or use"
            " 'auto' or 'torch'"
        )


def resolve(impl: str, device: torch.device | str) -> tuple[str, str]:
    """The implementation that `impl` means on `device`, and why. A named one that cannot run is an error."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; allowed are {', '.join(map(repr, IMPLEMENTATIONS))}")
    device = torch.device(device)
    if impl == "torch":
        return "torch", "asked for"
    if impl != "auto":
        _allowed(impl, device)
        found = _check(impl, device)
        if not found.ok:
            cure = found.cure or "use 'auto'"
            raise RuntimeError(f"impl={impl!r} is not available: {found.reason}; {cure}")
        return impl, "asked for"
    refused = []
    for name in ORDER.get(device.type, ()):
        found = _check(name, device)
        if found.ok:
            first = f"fastest on {'the CPU' if device.type == 'cpu' else 'a GPU'}: {found.reason}"
            return name, "; ".join([f"{name} runs ({found.reason})", *refused]) if refused else first
        refused.append(found.reason + (f"; {found.cure}" if found.cure else ""))
    return "torch", "; ".join(dict.fromkeys(refused)) or f"there is no compiled kernel for {device.type}"


def choose(impl: str, device: torch.device) -> str:
    """`resolve`, and say so once where "auto" had to pass over something faster."""
    name, reason = resolve(impl, device)
    order = ORDER.get(device.type, ())
    if impl == "auto" and order and name != order[0]:
        ran = "plain torch ops" if name == "torch" else f"{name} kernels"
        announce_once(f"ops.{order[0]}", f"weight moves run as {ran}: {reason}")
    return name
