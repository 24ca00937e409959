"""csrc/step_cuda.cu compiled by the C++ compiler and run on the CPU, bit for bit against the torch reference.

Its threads do not talk to each other, so running them one by one is what a GPU computes. What this cannot
show is speed, the real conversions of a GPU, and the launch itself: tests/gpu does.
"""

from __future__ import annotations

import ctypes
import itertools
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ffkernels.ops import native_cuda, reference
from ffkernels.ops.native import Group, NativeLibrary, groups_of
from ffkernels.ops.plan import GPU_CHUNK, make_plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# One element, less than a vector, a vector and a tail, around one chunk, many chunks.
SIZES = [1, 3, 4, 9, 127, 2047, 2048, 2049, 6144, 4096 + 777]


@pytest.fixture(scope="module")
def library(cuda_on_host) -> ctypes.CDLL:
    return cuda_on_host


class Guarded:
    """Tensors inside one buffer, NaN between them: a write outside of a tensor shows."""

    def __init__(self, values: list[torch.Tensor], skip: int) -> None:
        step = 128 // values[0].element_size()
        starts, end = [], step
        for value in values:
            starts.append(end + skip)
            end = -(-(end + skip + value.numel() + 1) // step) * step
        memory = torch.full((end + 2 * step,), float("nan"), dtype=values[0].dtype)
        shift = (-memory.data_ptr() % 128) // memory.element_size()
        self.memory = memory
        self.inside = torch.zeros(len(memory), dtype=torch.bool)
        self.tensors = []
        for value, start in zip(values, starts, strict=True):
            part = slice(shift + start, shift + start + value.numel())
            memory[part] = value
            self.inside[part] = True
            self.tensors.append(memory[part])

    def unharmed(self) -> bool:
        return bool(self.memory[~self.inside].isnan().all())


def make_set(dtype: torch.dtype, skips: tuple[int, int, int]) -> list[Guarded]:
    generator = torch.Generator().manual_seed(len(SIZES))
    sides = []
    for skip in skips:
        values = [torch.randn(n, generator=generator).to(dtype) for n in SIZES]
        sides.append(Guarded(values, skip))
    return sides


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same(got: list[Guarded], want: list[list[torch.Tensor]]) -> None:
    for side, tensors in zip(got, want, strict=True):
        assert side.unharmed()
        for i, (tensor, other) in enumerate(zip(side.tensors, tensors, strict=True)):
            assert torch.equal(bits(tensor), bits(other)), f"tensor {i} of {SIZES[i]} elements"


def copies(sides: list[Guarded]) -> list[list[torch.Tensor]]:
    return [[tensor.clone() for tensor in side.tensors] for side in sides]


def plan_of(sides: list[Guarded]):
    weights, deltas, best = (side.tensors for side in sides)
    return make_plan(weights, deltas, best, chunk=GPU_CHUNK)


@pytest.mark.parametrize("skips", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_step(library, dtype, skips):
    before = library.ffk_misaligned_accesses()
    for accept, k, on_device in itertools.product((0, 1), (0.0, 1.0, -3.0, 0.3), (False, True)):
        sides = make_set(dtype, skips)
        want = copies(sides)
        reference.step_(*want, bool(accept), ctypes.c_float(k).value)
        flag, factor = torch.tensor([accept], dtype=torch.int32), torch.tensor([k])
        at = (flag.data_ptr(), factor.data_ptr(), 1 - accept, 7.0) if on_device else (None, None, accept, k)
        assert library.ffk_cuda_step(*groups_of(plan_of(sides)), *at, None) == 0
        assert_same(sides, want)
    assert library.ffk_misaligned_accesses() == before


@pytest.mark.parametrize("skips", [(0, 0, 0), (1, 0, 0), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_delta_and_checkpoint(library, dtype, skips):
    before = library.ffk_misaligned_accesses()
    sides = make_set(dtype, skips)
    want = copies(sides)
    reference.delta_(*want)
    assert library.ffk_cuda_delta(*groups_of(plan_of(sides)), None) == 0
    assert_same(sides, want)

    weights, _, best = sides
    best.tensors[0].zero_()
    plan = make_plan(weights.tensors, None, best.tensors, chunk=GPU_CHUNK)
    assert library.ffk_cuda_checkpoint(*groups_of(plan), None) == 0
    assert_same([weights, best], [want[0], want[0]])
    assert library.ffk_misaligned_accesses() == before


def test_the_alignment_check_itself(library):
    """Without it the two tests above would pass on code that faults on a GPU."""
    sides = make_set(torch.float32, (0, 0, 0))
    plan = plan_of(sides)
    plan.groups[0].rows.add_(torch.tensor([2, 2, 2, 0]))  # not even a multiple of the element
    plan.groups[0].rows[:, 3] = 1
    before = library.ffk_misaligned_accesses()
    assert library.ffk_cuda_step(*groups_of(plan), None, None, 1, 0.5, None) == 0
    assert library.ffk_misaligned_accesses() > before


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_zero_k_copies_bits_and_reads_no_delta(library, dtype):
    """-0.0, infinities and NaN of Δ must not reach W, and a signalling NaN of best survives."""
    sides = make_set(dtype, (0, 0, 0))
    plan = plan_of(sides)
    for delta in sides[1].tensors:
        delta.fill_(float("inf"))
    sides[2].tensors[4][:3] = torch.tensor([-0.0, float("inf"), float("nan")]).to(dtype)
    bits(sides[2].tensors[4])[3] = 0x7F800001 if dtype == torch.float32 else 0x7F81
    plan.groups[0].rows[:, 1] = 0  # reading Δ now would end the process
    want = copies(sides)
    assert library.ffk_cuda_step(*groups_of(plan), None, None, 0, 0.0, None) == 0
    assert_same(sides, [want[2], want[1], want[2]])


def test_a_refused_step_leaves_best_alone(library):
    sides = make_set(torch.float32, (0, 0, 0))
    want = copies(sides)
    assert library.ffk_cuda_step(*groups_of(plan_of(sides)), None, None, 0, 1.0, None) == 0
    assert_same([sides[2]], [want[2]])


def test_several_dtypes_and_an_empty_group(library):
    small = [make_set(dtype, (0, 1, 0)) for dtype in DTYPES.values()]
    merged = [[t for sides in small for t in sides[i].tensors] for i in range(3)]
    want = [[t.clone() for t in side] for side in merged]
    plan = make_plan(*merged, chunk=GPU_CHUNK)
    assert [group.dtype for group in plan.groups] == list(DTYPES.values())
    reference.step_(*want, True, 0.5)
    groups, count = groups_of(plan)
    assert library.ffk_cuda_step(groups, count, None, None, 1, 0.5, None) == 0
    for got, expected in zip(merged, want, strict=True):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, expected, strict=True))
    groups[1].count = 0
    assert library.ffk_cuda_step(groups, count, None, None, 1, 0.0, None) == 0


def test_bad_tables_are_refused_before_anything_is_written(library):
    sides = make_set(torch.float32, (0, 0, 0))
    want = copies(sides)
    groups, _ = groups_of(plan_of(sides))
    both = (Group * 2)(groups[0], groups[0])
    both[1].dtype = 3
    assert library.ffk_cuda_step(both, 2, None, None, 1, 1.0, None) == -1
    assert b"dtype" in library.ffk_cuda_error_string(-1)
    both[1].dtype, both[1].count = 0, 2**31
    assert library.ffk_cuda_delta(both, ctypes.c_int64(2), None) == -2
    assert b"rows" in library.ffk_cuda_error_string(-2)
    assert_same(sides, want)


@pytest.fixture
def on_host(library, monkeypatch):
    """native_cuda with this library in the place of the real one, and no GPU's stream to ask for."""
    for name in ("ffk_cuda_checkpoint", "ffk_cuda_delta"):
        arguments = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        monkeypatch.setattr(getattr(library, name), "argtypes", arguments)
    monkeypatch.setattr(native_cuda, "load", lambda: NativeLibrary(library, Path("on_host"), "loaded"))
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    plans = []

    def plan(weights, deltas, best, index=0):
        made = make_plan(weights, deltas, best, chunk=GPU_CHUNK)
        made.device = torch.device("cuda", index)
        plans.append(made)
        return made

    return plan


def test_the_python_side_from_end_to_end(on_host):
    """A plan, its binding to the library, scalars by value and by address, errors by name."""
    weights, deltas, best = ([torch.randn(n) for n in SIZES] for _ in range(3))
    want = [[t.clone() for t in side] for side in (weights, deltas, best)]
    plan = on_host(weights, deltas, best)
    for accept, k in [(True, 0.5), (False, 2.0), (True, 0.0), (False, 0.0)]:
        native_cuda.step_(plan, weights, best, accept, k)
        reference.step_(*want, accept, k)
        native_cuda.step_(plan, weights, best, torch.tensor([accept], dtype=torch.int32), torch.tensor([k]))
        reference.step_(*want, accept, k)
    native_cuda.delta_(plan, deltas, best)
    reference.delta_(*want)
    native_cuda.checkpoint_(on_host(weights, None, best), best)
    for got, expected in zip((weights, deltas, best), want, strict=True):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, expected, strict=True))
    plan.native.table[0].dtype = 9
    with pytest.raises(RuntimeError, match=r"launch on cuda:0 failed: a group has a dtype .* \(code -1\)"):
        native_cuda.checkpoint_(plan, best)


