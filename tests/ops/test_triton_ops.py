"""The Triton kernels under Triton's interpreter, bit for bit against the torch reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ffkernels.ops import reference
from ffkernels.ops.align import Gradients
from ffkernels.ops.plan import GPU_CHUNK, chunk_rows, make_plan

pytest.importorskip("triton", reason="triton is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows: full ones, ends of tensors, single elements, nothing at all, and more than one piece of a masked row.
SIZES = [GPU_CHUNK, 5, 1, 0, 2 * GPU_CHUNK + 700, 513]
ACCEPT_AND_K = [(1, 1.0), (1, 0.0), (0, 0.0), (0, 3.0), (1, -0.0), (1, -0.3), (0, 1e-3)]


@pytest.fixture(scope="module")
def ops(interpreted):
    return interpreted("triton_ops")


class Sides:
    """W, Δ and best in poisoned memory; the last weight is full-sized but misaligned."""

    def __init__(self, dtypes, sizes=SIZES, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.memory, self.sides = [], ([], [], [])
        for dtype in dtypes:
            for size in (*sizes, -GPU_CHUNK):
                for side, tensors in enumerate(self.sides):
                    skip = 1 if size < 0 and side == 0 else 64
                    whole = torch.full((abs(size) + 128,), float("nan"), dtype=dtype)
                    view = whole[skip : skip + abs(size)]
                    view.copy_(torch.randn(abs(size), generator=random))
                    self.memory.append(whole)
                    tensors.append(view)
        self.weights, self.deltas, self.best = self.sides

    def clone(self):
        twin = object.__new__(Sides)
        twin.memory = [whole.clone() for whole in self.memory]
        index = {whole.untyped_storage().data_ptr(): i for i, whole in enumerate(self.memory)}
        twin.sides = tuple(
            [
                twin.memory[index[t.untyped_storage().data_ptr()]][t.storage_offset() :][: t.numel()]
                for t in side
            ]
            for side in self.sides
        )
        twin.weights, twin.deltas, twin.best = twin.sides
        return twin

    def plan(self, deltas=True):
        return make_plan(self.weights, self.deltas if deltas else None, self.best, chunk=GPU_CHUNK)

    def bits(self):
        return [w.view(torch.int32 if w.dtype == torch.float32 else torch.int16) for w in self.memory]


def assert_same_memory(one, other):
    """Every bit of every buffer, the poison around the tensors included."""
    for left, right in zip(one.bits(), other.bits(), strict=True):
        assert torch.equal(left, right)


def step(ops, sides, accept, k):
    plan = sides.plan()
    accept, k = torch.tensor([accept], dtype=torch.int32), torch.tensor([k], dtype=torch.float32)
    ops.step_(plan, sides.weights, sides.best, accept, k)
    return float(k)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAgainstTheReference:
    @pytest.mark.parametrize("accept, k", ACCEPT_AND_K)
    def test_step(self, ops, dtype, accept, k):
        sides = Sides([dtype])
        expected = sides.clone()
        k = step(ops, sides, accept, k)
        reference.step_(*expected.sides, bool(accept), k)
        assert_same_memory(sides, expected)

    def test_checkpoint(self, ops, dtype):
        sides = Sides([dtype])
        expected = sides.clone()
        ops.checkpoint_(sides.plan(deltas=False), sides.best)
        reference.checkpoint_(expected.weights, expected.best)
        assert_same_memory(sides, expected)

    def test_delta(self, ops, dtype):
        sides = Sides([dtype])
        expected = sides.clone()
        ops.delta_(sides.plan(), sides.deltas, sides.best)
        reference.delta_(*expected.sides)
        assert_same_memory(sides, expected)

    def test_a_k_of_zero_gives_base_whatever_stands_in_delta(self, ops, dtype):
        sides = Sides([dtype], sizes=[4])
        sides.weights[0].copy_(torch.tensor([-0.0, 1.0, float("nan"), float("inf")]))
        sides.deltas[0].copy_(torch.tensor([0.0, float("inf"), float("nan"), -1.0]))
        expected = sides.clone()
        step(ops, sides, 1, -0.0)
        expected.best[0].copy_(expected.weights[0])
        expected.best[1].copy_(expected.weights[1])
        assert_same_memory(sides, expected)

    def test_signs_of_zero_and_infinities_go_through_the_sum(self, ops, dtype):
        sides = Sides([dtype], sizes=[6])
        sides.weights[0].copy_(torch.tensor([-0.0, -0.0, 0.0, -0.0, 1.0, float("-inf")]))
        sides.deltas[0].copy_(torch.tensor([0.0, -0.0, -0.0, 0.0, float("inf"), 1.0]))
        expected = sides.clone()
        step(ops, sides, 0, 2.0)
        step(ops, sides, 1, 2.0)
        reference.step_(*expected.sides, False, 2.0)
        reference.step_(*expected.sides, True, 2.0)
        assert_same_memory(sides, expected)


def test_the_product_is_rounded_before_the_sum(ops):
    sides = Sides([torch.float32], sizes=[1])
    sides.weights[0].fill_(-1.0)
    sides.deltas[0].fill_(1.0 + 2.0**-7)
    step(ops, sides, 1, 1.0 + 2.0**-23)
    assert sides.weights[0].item() == 2.0**-7 + 2.0**-23  # an fma would keep the product's 2**-30


@pytest.mark.parametrize(
    "accept, k, loads, stores",
    [
        (1, 1.0, {"weights", "deltas"}, {"weights", "best"}),
        (0, 2.0, {"best", "deltas"}, {"weights"}),
        (1, 0.0, {"weights"}, {"best"}),
        (0, 0.0, {"best"}, {"weights"}),
    ],
)
def test_a_step_moves_no_more_than_it_must(ops, traffic, accept, k, loads, stores):
    sides = Sides([torch.float32])
    total = sum(weight.numel() for weight in sides.weights)
    step(ops, sides, accept, k)
    for name in ("weights", "deltas", "best"):
        tensors = getattr(sides, name)
        assert moved(traffic, "load", tensors) == (total if name in loads else 0), name
        assert moved(traffic, "store", tensors) == (total if name in stores else 0), name


def test_checkpoint_and_delta_move_no_more_than_they_must(ops, traffic):
    sides = Sides([torch.bfloat16])
    total = sum(weight.numel() for weight in sides.weights)
    ops.checkpoint_(sides.plan(deltas=False), sides.best)
    counts = [[moved(traffic, kind, side) for side in sides.sides] for kind in ("load", "store")]
    assert counts == [[total, 0, 0], [0, 0, total]]
    traffic.clear()
    ops.delta_(sides.plan(), sides.deltas, sides.best)
    counts = [[moved(traffic, kind, side) for side in sides.sides] for kind in ("load", "store")]
    assert counts == [[total, 0, total], [0, total, total]]


def test_an_alignment_moves_no_more_than_it_must(ops, traffic):
    """Δ stands for the gradients; those of another dtype take the narrow path, element by element."""
    sides, out = Sides([torch.float32]), torch.empty(3, dtype=torch.float64)
    plan, total = sides.plan(deltas=False), sum(weight.numel() for weight in sides.weights)
    plan.impl = "triton"
    plan.gradients = Gradients(plan)
    for grads in (sides.deltas, [delta.bfloat16() for delta in sides.deltas]):
        plan.gradients.find(None, sides.weights, grads)
        traffic.clear()
        ops.align_(plan, sides.best, out)
        tensors = (sides.weights, grads, sides.best)
        counts = [[moved(traffic, kind, side) for side in tensors] for kind in ("load", "store")]
        assert counts == [[total, total, total], [0, 0, total]]
        wide, narrow = sides.weights[0].data_ptr(), sides.weights[-1].data_ptr()
        sizes = [len(at) for start in (wide, narrow) for what, at, _ in traffic if start in at]
        assert sizes == [GPU_CHUNK if grads is sides.deltas else ops.PIECE.value, ops.PIECE.value]


def test_only_full_and_aligned_rows_take_the_wide_path(ops, traffic):
    sides = Sides([torch.float16])
    step(ops, sides, 1, 1.0)
    wide, narrow = sides.weights[0], sides.weights[-1]
    assert wide.numel() == narrow.numel() == GPU_CHUNK
    assert wide.data_ptr() % 16 == 0 and narrow.data_ptr() % 16 != 0
    sizes = {
        weight.data_ptr(): [len(at) for what, at, _ in traffic if what == "load" and start in at]
        for weight in (wide, narrow)
        for start in [weight.data_ptr()]
    }
    assert sizes == {wide.data_ptr(): [GPU_CHUNK], narrow.data_ptr(): [ops.PIECE.value]}


class Launches:
    """Stands for a kernel and records its launches."""

    def __init__(self):
        self.grids, self.dtypes = [], []

    def __getitem__(self, grid):
        def launch(*arguments, DTYPE, **options):
            self.grids.append(grid)
            self.dtypes.append(DTYPE)
            self.options = options

        return launch


def test_one_launch_for_each_dtype(ops, monkeypatch):
    import triton.language as tl

    launches = Launches()
    monkeypatch.setattr(ops, "_step_kernel", launches)
    sides = Sides(DTYPES)
    step(ops, sides, 1, 1.0)
    assert launches.dtypes == [tl.float32, tl.bfloat16, tl.float16]
    assert launches.grids == [(8,)] * 3
    assert launches.options["enable_fp_fusion"] is False


def test_ten_thousand_tensors_are_one_launch(ops, monkeypatch):
    launches = Launches()
    monkeypatch.setattr(ops, "_step_kernel", launches)
    arenas = [torch.zeros(10_000, 64) for _ in range(3)]
    weights, deltas, best = (list(arena.unbind()) for arena in arenas)
    ops.step_(make_plan(weights, deltas, best, chunk=GPU_CHUNK), weights, best, None, None)
    assert launches.grids == [(10_000,)]


def test_every_kernel_is_prepared_for_every_dtype_and_none_is_launched(ops, monkeypatch):
    launches = {name: Launches() for name in ("_checkpoint_kernel", "_delta_kernel", "_step_kernel")}
    for name, stand_in in launches.items():
        monkeypatch.setattr(ops, name, stand_in)
    ops.prepare(torch.device("cpu"))
    for stand_in in launches.values():
        assert stand_in.grids == [(0,)] * 3 and len(set(stand_in.dtypes)) == 3


def test_preparing_runs_no_program(ops, traffic):
    ops.prepare(torch.device("cpu"))
    assert traffic == []


def test_more_than_a_thousand_tensors(ops):
    arenas = [torch.randn(1_001, 4) for _ in range(3)]
    weights, deltas, best = (list(arena.unbind()) for arena in arenas)
    expected = arenas[0] + 2.0 * arenas[1]
    plan = make_plan(weights, deltas, best, chunk=GPU_CHUNK)
    ops.step_(plan, weights, best, torch.ones(1, dtype=torch.int32), torch.tensor([2.0]))
    assert torch.equal(arenas[0], expected)


def test_rows_longer_than_a_program_are_still_moved(ops):
    """A plan made for another device's chunk is slow, not wrong."""
    weight, best = torch.randn(5000), torch.zeros(5000)
    ops.checkpoint_(make_plan([weight], None, [best]), [best])
    assert torch.equal(best, weight)


