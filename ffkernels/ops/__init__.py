"""Weight moves over many tensors at once: checkpoint, difference, the Fast Forward step, and alignment."""

from __future__ import annotations

from ffkernels.ops.align import align_
from ffkernels.ops.build import find_nvcc
from ffkernels.ops.dispatch import Availability, available, resolve
from ffkernels.ops.native import build_native
from ffkernels.ops.native_cuda import build_cuda
from ffkernels.ops.notices import FFKernelsNotice, announce_once
from ffkernels.ops.step import checkpoint_, delta_, delta_absmax, delta_absmax_on_device, step_
from ffkernels.ops.table import TensorTable

__all__ = [
    "Availability",
    "FFKernelsNotice",
    "TensorTable",
    "align_",
    "announce_once",
    "available",
    "build_cuda",
    "build_native",
    "checkpoint_",
    "delta_",
    "delta_absmax",
    "delta_absmax_on_device",
    "find_nvcc",
    "resolve",
    "step_",
]
