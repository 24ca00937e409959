"""Weights that are not contiguous are moved in the order of their memory, in all implementations alike."""

import math

import pytest
import torch

from ffkernels import ops
from ffkernels.ops import reference
from ffkernels.ops.plan import DTYPE_CODES, GPU_CHUNK, lie_alike, make_plan, pieces, runs

# Views of the memory they are given; some of more than a row of a plan, some with gaps.
LAYOUTS = {
    "contiguous": lambda new: new(3, 5),
    "transposed": lambda new: new(70, 50).t(),
    "permuted": lambda new: new(4, 5, 600).permute(2, 0, 1),
    "channels_last": lambda new: new(8, 5, 6, 3).permute(0, 3, 1, 2),
    "channels_last_3d": lambda new: new(2, 3, 2, 5, 4).permute(0, 4, 1, 2, 3),
    "columns": lambda new: new(40, 96)[:, 7:75],
    "columns, transposed": lambda new: new(9, 2500)[:, 5:2400].t(),
    "the columns beside them": lambda new: new(40, 96)[:, 75:],
    "two kinds of gaps": lambda new: new(6, 7, 64)[:, :5, 3:33],
    "strides of ones": lambda new: new(90).as_strided((1, 30, 1), (7, 1, 999)),
    "one number": lambda new: new(1, 1).t(),
    "nothing": lambda new: new(0, 4).t(),
}