def test_no_tensors_is_no_launch(ops):
    ops.checkpoint_(make_plan([], None, [], chunk=GPU_CHUNK), [])
    empty = torch.zeros(0, 8)
    plan = make_plan([empty], None, [torch.zeros(0, 8)], chunk=GPU_CHUNK)
    ops.checkpoint_(plan, [torch.zeros(0, 8)])


def test_rows_beyond_two_to_the_31_elements_keep_their_addresses():
    start, elements = 1 << 46, 3 * 2**31 + 11
    sides = [start, start + 2**40, start + 2**41]
    rows = chunk_rows(*([side] for side in sides), [elements], 4, GPU_CHUNK)
    assert len(rows) == elements // GPU_CHUNK + 1
    last = (elements // GPU_CHUNK) * GPU_CHUNK
    assert rows[-1].tolist() == [*(side + 4 * last for side in sides), elements - last]
    assert int(rows[:, 3].sum()) == elements


def test_writes_are_seen_by_autograd(ops):
    sides = Sides([torch.float32], sizes=[3])
    before = [[t._version for t in side] for side in sides.sides]
    step(ops, sides, 1, 1.0)
    ops.delta_(sides.plan(), sides.deltas, sides.best)
    ops.checkpoint_(sides.plan(deltas=False), sides.best)
    after = [[t._version for t in side] for side in sides.sides]
    assert [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(before, after, strict=True)] == [
        [1, 1],
        [1, 1],
        [3, 3],
    ]
