"""The torch reference against arithmetic done in float64 and rounded by hand."""

import pytest
import torch

from ffkernels.ops import reference

KS = [1.0, -1.0, 3.0, 1 / 3, -17.125, 1e-3]


def as_float32(k):
    return float(torch.tensor(k, dtype=torch.float32))


def values(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-12, 5, (20_000,), generator=generator)
    return torch.ldexp(torch.randn(20_000, generator=generator), exponent).to(dtype)


def half_ulp(x, dtype):
    unit = torch.finfo(dtype).eps / 2
    return (x.abs() * unit).clamp(min=torch.finfo(dtype).smallest_normal * unit)


@pytest.mark.parametrize("accept", [True, False])
@pytest.mark.parametrize("k", KS)
def test_step_rounds_product_then_sum_then_storage(dtype, k, accept):
    weight, delta, best = (values(dtype, seed) for seed in range(3))
    base, k = (weight if accept else best).clone(), as_float32(k)
    # Exact in float64: a product of two 24-bit significands; and rounding a float64 sum of two float32 once
    # more to float32 is innocuous, because 53 ≥ 2·24 + 2.
    product = (delta.double() * k).float()
    expected = (base.double() + product.double()).float()
    reference.step_([weight], [delta], [best], accept, k)
    assert torch.equal(weight, expected.to(dtype))
    assert torch.equal(best, base)

    truth = base.double() + delta.double() * k
    bound = half_ulp(delta.double() * k, torch.float32) + half_ulp(truth, torch.float32)
    if dtype != torch.float32:
        bound = bound + half_ulp(truth, dtype)
    assert bool(((weight.double() - truth).abs() <= bound * (1 + 1e-6)).all())


def test_no_fused_multiply_add():
    """One element where contraction would show: k·Δ rounds up, and the sum with −k·Δ rounded is exactly 0."""
    k = as_float32(1 + 2.0**-12)
    delta = torch.full((64,), 1 + 2.0**-12)
    weight = -(delta.double() * k).float()
    reference.step_([weight], [delta], [weight.clone()], True, k)
    assert torch.equal(weight, torch.zeros(64))


def test_delta_rounds_once(dtype):
    weight, best = values(dtype, 0), values(dtype, 1)
    expected = (weight.double() - best.double()).float().to(dtype)
    delta, kept = torch.empty_like(weight), weight.clone()
    reference.delta_([weight], [delta], [best])
    assert torch.equal(delta, expected) and torch.equal(best, kept) and torch.equal(weight, kept)
