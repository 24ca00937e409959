"""What the tests of the weight moves share: implementations, dtypes, threads, and comparison bit by bit."""

from __future__ import annotations

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
