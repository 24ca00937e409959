"""Every implementation of the moves against the torch reference and float64 truth, in poisoned memory.

The GPU's run on the CPU: Triton's kernels under its interpreter, CUDA's compiled by the C++ compiler. What
that cannot show is speed, a GPU's own conversions, and in which order programs see each other's writes:
tests/gpu does.
"""

import itertools
import math

import pytest
import torch

from ffkernels.ops import align, moves, reference
from ffkernels.ops.align import SEGMENT
from ffkernels.ops.moves import Lists
from ffkernels.ops.plan import DTYPE_CODES, DTYPES, GPU_CHUNK, make_plan

ALL = tuple(DTYPE_CODES)
# A full row, single elements, less than a vector, a vector and a tail, nothing, around one row, several rows.
SIZES = [GPU_CHUNK, 1, 3, 4, 0, 9, 127, 513, GPU_CHUNK - 1, GPU_CHUNK + 1, 2 * GPU_CHUNK + 777, GPU_CHUNK]
# Of W, Δ, best and gradients.
SKIPS = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (3, 3, 3, 3)]
nan, inf = math.nan, math.inf


def filled(*values, dtype=torch.float32):
    """Three sides, W, Δ and best, of one tensor each, and their plan."""
    sides = tuple([torch.tensor(value, dtype=dtype)] for value in values)
    return sides, make_plan(*sides, chunk=GPU_CHUNK)


@pytest.mark.parametrize("skips", SKIPS, ids=str)
def test_moves_equal_the_reference(kernels, dtype, skips, make_sides, assert_same_bits):
    def both(move, *arguments, **options):
        sides = make_sides(dtype, SIZES, skips)
        getattr(kernels, move)(sides.plan(deltas=move != "checkpoint"), sides.moved, *arguments, **options)
        want = sides.before
        if move == "checkpoint":
            reference.checkpoint_(want[0], want[2])
        else:
            getattr(reference, f"{move}_")(*want, *arguments)
        for found, expected in zip(sides.moved, want, strict=True):
            assert_same_bits(found, expected)
        assert sides.unharmed()

    both("checkpoint")
    both("delta")
    ks = [torch.tensor(k).item() for k in (0.0, -0.0, 1.0, -3.0, 0.3, 1e-3)]
    for accept, k, by_device in itertools.product((False, True), ks, (False, True)):
        both("step", accept, k, by_device=by_device)


def test_a_k_of_zero_copies_bits_whatever_stands_in_delta(kernels, dtype):
    """-0.0, infinities and a signalling NaN of base survive, those of Δ do not reach W."""
    integers = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    for accept, k, by_device in itertools.product((False, True), (0.0, -0.0), (False, True)):
        odd = torch.tensor([-0.0, 1.0, nan, inf, 2.0], dtype=dtype).view(integers)
        odd[4] = 0x7F800001 if dtype == torch.float32 else 0x7F81 if dtype == torch.bfloat16 else 0x7D01
        sides, plan = filled([7.0] * 5, [0.0, inf, nan, -1.0, inf], [7.0] * 5, dtype=dtype)
        sides[0 if accept else 2][0].view(integers).copy_(odd)
        kernels.step(plan, sides, accept, k, by_device)
        for side in (sides[0], sides[2]):
            if kernels.name != "torch" or not by_device:
                assert torch.equal(side[0].view(integers), odd)
            else:
                torch.testing.assert_close(side[0], odd.view(dtype), rtol=0, atol=0, equal_nan=True)


def test_signs_of_zero_and_infinities_go_through_the_sum(kernels, dtype, assert_same_bits):
    w, delta = [-0.0, -0.0, 0.0, -0.0, 1.0, -inf], [0.0, -0.0, -0.0, 0.0, inf, 1.0]
    # The interpreter of Triton 3.6 hands a scalar of -0.0 on as 0.0: there no sum is of two zeros below 0.
    second = 0.5 if kernels.name == "triton" else -0.0
    sides, plan = filled(w, delta, [0.5, second, 0.0, -1.0, 1.0, inf], dtype=dtype)
    want = [[tensor.clone() for tensor in side] for side in sides]
    for accept in (False, True):
        kernels.step(plan, sides, accept, 2.0)
        reference.step_(*want, accept, 2.0)
        for found, expected in zip(sides, want, strict=True):
            assert_same_bits(found, expected)


