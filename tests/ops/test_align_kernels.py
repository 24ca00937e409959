"""The GPU kernels of alignment on the CPU: Triton's under its interpreter, CUDA's by the C++ compiler.

What this cannot show is speed, and in which order programs see each other's writes: tests/gpu does.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ffkernels.ops import native_cuda
from ffkernels.ops.align import SEGMENT, Gradients
from ffkernels.ops.native import NativeLibrary
from ffkernels.ops.plan import DTYPE_CODES, GPU_CHUNK, make_plan

ALL = tuple(DTYPE_CODES)
# A full row, less than a vector, a vector and a tail, nothing, around one row, several rows.
SIZES = [GPU_CHUNK, 3, 1, 9, 0, 513, GPU_CHUNK + 1, 2 * GPU_CHUNK + 700, GPU_CHUNK]
WITHOUT = 3  # of these the one that has no gradient
SKIPS = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 3, 3)]


def placed(tensors: list[torch.Tensor], skip: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Copies that begin `skip` elements off a boundary, and the memory before and behind each, all NaN."""
    views, around = [], []
    for tensor in tensors:
        memory = torch.full((tensor.numel() + 200,), math.nan, dtype=tensor.dtype)
        first = -memory.data_ptr() % 128 // tensor.element_size() + skip
        before, view, behind = memory.tensor_split([first, first + tensor.numel()])
        view.copy_(tensor)
        views.append(view)
        around += [before, behind]
    return views, around


def randoms(dtype, sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in sizes]


class Case:
    """Weights, gradients and best for a kernel, and what it may not touch."""

    def __init__(self, weights, grads, best, skips=(0, 0, 0)) -> None:
        given = [torch.zeros(0) if g is None else g for g in grads]
        sides = [placed(side, skip) for side, skip in zip((weights, given, best), skips, strict=True)]
        (self.weights, found, self.best), around = zip(*sides, strict=True)
        self.grads = [None if g is None else there for g, there in zip(grads, found, strict=True)]
        self.around = [part for parts in around for part in parts]
        self.before = [b.clone() for b in best]
        self.plan = make_plan(self.weights, None, self.best, chunk=GPU_CHUNK, dtypes=ALL)
        self.plan.impl = "cuda"  # or Triton, which shares all that is on the device
        self.plan.gradients = Gradients(self.plan)

    def run(self, kernels) -> torch.Tensor:
        """Align from the same state each time."""
        torch._foreach_copy_(self.best, self.before)
        weights = [w.clone() for w in self.weights]
        self.plan.gradients.find(None, self.weights, self.grads)
        out = torch.full((3,), math.nan, dtype=torch.float64)
        kernels(self.plan, self.best, out)
        assert all(part.isnan().all() for part in self.around), "written outside"
        for side in (self.weights, self.best):
            torch.testing.assert_close(side, weights, rtol=0, atol=0, equal_nan=True)
        assert not self.plan.gradients.tickets.any(), "ready for the next launch"
        return out


@pytest.fixture(scope="module")
def triton(interpreted):
    return interpreted("triton_ops").align_


