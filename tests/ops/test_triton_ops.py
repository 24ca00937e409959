"""What Triton's kernels load and store, and how they are launched. What they compute: test_kernels."""

import numpy as np
import pytest
import torch

from ffkernels.ops.align import Gradients
from ffkernels.ops.plan import DTYPE_CODES, GPU_CHUNK, chunk_rows, make_plan

pytest.importorskip("triton", reason="triton is not installed")

SIZES = [GPU_CHUNK, 5, 1, 0, 2 * GPU_CHUNK + 700, 513]


@pytest.fixture(scope="module")
def ops(interpreted):
    return interpreted("triton_ops")


@pytest.fixture
def traffic(monkeypatch):
    """Records what interpreted kernels load and store, as (kind, addresses, itemsize)."""
    from triton.runtime import interpreter

    inner, seen = interpreter._interpreter, []

    class Spy:
        def load(self, pointers, mask, other, dtype):
            seen.append(("load", pointers[mask], np.dtype(dtype).itemsize))
            return inner.load(pointers, mask, other, dtype)

        def store(self, pointers, value, mask):
            seen.append(("store", pointers[mask], value.dtype.itemsize))
            return inner.store(pointers, value, mask)

        def __getattr__(self, name):
            return getattr(inner, name)

    monkeypatch.setattr(interpreter, "_interpreter", Spy())
    return seen


def moved(traffic, kind, tensors):
    """How many elements of `tensors` were loaded or stored."""
    ends = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel()]
    return sum(
        int(((addresses >= start) & (addresses < end)).sum())
        for what, addresses, _ in traffic
        for start, end in ends
        if what == kind
    )


def step(ops, sides, accept, k):
    ops.step_(sides.plan(), torch.tensor([accept], dtype=torch.int32), torch.tensor([k]))


def counted(traffic, sides):
    """What was loaded and what was stored of each side, as shares of its elements."""
    total = sum(tensor.numel() for tensor in sides[0])
    return [[moved(traffic, kind, side) / total for side in sides] for kind in ("load", "store")]


@pytest.mark.parametrize(
    "accept, k, loads, stores",
    [
        (1, 1.0, [1, 1, 0], [1, 0, 1]),
        (0, 2.0, [0, 1, 1], [1, 0, 0]),
        (1, 0.0, [1, 0, 0], [0, 0, 1]),
        (0, 0.0, [0, 0, 1], [1, 0, 0]),
    ],
)
def test_a_step_moves_no_more_than_it_must(ops, traffic, make_sides, accept, k, loads, stores):
    sides = make_sides(torch.float32, SIZES)
    step(ops, sides, accept, k)
    assert counted(traffic, sides.moved) == [loads, stores]


def test_checkpoint_and_delta_move_no_more_than_they_must(ops, traffic, make_sides):
    sides = make_sides(torch.bfloat16, SIZES)
    ops.checkpoint_(sides.plan(deltas=False))
    assert counted(traffic, sides.moved) == [[1, 0, 0], [0, 0, 1]]
    traffic.clear()
    ops.delta_(sides.plan())
    assert counted(traffic, sides.moved) == [[1, 0, 1], [0, 1, 1]]


def test_an_alignment_moves_no_more_than_it_must(ops, traffic, make_sides):
    """Gradients of another dtype take the narrow path, element by element."""
    for kind, piece in ((torch.float32, GPU_CHUNK), (torch.bfloat16, ops.PIECE.value)):
        sides, out = make_sides(torch.float32, SIZES, grad_dtype=kind), torch.empty(3, dtype=torch.float64)
        plan = sides.plan(deltas=False)
        plan.impl = "triton"
        plan.gradients = Gradients(plan)
        plan.gradients.find(None, sides.weights, sides.grads)
        traffic.clear()
        ops.align_(plan, out)
        tensors = (sides.weights, sides.grads, sides.best)
        assert counted(traffic, tensors) == [[1, 1, 1], [0, 0, 1]]
        assert [len(at) for _, at, _ in traffic if sides.weights[0].data_ptr() in at] == [piece]