def test_versions_move_on_by_what_the_host_knows(on_host):
    """With device scalars both W and best count as written."""
    flag, factor = torch.ones(1, dtype=torch.int32), torch.ones(1)
    for accept, k, written in (
        (True, 1.0, (1, 0, 1)),
        (True, 0.0, (0, 0, 1)),
        (False, 0.0, (1, 0, 0)),
        (False, 2.0, (1, 0, 0)),
        (flag, 0.0, (1, 0, 1)),
        (False, factor, (1, 0, 0)),
        (flag, factor, (1, 0, 1)),
    ):
        sides = [[torch.zeros(2)] for _ in range(3)]
        native_cuda.step_(on_host(*sides), sides[0], sides[2], accept, k)
        assert tuple(side[0]._version for side in sides) == written, (accept, k)


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


def test_a_move_is_launched_with_its_own_device_as_the_current_one(library, on_host, monkeypatch):
    devices = Devices(library, monkeypatch)
    for index in (0, 1):
        sides = [[torch.ones(3)] for _ in range(3)]
        plan = on_host(*sides, index=index)
        native_cuda.checkpoint_(plan, sides[2])
        native_cuda.delta_(plan, sides[1], sides[2])
        native_cuda.step_(plan, sides[0], sides[2], True, 1.0)
        assert devices.calls == [(name, index, 100 + index) for name in ("checkpoint", "delta", "step")]
        assert devices.entered == [index] * 3 * index, "nothing is switched where that device is current"
        devices.calls.clear()
    plan.native.table[0].dtype = 9
    with pytest.raises(RuntimeError, match="launch on cuda:1 failed"):
        native_cuda.checkpoint_(plan, sides[2])
    assert devices.current == 0


def test_kernels_are_loaded_on_the_device_that_is_asked_about(library, on_host, monkeypatch):
    devices = Devices(library, monkeypatch)
    for index in (0, 1):
        assert native_cuda.usable.__wrapped__(index) is None
    assert (devices.calls, devices.entered) == ([("prepare", 0, None), ("prepare", 1, None)], [1])


def test_an_error_is_told_once_and_left_to_no_later_call(library):
    sides = make_set(torch.float32, (0, 0, 0))
    for call in (
        library.ffk_cuda_prepare,
        lambda: library.ffk_cuda_step(*groups_of(plan_of(sides)), None, None, 1, 1.0, None),
    ):
        library.ffk_fail()
        assert call() == 209
        assert library.ffk_pending_error() == 0 and call() == 0