class Sides:
    """W, Δ, best and gradients of every layout, NaN around them; and the same as contiguous tensors."""

    def __init__(self, dtype, grad_dtype=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.memory, self.sides = [], []
        for kind in (dtype, dtype, dtype, grad_dtype or dtype):
            self.sides.append([self.view(make, kind, generator) for make in LAYOUTS.values()])
        self.weights, self.deltas, self.best, self.grads = self.sides
        self.plain = [
            [tensor.clone(memory_format=torch.contiguous_format) for tensor in s] for s in self.sides
        ]

    def view(self, make, dtype, generator):
        def new(*shape):
            self.memory.append(torch.full(shape, math.nan, dtype=dtype))
            return self.memory[-1]

        view = make(new)
        return view.copy_(torch.randn(view.shape, generator=generator))

    def gaps(self):
        return sum(int(memory.isnan().sum()) for memory in self.memory)

    def plan(self, deltas=True, **given):
        return make_plan(self.weights, self.deltas if deltas else None, self.best, chunk=GPU_CHUNK, **given)


def test_steps_and_differences(kernels, dtype, assert_same_bits):
    for accept, k in [(True, 1.0), (False, 0.37), (True, -2.5), (False, 0.0)]:
        sides = Sides(dtype)
        gaps = sides.gaps()
        kernels.step(sides.plan(), sides.sides[:3], accept, k)
        reference.step_(*sides.plain[:3], accept, float(torch.tensor(k)))
        kernels.delta(sides.plan(), sides.sides[:3])
        reference.delta_(*sides.plain[:3])
        for found, expected in zip(sides.sides, sides.plain, strict=True):
            assert_same_bits(found, expected)
        assert sides.gaps() == gaps > 1000, "nothing was written between"


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_alignment(kernels, dtype, grad_dtype, assert_sums):
    """Gradients that are contiguous, that lie as their weights and that lie as neither: the same sums."""
    found = []
    for form in range(3):
        sides = Sides(dtype, grad_dtype)
        weights, _, best, grads = sides.plain
        plan = sides.plan(deltas=False, dtypes=tuple(DTYPE_CODES))
        turned = [g.permute(*range(g.ndim)[::-1]).contiguous().permute(*range(g.ndim)[::-1]) for g in grads]
        given = [grads, sides.grads, turned][form]
        given = [None if i == 3 else g for i, g in enumerate(given)]
        out = kernels.align(plan, sides.weights, given, sides.best)
        ready = plan.gradients.find(None, sides.weights, given)
        assert all(g is None or lie_alike(g, w) for g, w in zip(ready, sides.weights, strict=True))
        assert_sums(out, weights, given, best)
        for side in (sides.weights, sides.best):
            torch.testing.assert_close(side, weights, rtol=0, atol=0)
        found.append(out.tolist())
    assert found[0] == found[1] == found[2]


def test_cpp_and_torch_add_up_in_one_order(cpp):
    found = []
    for impl in ("cpp", "torch"):
        sides = Sides(torch.float32)
        found.append(ops.align_(sides.weights, sides.grads, sides.best, impl=impl).tolist())
    assert found[0] == found[1]


def test_a_table_of_such_weights(impl, dtype, assert_same_bits):
    """What it makes lies as the weights do, and what its stages do is what they do to contiguous weights."""
    sides = Sides(dtype)
    tables = [ops.TensorTable(weights, impl=impl) for weights in (sides.weights, sides.plain[0])]
    odd, plain = tables
    for twin in (*odd.deltas, *odd.best):
        assert twin.data_ptr() % 128 == 0 or not twin.numel()
    for weight, delta, best in zip(odd.weights, odd.deltas, odd.best, strict=True):
        assert weight.stride() == delta.stride() == best.stride()
        assert torch.equal(best, weight) and not delta.any()
    absmax = []
    for table in tables:
        for i, weight in enumerate(table.weights):
            weight.mul_(1.01 + 0.01 * i)
        ops.delta_(table)
        absmax.append(ops.delta_absmax(table))
        ops.step_(table, True, 3)
        ops.step_(table, False, 2)
    assert absmax[0] == absmax[1] > 0
    for side in ("weights", "deltas", "best"):
        assert_same_bits(getattr(odd, side), getattr(plain, side))


def test_parameters_that_share_a_matrix_column_by_column(impl):
    """q, k and v of one fused projection: their memory is interleaved, and none of it is shared."""
    fused = torch.arange(60.0).reshape(5, 12)
    table = ops.TensorTable(dict(zip("qkv", fused.split(4, 1), strict=True)), impl=impl)
    for delta, value in zip(table.deltas, (1.0, 10.0, 100.0), strict=True):
        delta.fill_(value)
    ops.step_(table, True, 2)
    expected = torch.arange(60.0).reshape(5, 12)
    expected += torch.tensor([2.0] * 4 + [20.0] * 4 + [200.0] * 4)
    assert torch.equal(fused, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_runs_hold_every_element_once(name):
    memory = []
    view = LAYOUTS[name](lambda *shape: memory.append(torch.zeros(shape)) or memory[-1])
    length, starts = runs(view)
    assert length * len(starts) == view.numel() and starts == sorted(starts)
    for piece in pieces(view):
        piece.add_(1.0)
    assert bool((view == 1).all()) and int((memory[0] == 1).sum()) == view.numel()


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(5).expand(3, 5), "elements of it share memory"),
        (torch.ones(9).as_strided((4, 3), (2, 1)), "elements of it share memory"),
        (torch.ones(9).as_strided((3, 2), (2, 3)), "or lie between others"),
        (torch.ones(8)[::2], "a gap after each 4 bytes"),
        (torch.ones(8, 4)[:, 0], "a gap after each 4 bytes"),
        (torch.ones(8, 16, dtype=torch.bfloat16)[:, :7], "a gap after each 14 bytes"),
    ],
)
def test_what_does_not_lie_in_runs_is_refused_with_the_reason(tensor, reason, impl):
    with pytest.raises(ValueError, match=rf"w is not contiguous .*: .*{reason}.*`.contiguous\(\)`"):
        ops.TensorTable({"w": tensor}, impl=impl)


def test_lists_that_lie_differently_are_refused(impl):
    weight = torch.ones(4, 6).t()
    with pytest.raises(ValueError, match=r"best\[0\] has strides \(4, 1\) but weights\[0\] \(1, 6\)"):
        ops.checkpoint_([weight], [torch.zeros(6, 4)], impl=impl)
    best = torch.zeros(4, 6).t()
    ops.checkpoint_([weight], [best], impl=impl)
    assert bool(best.eq(1).all())
    with pytest.raises(ValueError, match=r"deltas\[0\] has strides \(4, 1\)"):
        ops.step_([weight], [torch.zeros(6, 4)], [best], True, 1, impl=impl)


def test_a_weight_that_is_laid_out_anew_makes_its_table_stale(impl):
    weight = torch.nn.Parameter(torch.eye(3))
    table = ops.TensorTable([weight], impl=impl)
    weight.data = weight.data.t()
    assert table.is_stale()