@pytest.mark.parametrize("skips", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)])
def test_only_full_and_aligned_rows_take_the_wide_path(ops, traffic, make_sides, skips):
    sides = make_sides(torch.float16, [GPU_CHUNK], skips)
    step(ops, sides, 1, 1.0)
    start = sides.weights[0].data_ptr()
    (size,) = [len(at) for what, at, _ in traffic if what == "load" and start in at]
    assert size == (ops.PIECE.value if any(skips) else GPU_CHUNK)


class Launches:
    """Stands for a kernel and records its launches."""

    def __init__(self):
        self.grids, self.last, self.constants = [], [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.grids.append(grid)
            self.last.append(arguments[-1])
            self.constants.append(constants)

        return launch

    def of(self, name):
        return [constants[name] for constants in self.constants]


def test_one_launch_for_each_dtype(ops, monkeypatch):
    import triton.language as tl

    stepped, aligned = Launches(), Launches()
    monkeypatch.setattr(ops, "_step_kernel", stepped)
    monkeypatch.setattr(ops, "_align_kernel", aligned)
    kinds = list(DTYPE_CODES)
    weights, deltas, best = ([torch.ones(n, dtype=t) for t in kinds for n in SIZES] for _ in range(3))
    plan = make_plan(weights, deltas, best, chunk=GPU_CHUNK, dtypes=kinds)
    plan.impl = "triton"
    plan.gradients, accept = Gradients(plan), torch.ones(1, dtype=torch.int32)
    ops.align_(plan, torch.empty(3, dtype=torch.float64))
    assert aligned.of("DTYPE") == [tl.float32, tl.bfloat16, tl.float16, tl.float64]
    assert aligned.grids == [(7,)] * 4 and aligned.last == [1, 0, 0, 0], "the first begins the sums"
    assert aligned.of("CODE") == [0, 1, 2, 3]
    plan.groups.pop()  # float64 is for alignment alone
    ops.step_(plan, accept, torch.ones(1))
    assert stepped.of("DTYPE") == [tl.float32, tl.bfloat16, tl.float16] and stepped.grids == [(7,)] * 3
    assert not any(stepped.of("enable_fp_fusion") + aligned.of("enable_fp_fusion"))


def test_ten_thousand_tensors_are_one_launch(ops, monkeypatch):
    launches = Launches()
    monkeypatch.setattr(ops, "_step_kernel", launches)
    weights, deltas, best = (list(torch.zeros(10_000, 64).unbind()) for _ in range(3))
    ops.step_(make_plan(weights, deltas, best, chunk=GPU_CHUNK), None, None)
    assert launches.grids == [(10_000,)]


def test_every_kernel_is_prepared_for_every_dtype_and_none_is_launched(ops, monkeypatch):
    launches = {name: Launches() for name in ("_checkpoint_kernel", "_delta_kernel", "_step_kernel")}
    for name, stand_in in launches.items():
        monkeypatch.setattr(ops, name, stand_in)
    ops.prepare(torch.device("cpu"))
    for stand_in in launches.values():
        assert stand_in.grids == [(0,)] * 3 and len(set(stand_in.of("DTYPE"))) == 3


def test_preparing_runs_no_program(ops, traffic):
    ops.prepare(torch.device("cpu"))
    assert traffic == []


def test_rows_beyond_two_to_the_31_elements_keep_their_addresses():
    start, elements = 1 << 46, 3 * 2**31 + 11
    sides = [start, start + 2**40, start + 2**41]
    rows = chunk_rows(*([side] for side in sides), [elements], 4, GPU_CHUNK)
    assert len(rows) == elements // GPU_CHUNK + 1
    last = (elements // GPU_CHUNK) * GPU_CHUNK
    assert rows[-1].tolist() == [*(side + 4 * last for side in sides), elements - last]
    assert int(rows[:, 3].sum()) == elements
