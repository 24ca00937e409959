"""The weight moves on a GPU: against float64 truth, bit for bit against the CPU, and what they leave be."""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch

from ffkernels import ops
from ffkernels.ops import reference
from ffkernels.ops.plan import ALIGNMENT

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 3, 8, 127, 2047, 2048, 2049, 6144, 50_001]
STEPS = list(itertools.product((True, False), (0.0, 1.0, -3.0, 0.3)))


class Guarded:
    """Tensors in one buffer of NaN, `skip` elements off an aligned address: stray writes show."""

    def __init__(self, values: list[torch.Tensor], skip: int, device: torch.device) -> None:
        step = ALIGNMENT // values[0].element_size()
        starts, end = [], step
        for value in values:
            starts.append(end + skip)
            end = -(-(end + skip + value.numel() + 1) // step) * step
        self.memory = torch.full((end + 2 * step,), float("nan"), dtype=values[0].dtype, device=device)
        shift = (-self.memory.data_ptr() % ALIGNMENT) // self.memory.element_size()
        self.inside = torch.zeros(len(self.memory), dtype=torch.bool, device=device)
        self.tensors = []
        for value, start in zip(values, starts, strict=True):
            part = slice(shift + start, shift + start + value.numel())
            self.memory[part] = value.to(device)
            self.inside[part] = True
            self.tensors.append(self.memory[part])

    def unharmed(self) -> bool:
        return bool(self.memory[~self.inside].isnan().all())


def randoms(dtype: torch.dtype, seed: int, sizes=SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in sizes]


def on_cpu(side: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().to("cpu", copy=True) for tensor in side]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.detach().cpu().view(kind), b.detach().cpu().view(kind))


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor], what: str = "") -> None:
    for i, (tensor, other) in enumerate(zip(got, want, strict=True)):
        assert same_bits(tensor, other), f"{what}, tensor {i} of {tensor.numel()} elements"


