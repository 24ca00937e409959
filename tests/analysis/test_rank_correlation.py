import itertools

import pytest
import torch

from ffkernels.analysis.rank_correlation import partial_spearman, ranks, spearman


def test_ranks_share_ties():
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert ranks([]) == []


def test_without_ties_it_is_the_formula_of_squared_differences():
    x, y = [0.3, 2.0, -1.0, 7.0, 4.0], [10, 30, 20, 60, 55]
    d2 = sum((a - b) ** 2 for a, b in zip(ranks(x), ranks(y), strict=True))
    assert spearman(x, y)["rho"] == pytest.approx(1 - 6 * d2 / (5 * 24))


def test_only_order_counts():
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1e9])["rho"] == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [0, -1, -2, -30])["rho"] == pytest.approx(-1)


def test_p_is_about_the_exact_share_of_pairings():
    x, y = list(range(6)), [0, 2, 1, 3, 5, 4]
    found = spearman(x, y)
    rhos = [spearman(x, list(p), shuffles=0)["rho"] for p in itertools.permutations(y)]
    exact = sum(abs(rho) >= abs(found["rho"]) - 1e-12 for rho in rhos) / len(rhos)
    assert found["p"] == pytest.approx(exact, abs=0.01)
    assert spearman(x, y) == found


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1, 2], [2, 1]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4])]
)
def test_what_cannot_be_told_is_none(x, y):
    assert spearman(x, y) == {"rho": None, "p": None, "n": len(x)}


def test_pairs_need_two():
    with pytest.raises(ValueError, match="3 values of x and 2 of y"):
        spearman([1, 2, 3], [1, 2])


def test_what_drifts_together_is_not_related_at_equal_step():
    steps = list(range(40))
    noise = torch.Generator().manual_seed(2)
    x = [s + float(torch.randn((), generator=noise)) * 4 for s in steps]
    y = [-s + float(torch.randn((), generator=noise)) * 4 for s in steps]
    assert abs(partial_spearman(x, y, steps)) < 0.3
    related = [a + float(torch.randn((), generator=noise)) * 0.1 for a in x]
    assert partial_spearman(x, related, steps) > 0.9
    assert partial_spearman(x, [1.0] * 40, steps) is None
    assert partial_spearman(x, y, x) is None  # nothing is left of x


def test_the_partial_one_is_the_correlation_of_what_the_third_leaves():
    """Of ranks, by least squares: the residuals of x and of y given z."""
    torch.manual_seed(4)
    x, y, z = (torch.randn(25) for _ in range(3))
    y = y + x + 2 * z
    a, b, c = (torch.tensor(ranks(v.tolist())).double() - 13 for v in (x, y, z))
    a, b = (v - (v @ c) / (c @ c) * c for v in (a, b))
    expected = float(a @ b / (a.norm() * b.norm()))
    assert partial_spearman(x.tolist(), y.tolist(), z.tolist()) == pytest.approx(expected, abs=1e-12)
