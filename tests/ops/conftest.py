"""What the kernel tests share: kernel modules as Triton's compiler or its interpreter takes them."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch


def _load(name: str, interpret: bool) -> ModuleType:
    """A copy of its own of `ffkernels.ops.name`: Triton chooses when a kernel is defined."""
    spec = importlib.util.find_spec(f"ffkernels.ops.{name}")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled():
    """Loads a kernel module for the compiler, whatever the environment says."""
    pytest.importorskip("triton", reason="triton is not installed")
    return lambda name: _load(name, interpret=False)


@pytest.fixture(scope="session")
def interpreted():
    """Loads a kernel module for the interpreter, in which bfloat16 rounds as on a GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(values, source, target, mode):  # the interpreter's own truncates to bfloat16
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(values.astype(np.float32).reshape(-1)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        return convert(values, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", exact)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are part of the tests
            yield lambda name: _load(name, interpret=True)
