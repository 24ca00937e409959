"""The kernel that sets a condition beside or behind a decision, up to the driver."""

import ctypes
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ffkernels.ops import condition

GPUS = [torch.device("cuda", index) for index in range(2)]


@pytest.fixture
def driver(monkeypatch):
    """cuda.bindings.driver as far as it is called; `refused` is what its next call says."""
    calls: list[tuple] = []
    state = SimpleNamespace(calls=calls, refused=None)

    def answering(name, *values):
        def call(*arguments):
            calls.append((name, *arguments))
            if state.refused:
                return (state.refused,)
            return 0, *(value(*arguments) if callable(value) else value for value in values)

        return call

    module = ModuleType("cuda.bindings.driver")
    module.CUstream = lambda stream: ("stream", stream)
    module.cuModuleLoadData = answering("load", "module")
    module.cuModuleGetFunction = answering("find", lambda *_: f"function {len(calls)}")
    module.cuLaunchKernel = answering("launch")
    package, parent = ModuleType("cuda"), ModuleType("cuda.bindings")
    package.bindings, parent.driver = parent, module
    for made in (package, parent, module):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(condition, "_functions", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: calls.append(("on", device)) or nullcontext())
    monkeypatch.setattr(torch, "zeros", lambda *size, device: calls.append(("touch", device)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=99))
    return state


def test_the_kernel_is_compiled_once_per_device_in_its_context(driver):
    first, second = (condition.load(gpu) for gpu in GPUS)
    assert first != second and [condition.load(gpu) for gpu in GPUS] == [first, second]
    ptx = condition.PTX.encode() + b"\0"
    each = [("load", ptx), ("find", "module", b"ffk_set_condition")]
    assert driver.calls == [call for gpu in GPUS for call in [("on", gpu), ("touch", gpu), *each]]


def test_it_is_launched_in_one_thread_with_the_handle_and_where_go_lies(driver):
    go = SimpleNamespace(device=GPUS[0], data_ptr=lambda: 4096)
    condition.set_beside(1 << 63, go)
    arguments = ((1 << 63, 4096), (ctypes.c_uint64, ctypes.c_void_p))
    assert condition.arguments(1 << 63, go) == arguments
    function = condition.load(GPUS[0])
    assert driver.calls[-1] == ("launch", function, *[1] * 6, 0, ("stream", 99), arguments, 0)


def test_a_refusal_names_the_call_and_is_not_kept(driver):
    driver.refused = 201
    with pytest.raises(RuntimeError, match="cuModuleLoadData failed: 201"):
        condition.load(GPUS[0])
    driver.refused = None
    assert condition.load(GPUS[0]).startswith("function")
