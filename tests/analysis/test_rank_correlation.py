from __future__ import annotations

import itertools

import pytest

from ffkernels.analysis.rank_correlation import ranks, spearman


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
