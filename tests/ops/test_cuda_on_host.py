"""The CUDA library, compiled by the C++ compiler and run on the CPU: tables it refuses, devices, errors.

Its threads do not talk to each other except in sums, so running them one by one is what a GPU computes; that
it is right is in test_kernels.
"""

import ctypes
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ffkernels.ops import native_cuda
from ffkernels.ops.native import Group, NativeLibrary, groups_of
from ffkernels.ops.plan import GPU_CHUNK

GPU = torch.device("cuda", 0)


@pytest.fixture
def library(cuda_on_host):
    return cuda_on_host


@pytest.fixture
def sides(make_sides):
    return make_sides(torch.float32, [1, 9, GPU_CHUNK, 4096 + 777])


def test_the_alignment_check_itself(library, sides):
    """Without it the tests of the kernels would pass on code that faults on a GPU."""
    plan = sides.plan()
    plan.groups[0].rows.add_(torch.tensor([2, 2, 2, 0]))  # not even a multiple of the element
    plan.groups[0].rows[:, 3] = 1
    before = library.ffk_misaligned_accesses()
    assert library.ffk_cuda_step(*groups_of(plan), None, None, 1, 0.5, None) == 0
    assert library.ffk_misaligned_accesses() > before


def test_zero_k_reads_no_delta(library, dtype, make_sides):
    sides = make_sides(dtype, [1, 9, GPU_CHUNK, 4096 + 777])
    plan = sides.plan()
    plan.groups[0].rows[:, 1] = 0  # reading Δ now would end the process
    assert library.ffk_cuda_step(*groups_of(plan), None, None, 0, 0.0, None) == 0
    assert all(map(torch.equal, sides.weights, sides.before[2]))


def test_an_empty_group(library, sides):
    groups, count = groups_of(sides.plan())
    groups[0].count = 0
    assert library.ffk_cuda_step(groups, count, None, None, 1, 0.0, None) == 0
    assert all(map(torch.equal, sides.best, sides.before[2]))


def test_bad_tables_are_refused_before_anything_is_written(library, sides):
    groups, _ = groups_of(sides.plan())
    both = (Group * 2)(groups[0], groups[0])
    both[1].dtype = 3
    assert library.ffk_cuda_step(both, 2, None, None, 1, 1.0, None) == -1
    assert b"dtype" in library.ffk_cuda_error_string(-1)
    both[1].dtype, both[1].count = 0, 2**31
    assert library.ffk_cuda_delta(both, ctypes.c_int64(2), None) == -2
    assert b"rows" in library.ffk_cuda_error_string(-2)
    for found, before in zip(sides.moved, sides.before, strict=True):
        assert all(map(torch.equal, found, before))


@pytest.mark.parametrize("move, arguments", [("checkpoint_", ()), ("step_", (True, 1.0))])
def test_a_refused_launch_names_its_device(on_host, sides, monkeypatch, move, arguments):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    plan = sides.plan()
    plan.device = GPU
    getattr(native_cuda, move)(plan, *arguments)
    plan.native.table[0].dtype = 9
    with pytest.raises(RuntimeError, match=r"launch on cuda:0 failed: a group has a dtype .* \(code -1\)"):
        getattr(native_cuda, move)(plan, *arguments)


class Devices:
    """torch's notion of the current device, and on which one each call of the library came."""

    def __init__(self, library, monkeypatch) -> None:
        self.current, self.entered, self.calls = 0, [], []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "current_stream", self.stream)
        noted = SimpleNamespace(ffk_cuda_error_string=library.ffk_cuda_error_string)
        for name in ("prepare", "checkpoint", "delta", "step", "align"):
            setattr(noted, f"ffk_cuda_{name}", self.noting(name, getattr(library, f"ffk_cuda_{name}")))
        monkeypatch.setattr(native_cuda, "load", lambda: NativeLibrary(noted, Path("on_host"), "loaded"))

    @contextmanager
    def device(self, index: int):
        self.entered.append(index)
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before

    def stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=100 + device.index)

    def noting(self, name: str, function):
        def call(*arguments):
            self.calls.append((name, self.current, arguments[-1] if arguments else None))
            return function(*arguments)

        return call


def test_a_move_is_launched_with_its_own_device_as_the_current_one(library, on_host, sides, monkeypatch):
    devices = Devices(library, monkeypatch)
    for index in (0, 1):
        plan = sides.plan()
        plan.device = torch.device("cuda", index)
        native_cuda.checkpoint_(plan)
        native_cuda.delta_(plan)
        native_cuda.step_(plan, True, 1.0)
        assert devices.calls == [(name, index, 100 + index) for name in ("checkpoint", "delta", "step")]
        assert devices.entered == [index] * 3 * index, "nothing is switched where that device is current"
        devices.calls.clear()
    plan.native.table[0].dtype = 9
    with pytest.raises(RuntimeError, match="launch on cuda:1 failed"):
        native_cuda.checkpoint_(plan)
    assert devices.current == 0


def test_kernels_are_loaded_on_the_device_that_is_asked_about(library, on_host, monkeypatch):
    devices = Devices(library, monkeypatch)
    for index in (0, 1):
        assert native_cuda.usable.__wrapped__(index) is None
    assert (devices.calls, devices.entered) == ([("prepare", 0, None), ("prepare", 1, None)], [1])


def test_an_error_is_told_once_and_left_to_no_later_call(library, sides):
    for call in (
        library.ffk_cuda_prepare,
        lambda: library.ffk_cuda_step(*groups_of(sides.plan()), None, None, 1, 1.0, None),
    ):
        library.ffk_fail()
        assert call() == 209
        assert library.ffk_pending_error() == 0 and call() == 0