def scalars(accept: bool, k: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.tensor([accept], dtype=torch.int32, device=device),
        torch.tensor([k], dtype=torch.float32, device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_against_float64(impl, dtype, device):
    """Within the roundings that the definition has: two in float32 and one to the storage dtype."""
    weights, deltas, best = ([t.to(device) for t in randoms(dtype, seed)] for seed in range(3))
    for accept, k in STEPS:
        before = [[t.double() for t in on_cpu(side)] for side in (weights, deltas, best)]
        ops.step_(weights, deltas, best, *scalars(accept, k, device), impl=impl)
        k = ctypes.c_float(k).value
        for i, weight in enumerate(weights):
            base = before[0 if accept else 2][i]
            exact = base + k * before[1][i]
            single = 2.0**-24 * ((k * before[1][i]).abs() + exact.abs()) * 1.01
            storage = torch.finfo(dtype).eps / 2 * (exact.abs() + single) + torch.finfo(dtype).tiny
            error = (weight.double().cpu() - exact).abs()
            assert bool((error <= single + storage).all()), (accept, k, i, float(error.max()))
            assert torch.equal(best[i].double().cpu(), base)


@pytest.mark.parametrize("skips", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_gives_the_bits_of_the_cpu_and_nothing_else(impl, dtype, skips, device):
    sides = [Guarded(randoms(dtype, i), skip, device) for i, skip in enumerate(skips)]
    for accept, k in STEPS:
        want = [on_cpu(side.tensors) for side in sides]
        reference.step_(*want, accept, ctypes.c_float(k).value)
        ops.step_(*(side.tensors for side in sides), *scalars(accept, k, device), impl=impl)
        for name, side, expected in zip(("W", "Δ", "best"), sides, want, strict=True):
            assert_same(side.tensors, expected, f"{name} at accept={accept}, k={k}")
            assert side.unharmed(), f"written outside of {name} at accept={accept}, k={k}"


@pytest.mark.parametrize("skips", [(0, 0, 0), (1, 0, 0), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta_and_checkpoint(impl, dtype, skips, device):
    sides = [Guarded(randoms(dtype, i), skip, device) for i, skip in enumerate(skips)]
    want = [on_cpu(side.tensors) for side in sides]
    reference.delta_(*want)
    ops.delta_(*(side.tensors for side in sides), impl=impl)
    for side, expected in zip(sides, want, strict=True):
        assert_same(side.tensors, expected)
        assert side.unharmed()
    for tensor in sides[2].tensors:
        tensor.fill_(float("nan"))
    ops.checkpoint_(sides[0].tensors, sides[2].tensors, impl=impl)
    assert_same(sides[2].tensors, sides[0].tensors)
    assert sides[2].unharmed()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_k_is_a_copy(impl, dtype, device):
    """An infinite Δ, -0.0 and NaN: none may change what a rollback brings back."""
    weights, deltas, best = ([t.to(device) for t in randoms(dtype, i)] for i in range(3))
    for delta in deltas:
        delta.fill_(float("inf"))
    best[3][:3] = torch.tensor([-0.0, float("inf"), float("nan")], device=device)
    want = on_cpu(best)
    ops.step_(weights, deltas, best, *scalars(False, 0.0, device), impl=impl)
    assert_same(weights, want)
    weights[3][:2] = torch.tensor([-0.0, float("nan")], device=device)
    want = on_cpu(weights)
    ops.step_(weights, deltas, best, *scalars(True, 0.0, device), impl=impl)
    assert_same(weights, want)
    assert_same(best, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_subnormals(impl, dtype, device):
    info = torch.finfo(dtype)
    hard = torch.tensor([info.max, -info.max, info.tiny, -info.tiny / 2, 0.0, float("inf"), 1.0, 65504.0])
    sides = [[hard.to(dtype).roll(i).repeat(300).to(device)] for i in range(3)]
    for accept, k in STEPS:
        want = [on_cpu(side) for side in sides]
        reference.step_(*want, accept, ctypes.c_float(k).value)
        ops.step_(*sides, *scalars(accept, k, device), impl=impl)
        for side, expected in zip(sides, want, strict=True):
            torch.testing.assert_close(side[0].cpu(), expected[0], rtol=0, atol=0, equal_nan=True)


ALIGNED = [*DTYPES, torch.float64]


def assert_sums(found, weights, grads, best) -> None:
    """Within 2⁻⁴⁶·Σ|terms| of the sums that are rounded once."""
    products = []
    for weight, grad, base in zip(*map(on_cpu, (weights, grads, best)), strict=True):
        exact = torch.promote_types(weight.dtype, torch.float32)
        d, g = (weight.to(exact) - base.to(exact)).double(), grad.double()
        products.append(torch.stack([g * d, g * g, d * d]))
    for value, terms in zip(found.tolist(), torch.cat(products, 1).tolist(), strict=True):
        assert abs(value - math.fsum(terms)) <= 2.0**-46 * math.fsum(map(abs, terms))


@pytest.mark.parametrize("skips", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", ALIGNED, ids=str)
def test_alignment(impl, dtype, skips, device):
    """Gradients of the weights' dtype and of others; what is copied, the sums, and that their bits repeat."""
    for grad_dtype in (dtype, *(other for other in ALIGNED if skips[0] == 3 and other != dtype)):
        sides = [
            Guarded(randoms(kind, i), skip, device)
            for i, (kind, skip) in enumerate(zip((dtype, grad_dtype, dtype), skips, strict=True))
        ]
        weights, grads, best = (side.tensors for side in sides)
        before = [tensor.clone() for tensor in best]
        found = []
        for _ in range(3):
            torch._foreach_copy_(best, before)
            found.append(ops.align_(weights, grads, best, impl=impl))
        assert_sums(found[0], weights, grads, before)
        assert all(torch.equal(found[0], again) for again in found[1:])
        assert all(torch.equal(base, weight) for base, weight in zip(best, weights, strict=True))
        assert all(side.unharmed() for side in sides)


def test_alignment_of_tens_of_thousands_of_rows_and_of_missing_gradients(kernels, device):
    """Whole numbers, so that float64 has every sum exactly, in whatever order programs end."""
    sizes = [40_000_000 if device.type == "cuda" else 4_000_000, 7, 4096]
    table = ops.TensorTable([torch.full((n,), 3.0, device=device) for n in sizes], impl=kernels)
    grads = [torch.full((n,), 2.0, device=device) for n in sizes]
    out = torch.empty(3, dtype=torch.float64, device=device)
    for missing in (None, 0, 2) * 5:
        for best in table.best_flats:
            best.zero_()
        given = [None if i == missing else grad for i, grad in enumerate(grads)]
        there = sum(n for n, grad in zip(sizes, given, strict=True) if grad is not None)
        assert ops.align_(table, given, out).tolist() == [6.0 * there, 4.0 * there, 9.0 * sum(sizes)]
        assert all(bool((best == 3).all()) for best in table.best)


def mixed(device: torch.device, count: int = 30) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [int(n) for n in torch.randint(0, 5000, (count,), generator=generator)]
    return [
        torch.nn.Parameter(torch.randn(n, generator=generator).to(DTYPES[i % 3]).to(device))
        for i, n in enumerate(sizes)
    ]


def fill_deltas(table: ops.TensorTable) -> None:
    for i, delta in enumerate(table.deltas):
        delta.copy_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(i)))


def test_a_table_of_mixed_dtypes_through_a_whole_stage(impl, device):
    table = ops.TensorTable(mixed(device), impl=impl)
    fill_deltas(table)
    mirror = [on_cpu(side) for side in (table.weights, table.deltas, table.best)]
    for accept, k in [(False, 1.0), (True, 1.0), (True, 2.0), (False, -1.0), (False, 0.0)]:
        ops.step_(table, accept, k)
        reference.step_(*mirror, accept, k)
    ops.delta_(table)
    reference.delta_(*mirror)
    for side, expected in zip((table.weights, table.deltas, table.best), mirror, strict=True):
        assert_same(side, expected)
    largest = max(float(delta.float().abs().max()) for delta in mirror[1] if delta.numel())
    assert ops.delta_absmax(table) == largest


def test_ten_thousand_tensors(kernels, device):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 400, (10_000,), generator=generator).tolist()
    flat = torch.randn(sum(sizes) + 64, generator=generator).to(device)
    table = ops.TensorTable(list(flat[: sum(sizes)].split(sizes)), impl=kernels)  # views: mostly misaligned
    changes = torch.randn(sum(sizes), generator=generator)
    for delta, change in zip(table.deltas, changes.split(sizes), strict=True):
        delta.copy_(change)
    want = flat[: sum(sizes)].cpu() + changes
    kept = flat[sum(sizes) :].clone()
    ops.step_(table, *scalars(True, 1.0, device))
    assert torch.equal(flat[: sum(sizes)].cpu(), want)
    assert torch.equal(flat[sum(sizes) :], kept)


def test_versions_say_what_was_written(impl, device):
    table = ops.TensorTable(mixed(device, 3), impl=impl)

    def changed(move) -> tuple[bool, bool, bool]:
        before = [[t._version for t in side] for side in (table.weights, table.deltas, table.best)]
        move()
        after = [[t._version for t in side] for side in (table.weights, table.deltas, table.best)]
        pairs = zip(before, after, strict=True)
        return tuple(all(x < y for x, y in zip(a, b, strict=True)) for a, b in pairs)

    assert changed(lambda: ops.checkpoint_(table)) == (False, False, True)
    assert changed(lambda: ops.delta_(table)) == (False, True, True)
    assert changed(lambda: ops.step_(table, True, 1.0)) == (True, False, True)
    assert changed(lambda: ops.step_(table, *scalars(True, 1.0, device)))[0]


def test_more_than_2_to_the_31_elements(kernels, gpu):
    """The far end of a tensor that 32-bit offsets cannot reach."""
    count = 2**31 + 4099
    free, _ = torch.cuda.mem_get_info(gpu)
    if free < 4 * 2 * count:
        pytest.skip(f"needs {4 * 2 * count / 2**30:.0f} GiB of free GPU memory")
    weight = torch.zeros(count, dtype=torch.bfloat16, device=gpu)
    table = ops.TensorTable([weight], impl=kernels)
    table.deltas[0].fill_(1.0)
    ops.step_(table, *scalars(True, 2.0, gpu))
    assert weight[0].item() == weight[-1].item() == weight[2**31].item() == 2.0
    assert int((weight[-5000:] != 2).sum()) == 0 and int((weight[:5000] != 2).sum()) == 0
    assert table.best[0][-1].item() == 0.0
    # d is 2 and the gradient 1 everywhere: sums of whole numbers, which float64 has exactly.
    assert ops.align_(table, table.deltas).tolist() == [2.0 * count, count, 4.0 * count]
    assert int((table.best[0] != 2).sum()) == 0
    del weight, table
    torch.cuda.empty_cache()
