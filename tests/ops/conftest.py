"""What the tests of the weight moves share: implementations, kernel modules, dtypes, bitwise comparison."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from ffkernels import ops
from ffkernels.ops import native
from ffkernels.ops.table import DTYPES

INTEGERS = {4: torch.int32, 2: torch.int16}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits, with every NaN made the same: the payload of a computed NaN is nobody's promise."""
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).clone()
    bits[tensor.detach().isnan()] = -1
    return bits


@pytest.fixture
def assert_same_bits():
    def check(found, expected):
        assert len(found) == len(expected)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape
            differing = int((_bits(a) != _bits(b)).sum())
            assert differing == 0, f"tensor {i} ({a.dtype}, {tuple(a.shape)}): {differing} elements differ"

    return check


@pytest.fixture
def cpp():
    """The name "cpp", where the library is there to be tested."""
    found = ops.available()["cpp"]
    if not found.ok:
        pytest.skip(found.reason)
    return "cpp"


@pytest.fixture(params=["torch", "cpp"])
def impl(request):
    if request.param == "cpp":
        request.getfixturevalue("cpp")
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def isa_restored():
    library = native.load().library
    before = library.ffk_cpu_isa(-1) if library is not None else -1
    yield
    if library is not None:
        library.ffk_cpu_isa(before)


@pytest.fixture
def fresh_native(monkeypatch):
    """The library is looked for anew inside the test, and again after it; notices start afresh."""
    monkeypatch.setattr("ffkernels.ops.notices._announced", set())
    native.load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native.load.cache_clear()


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
