"""Where the GPU tests run: on the GPU, or with FFK_DRY=1 on the CPU, to see that the tests are right."""

from __future__ import annotations

import os

import pytest
import torch

from ffkernels import ops

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