def test_the_product_is_rounded_before_the_sum(kernels):
    sides, plan = filled([-1.0], [1.0 + 2.0**-7], [0.0])
    kernels.step(plan, sides, True, 1.0 + 2.0**-23)
    assert sides[0][0].item() == 2.0**-7 + 2.0**-23  # an fma would keep the product's 2**-30


def test_several_dtypes_and_more_than_a_thousand_tensors(kernels):
    weights, deltas, best = (
        [torch.randn(n % 7 + 1).to(DTYPES[n % 3]) for n in range(1200)] for _ in range(3)
    )
    want = [[tensor.clone() for tensor in side] for side in (weights, deltas, best)]
    plan = make_plan(weights, deltas, best, chunk=GPU_CHUNK)
    assert [(group.dtype, len(group.rows)) for group in plan.groups] == [(dtype, 400) for dtype in DTYPES]
    kernels.step(plan, (weights, deltas, best), True, 0.5)
    reference.step_(*want, True, 0.5)
    for found, expected in zip((weights, deltas, best), want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_longer_than_a_program_are_still_moved(kernels):
    """A plan made for another device's chunk is slow, not wrong."""
    weight, best = torch.randn(5000), torch.zeros(5000)
    kernels.checkpoint(make_plan([weight], None, [best]), ([weight], None, [best]))
    assert torch.equal(best, weight)


@pytest.mark.parametrize("shapes", [[], [(0, 8)], [(0,), (0, 8)]], ids=str)
def test_nothing_to_move(kernels, shapes):
    sides = tuple([torch.zeros(shape) for shape in shapes] for _ in range(3))
    kernels.checkpoint(make_plan(sides[0], None, sides[2], chunk=GPU_CHUNK), sides)
    plan = make_plan(*sides, chunk=GPU_CHUNK)
    kernels.delta(plan, sides)
    kernels.step(plan, sides, True, 2.0)


@pytest.mark.parametrize("skips", SKIPS, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_sums_and_checkpoint(kernels, dtype, skips, make_sides, assert_sums):
    """Gradients of the same dtype, and of others where all is aligned and where nothing is; one missing."""
    for grad_dtype in (dtype, *(other for other in ALL if other != dtype and skips in SKIPS[::5])):
        sides = make_sides(dtype, SIZES, skips, grad_dtype)
        grads = [None if i == 7 else grad for i, grad in enumerate(sides.grads)]
        plan = sides.plan(deltas=False)
        assert_sums(
            kernels.align(plan, sides.weights, grads, sides.best), sides.weights, grads, sides.before[2]
        )
        for side in (sides.weights, sides.best):
            torch.testing.assert_close(side, sides.before[0], rtol=0, atol=0)
        assert sides.unharmed(), "written outside"


def alignment(kernels, weights, grads, best):
    plan = make_plan(weights, None, best, chunk=GPU_CHUNK, dtypes=ALL)
    return kernels.align(plan, weights, grads, best), plan


def test_segments_and_dtypes_add_up(kernels, assert_sums):
    """More rows than are added up at a time, in several launches that share their scratch memory."""
    sizes = [(torch.float32, 3), (torch.float32, 4)] * 66
    sizes += [(torch.bfloat16, 2), (torch.bfloat16, 3), (torch.float64, 5)]
    weights, grads, best = ([torch.randn(n).to(dtype) for dtype, n in sizes] for _ in range(3))
    before = [b.clone() for b in best]
    found, plan = alignment(kernels, weights, grads, best)
    assert [len(group.rows) for group in plan.groups] == [132, 2, 1] and SEGMENT == 128
    assert_sums(found, weights, grads, before)
    torch._foreach_copy_(best, before)
    assert kernels.align(plan, weights, grads, best).tolist() == found.tolist()


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_more_segments_than_are_added_up_at_a_time(kernels, assert_sums, monkeypatch):
    monkeypatch.setattr(align, "SEGMENT", 4)
    monkeypatch.setattr(kernels.module, "SEGMENT", 4)
    weights, grads, best = ([torch.randn(3) for _ in range(23)] for _ in range(3))
    before = [b.clone() for b in best]
    assert_sums(alignment(kernels, weights, grads, best)[0], weights, grads, before)


@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_whichever_block_is_last_the_bits_are_the_same(kernels, cuda_on_host, dtype, make_sides):
    found = set()
    for last_first in (0, 1, 0):
        cuda_on_host.ffk_last_block_first(last_first)
        sides = make_sides(dtype, SIZES)
        found.add(tuple(alignment(kernels, sides.weights, sides.grads, sides.best)[0].tolist()))
    assert len(found) == 1


def test_missing_gradients_count_as_zero_and_still_copy(kernels):
    """Not even times an infinite d does one count."""
    weights, grads = [torch.full((5,), 2.0), torch.full((3000,), inf)], [torch.full((5,), 3.0), None]
    for given, expected in ((grads, [15.0, 45.0, inf]), ([None, None], [0.0, 0.0, inf])):
        best = [torch.ones(5), torch.ones(3000)]
        assert alignment(kernels, weights, given, best)[0].tolist() == expected
        assert best[0].tolist() == [2.0] * 5 and best[1].tolist() == [inf] * 3000


ODD = [*itertools.product([2.0, nan, inf], repeat=2), (nan, 1.0), (inf, 1.0), (-inf, 1.0), (inf, 0.0)]


@pytest.mark.parametrize("weight, grad", ODD)
def test_nan_and_infinities_come_out_as_they_are(kernels, dtype, weight, grad):
    """In a full row, at its ends and within, and in one that is not full."""
    for place in (0, 70, 1999, GPU_CHUNK + 2):
        weights, grads, best = ([torch.full((GPU_CHUNK + 5,), value)] for value in (2.0, 1.0, 1.0))
        weights[0][place], grads[0][place] = weight, grad
        d = weights[0] - 1
        expected = [(grads[0] * d).sum().item(), (grads[0] ** 2).sum().item(), (d**2).sum().item()]
        sides = [[side[0].to(dtype)] for side in (weights, best)]
        assert str(alignment(kernels, sides[0], grads, sides[1])[0].tolist()) == str(expected)


FLAG, FACTOR = torch.ones(1, dtype=torch.int32), torch.ones(1)


@pytest.mark.parametrize(
    ("move", "arguments", "written"),
    [
        ("checkpoint", (), (0, 0, 1)),
        ("delta", (), (0, 1, 1)),
        ("step", (True, 1.0), (1, 0, 1)),
        ("step", (True, 0.0), (0, 0, 1)),
        ("step", (False, 0.0), (1, 0, 0)),
        ("step", (False, 2.0), (1, 0, 0)),
        ("step", (FLAG, 0.0), (1, 0, 1)),
        ("step", (False, FACTOR), (1, 0, 0)),
        ("step", (FLAG, FACTOR), (1, 0, 1)),
    ],
)
@pytest.mark.parametrize("kernels", ["triton", "cuda"], indirect=True)
def test_versions_move_on_by_what_the_host_knows(kernels, move, arguments, written, monkeypatch):
    """With device scalars, as all of Triton's are, both W and best count as written."""
    monkeypatch.setattr(moves, "kernels", lambda impl: kernels.module)
    # As if tensors were on the device.
    monkeypatch.setattr(moves, "_scalar", lambda plan, name, value: (value, isinstance(value, torch.Tensor)))
    sides, plan = filled([0.0] * 2, [0.0] * 2, [0.0] * 2)
    plan.impl = kernels.name
    getattr(moves, move)(Lists(plan, *sides), *arguments)
    if kernels.name == "triton" and move == "step":
        written = (1, 0, 1)
    assert tuple(side[0]._version for side in sides) == written


@pytest.mark.parametrize("kernels", ["triton", "cuda"], indirect=True)
def test_an_alignment_counts_best_and_out_as_written(kernels, monkeypatch):
    monkeypatch.setattr(align, "kernels", lambda impl: kernels.module)
    weights, grads, best = ([torch.ones(5)] for _ in range(3))
    plan, out = make_plan(weights, None, best, chunk=GPU_CHUNK), torch.empty(3, dtype=torch.float64)
    plan.impl = kernels.name
    assert align._align(Lists(plan, weights, None, best), grads, out) is out
    assert [t._version for t in (*weights, *grads, *best, out)] == [0, 0, 1, 1]
    assert out.tolist() == [0.0, 5.0, 0.0]
