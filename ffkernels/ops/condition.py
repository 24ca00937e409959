"""How the condition of a CUDA WHILE node is set: three ways, each with less that could stand against it.

    inside    by the decision's own kernel: `condition.ll` is linked into the Triton kernels and calls
              cudaGraphSetConditional, a name that the assembler keeps open and the driver fills in when it
              loads the kernel, as with printf
    beside    by a kernel of a few lines of PTX, compiled by the driver and launched right after the decision:
              where a Triton build cannot link that call; one more node in the loop
    behind    by the same kernel as a node of the loop itself, behind the captured work: where a driver takes
              no condition from within a child graph, which captured work is

`graphs.probe` tries one after the other.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

INSIDE, BESIDE, BEHIND = WAYS = ("inside", "beside", "behind")

# void ffk_set_condition(cudaGraphConditionalHandle handle, const int *go), one thread.
PTX = """\
.version 7.0
.target sm_75
.address_size 64

.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);

.visible .entry ffk_set_condition(.param .u64 handle, .param .u64 go)
{
    .reg .b32 %value;
    .reg .b64 %handle, %go;

    ld.param.u64 %handle, [handle];
    ld.param.u64 %go, [go];
    cvta.to.global.u64 %go, %go;
    ld.global.b32 %value, [%go];
    {
        .param .b64 first;
        .param .b32 second;
        st.param.b64 [first], %handle;
        st.param.b32 [second], %value;
        call.uni cudaGraphSetConditional, (first, second);
    }
    ret;
}
"""

_ways: dict[int, str] = {}
_functions: dict[int, Any] = {}


def use(device: torch.device, way: str) -> None:
    """From now on conditions on `device` are set `INSIDE` the decision, `BESIDE` it or `BEHIND` it."""
    if way not in WAYS:
        raise ValueError(f"a condition is set {', '.join(map(repr, WAYS))} the decision, not {way!r}")
    _ways[device.index or 0] = way


def inside(device: torch.device) -> bool:
    """Whether the decision itself sets the condition. Interpreted kernels cannot."""
    return device.type == "cuda" and _ways.get(device.index or 0, INSIDE) == INSIDE


def behind(device: torch.device) -> bool:
    """Whether a node of the loop sets the condition, so that the decision has nothing to do with it."""
    return _ways.get(device.index or 0, INSIDE) == BEHIND


def signed(handle: int) -> int:
    """The 64 bits of a handle as the signed integer that Triton passes on."""
    return handle - (1 << 64) if handle >= 1 << 63 else handle


def _check(result: tuple, call: str) -> Any:
    if int(result[0]) != 0:
        raise RuntimeError(f"{call} failed: {getattr(result[0], 'name', result[0])}")
    return result[1] if len(result) > 1 else None


def load(device: torch.device) -> Any:
    """The kernel beside or behind, compiled and loaded; under capture this must not be the first time."""
    index = device.index or 0
    if index not in _functions:
        from cuda.bindings import driver

        with torch.cuda.device(device):
            torch.zeros(1, device=device)  # makes the device's context this thread's
            module = _check(driver.cuModuleLoadData(PTX.encode() + b"\0"), "cuModuleLoadData")
            _functions[index] = _check(
                driver.cuModuleGetFunction(module, b"ffk_set_condition"), "cuModuleGetFunction"
            )
    return _functions[index]


def arguments(handle: int, go: Tensor) -> tuple:
    """Those of the kernel, as cuda-bindings takes them: the node's condition becomes `go`, int32[1]."""
    return (handle, go.data_ptr()), (ctypes.c_uint64, ctypes.c_void_p)


def set_beside(handle: int, go: Tensor) -> None:
    """Launch the kernel on the current stream."""
    from cuda.bindings import driver

    function = load(go.device)
    stream = torch.cuda.current_stream(go.device).cuda_stream
    launched = driver.cuLaunchKernel(
        function, 1, 1, 1, 1, 1, 1, 0, driver.CUstream(stream), arguments(handle, go), 0
    )
    _check(launched, "cuLaunchKernel")
