"""How a kernel sets the condition of a CUDA WHILE node: from inside the decision, or by a kernel beside it.

Inside is the rule: `condition.ll` is linked into the Triton kernels and calls cudaGraphSetConditional, a
name that the assembler keeps open and the driver fills in when it loads the kernel, as with printf. Beside
is the way out where a Triton build cannot do that: a kernel of a few lines of PTX, compiled by the driver,
launched after the decision at the price of one more node in the loop. `engine.graphs.probe` tries the one,
then the other.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

INSIDE, BESIDE = "inside", "beside"

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
    """From now on conditions on `device` are set `INSIDE` the decision or `BESIDE` it."""
    if way not in (INSIDE, BESIDE):
        raise ValueError(f"a condition is set {INSIDE!r} the decision or {BESIDE!r} it, not {way!r}")
    _ways[device.index or 0] = way


def inside(device: torch.device) -> bool:
    """Whether the decision itself sets the condition. Interpreted kernels cannot."""
    return device.type == "cuda" and _ways.get(device.index or 0, INSIDE) == INSIDE


def signed(handle: int) -> int:
    """The 64 bits of a handle as the signed integer that Triton passes on."""
    return handle - (1 << 64) if handle >= 1 << 63 else handle


def _check(result: tuple, call: str) -> Any:
    if int(result[0]) != 0:
        raise RuntimeError(f"{call} failed: {getattr(result[0], 'name', result[0])}")
    return result[1] if len(result) > 1 else None


def load(device: torch.device) -> None:
    """Compile and load the kernel beside, which must not happen for the first time under capture."""
    index = device.index or 0
    if index in _functions:
        return
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context
        module = _check(driver.cuModuleLoadData(PTX.encode() + b"\0"), "cuModuleLoadData")
        _functions[index] = _check(
            driver.cuModuleGetFunction(module, b"ffk_set_condition"), "cuModuleGetFunction"
        )


def set_beside(handle: int, go: Tensor) -> None:
    """Launch the kernel beside on the current stream: the node's condition becomes `go`, int32[1]."""
    from cuda.bindings import driver

    load(go.device)
    stream = torch.cuda.current_stream(go.device).cuda_stream
    arguments = ((handle, go.data_ptr()), (ctypes.c_uint64, ctypes.c_void_p))
    launched = driver.cuLaunchKernel(
        _functions[go.device.index or 0], 1, 1, 1, 1, 1, 1, 0, driver.CUstream(stream), arguments, 0
    )
    _check(launched, "cuLaunchKernel")
