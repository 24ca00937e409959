"""Where the GPU tests run: on the GPU, or with FFK_DRY=1 on the CPU, to see that the tests are right."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from ffkernels import ops
from ffkernels.graphs import core as graphs

DRY = os.environ.get("FFK_DRY") == "1"
GPU_IMPLS = ("cuda", "triton", "torch")
DRY_IMPLS = ("cpp", "torch")


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available() and not DRY:
        return torch.device("cuda", torch.cuda.current_device())
    if DRY:
        return torch.device("cpu")
    pytest.skip("needs a CUDA device (FFK_DRY=1 runs what can be run on the CPU)")


@pytest.fixture(scope="session")
def gpu(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("this one needs a real CUDA device")
    return device


@pytest.fixture
def place(request, device, monkeypatch):
    """The device, with a stand-in for CUDA's graphs where it is the CPU."""
    if device.type == "cpu":
        name = "ffkernels_fake_cuda"
        path = Path(__file__).parents[1] / "graphs" / "fake_cuda.py"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        fake = sys.modules[name]
        fake.FakeCuda.install(monkeypatch)
        monkeypatch.setattr(fake.Graph, "run", torch.no_grad()(fake.Graph.run))
    # This is the place to find out; but where there are no loops, the step graph is still worth testing.
    named = getattr(request.node, "callspec", None)
    only_steps = named is not None and named.params.get("name") == "step_graph"
    why_not = graphs.why_no_step_graph if only_steps else graphs.why_no_stage_graph
    assert why_not(device) is None
    return device


def pytest_generate_tests(metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", DRY_IMPLS if DRY else GPU_IMPLS)
    if "kernels" in metafunc.fixturenames:
        metafunc.parametrize("kernels", DRY_IMPLS[:1] if DRY else GPU_IMPLS[:2])


@pytest.fixture(autouse=True)
def _available(request, device) -> None:
    """On a GPU a missing kernel is a failure, not a skip: this is the place to find out."""
    for name in ("impl", "kernels"):
        if name in request.fixturenames:
            chosen = request.getfixturevalue(name)
            if DRY:
                found = ops.available()[chosen]
                if not found.ok:
                    pytest.skip(f"{chosen}: {found.reason}")
            else:
                assert ops.resolve(chosen, device)[0] == chosen