@pytest.fixture
def cuda(cuda_on_host, monkeypatch):
    monkeypatch.setattr(native_cuda, "load", lambda: NativeLibrary(cuda_on_host, Path("on_host"), "loaded"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the CPU
    before = cuda_on_host.ffk_misaligned_accesses()
    yield native_cuda.align_
    assert cuda_on_host.ffk_misaligned_accesses() == before


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("skips", SKIPS, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_sums_and_checkpoint(kernels, dtype, skips, assert_sums):
    """Gradients of the same dtype, and of others where all is aligned and where nothing is; one missing."""
    for grad_dtype in (dtype, *(other for other in ALL if other != dtype and skips in SKIPS[::4])):
        grads = randoms(grad_dtype, seed=1)
        grads[WITHOUT] = None
        case = Case(randoms(dtype), grads, randoms(dtype, seed=2), skips)
        assert_sums(case.run(kernels), case.weights, case.grads, case.before)


def test_segments_and_dtypes_add_up(kernels, assert_sums):
    """More rows than are added up at a time, in several launches that share their scratch memory."""
    weights = [
        *randoms(torch.float32, [3, 4] * 66),
        *randoms(torch.bfloat16, [2, 3]),
        torch.randn(5).double(),
    ]
    grads, best = ([torch.randn_like(w) for w in weights] for _ in range(2))
    case = Case(weights, grads, best)
    assert [len(group.rows) for group in case.plan.groups] == [132, 2, 1] and SEGMENT == 128
    found = case.run(kernels)
    assert_sums(found, weights, grads, best)
    assert case.run(kernels).tolist() == found.tolist()


def test_more_segments_than_are_added_up_at_a_time(interpreted, assert_sums, monkeypatch):
    ops = interpreted("triton_ops")
    monkeypatch.setattr("ffkernels.ops.align.SEGMENT", 4)
    monkeypatch.setattr(ops, "SEGMENT", 4)
    weights, grads, best = (randoms(torch.float32, [3] * 23, seed) for seed in range(3))
    assert_sums(Case(weights, grads, best).run(ops.align_), weights, grads, best)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_whichever_block_is_last_the_bits_are_the_same(cuda, cuda_on_host, dtype):
    case = Case(randoms(dtype), randoms(dtype, seed=1), randoms(dtype, seed=2))
    found = []
    for last_first in (0, 1, 0):
        cuda_on_host.ffk_last_block_first(last_first)
        found.append(case.run(cuda).tolist())
    assert found[0] == found[1] == found[2]


def test_an_infinite_change_without_a_gradient(kernels):
    case = Case([torch.full((3000,), math.inf)], [None], [torch.zeros(3000)])
    assert case.run(kernels).tolist() == [0.0, 0.0, math.inf]


@pytest.mark.parametrize("weight, grad", list(itertools.product([2.0, math.nan, math.inf], repeat=2)))
def test_nan_and_infinities_come_out_as_they_are(kernels, weight, grad):
    weights, grads, best = ([torch.full((GPU_CHUNK + 5,), value)] for value in (2.0, 1.0, 1.0))
    for place in (7, GPU_CHUNK + 2):
        weights[0][place], grads[0][place] = weight, grad
    d = weights[0] - 1
    expected = [(grads[0] * d).sum().item(), (grads[0] ** 2).sum().item(), (d**2).sum().item()]
    assert str(Case(weights, grads, best).run(kernels).tolist()) == str(expected)


def test_writes_are_seen_by_autograd(kernels):
    case = Case([torch.ones(5)], [torch.ones(5)], [torch.ones(5)])
    out = torch.empty(3, dtype=torch.float64)
    case.plan.gradients.find(None, case.weights, case.grads)
    before = [t._version for t in (*case.weights, *case.grads, *case.best, out)]
    kernels(case.plan, case.best, out)
    after = [t._version for t in (*case.weights, *case.grads, *case.best, out)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 0, 1, 1]
    assert out.tolist() == [0.0, 5.0, 0.0]


class Launches:
    """Stands for a kernel and records its launches."""

    def __init__(self) -> None:
        self.grids, self.constants = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.grids.append((*grid, arguments[-1]))
            self.constants.append(constants)

        return launch


def test_one_launch_for_each_dtype(interpreted, monkeypatch):
    ops, launches = interpreted("triton_ops"), Launches()
    monkeypatch.setattr(ops, "_align_kernel", launches)
    weights, grads, best = ([t for dtype in ALL for t in randoms(dtype)] for _ in range(3))
    case = Case(weights, grads, best)
    case.plan.gradients.find(None, case.weights, case.grads)
    ops.align_(case.plan, case.best, torch.empty(3, dtype=torch.float64))
    rows = len(case.plan.groups[0].rows)
    assert launches.grids == [(rows, 1), (rows, 0), (rows, 0), (rows, 0)], "the first begins the sums"
    assert [constants["CODE"] for constants in launches.constants] == [0, 1, 2, 3]
    assert all(constants["enable_fp_fusion"] is False for constants in launches.constants)
