"""The rule that tells a rise from noise: its statistic by hand, its quantiles, its error rates on noise."""

import math
import random
from typing import ClassVar

import pytest

from ffkernels.search.significance import (
    LEVEL,
    Rises,
    critical_values,
    higher,
    jackknife_weights,
    really_higher,
    t_quantile,
)


@pytest.mark.parametrize(
    "probability, freedom, value",  # from tables of Student's distribution
    [
        (0.95, 31, 1.6955),
        (0.975, 31, 2.0395),
        (0.99, 31, 2.4528),
        (0.995, 31, 2.7440),
        (0.9995, 31, 3.6335),
        (0.9995, 15, 4.0728),
        (0.995, 120, 2.6174),
        (0.99, 7, 2.9980),
        (0.999, 7, 4.7853),
    ],
)
def test_quantiles(probability, freedom, value):
    assert t_quantile(probability, freedom) == pytest.approx(value, rel=2e-3)


def test_quantiles_of_few_examples_are_a_little_low():
    for probability, value in ((0.99, 4.5407), (0.999, 10.2145), (1 - LEVEL / 38, 16.0471)):
        assert 0.94 * value < t_quantile(probability, 3) < value


def test_too_few_examples_prove_nothing():
    assert t_quantile(0.99, 2) == math.inf
    assert not really_higher([1.0, 2.0], [2.0, 3.5], [4, 4], seen=1)


def t_statistic(low, high, tokens):
    """By leaving out each example once, as the jackknife is defined."""
    rows = [(b - a, n) for a, b, n in zip(low, high, tokens, strict=True) if n]
    m, size, total = len(rows), sum(n for _, n in rows), sum(d for d, _ in rows)
    values = [m * total / size - (m - 1) * (total - d) / (size - n) for d, n in rows]
    variance = sum((value - total / size) ** 2 for value in values) / (m * (m - 1))
    return total / size / math.sqrt(variance)


def proven_t(low, high, tokens):
    """The largest t that the rule still takes for proven."""
    weights, factor = jackknife_weights(tokens), 1 - 1 / sum(n > 0 for n in tokens)
    below, above = 0.0, 1e6
    for _ in range(80):
        middle = (below + above) / 2
        proven = higher(low, high, tokens, weights, middle * middle * factor)
        below, above = (middle, above) if proven else (below, middle)
    return below


def test_it_is_the_paired_t_where_examples_are_of_one_length():
    low, high = [1.0, 2.0, 3.0, 4.0, 5.0], [1.5, 2.25, 3.0, 4.75, 5.25]
    d = [b - a for a, b in zip(low, high, strict=True)]
    mean = sum(d) / 5
    deviation = math.sqrt(sum((x - mean) ** 2 for x in d) / 4)
    assert proven_t(low, high, [7] * 5) == pytest.approx(mean / (deviation / math.sqrt(5)))
    assert not higher(high, low, [7] * 5, jackknife_weights([7] * 5), 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_jackknife_for_examples_of_any_length(seed):
    draw = random.Random(seed)
    tokens = [draw.choice([0, draw.randint(1, 300)]) for _ in range(draw.randint(6, 40))]
    low = [n * draw.uniform(1, 3) for n in tokens]
    high = [a + n * draw.gauss(0.02, 0.03) for a, n in zip(low, tokens, strict=True)]
    expected = t_statistic(low, high, tokens)
    assert proven_t(low, high, tokens) == pytest.approx(max(0.0, expected), abs=1e-9)


def test_a_rise_in_proportion_to_the_tokens_is_certain_and_one_long_example_is_not():
    tokens = [10, 200, 30, 40, 50]
    low = [3.0] * 5
    exact = [3.0 + n / 1024 for n in tokens]
    assert proven_t(low, exact, tokens) > 1e3
    assert 0 < proven_t(low, [3.0, 4.0, 3.0, 3.0, 3.0], tokens) < 2.5


def test_critical_values_go_by_the_number_of_losses_seen():
    values = critical_values(32, 5)
    assert len(values) == 5
    assert values[0] == math.inf
    for seen in (1, 4):
        assert values[seen] == pytest.approx(t_quantile(1 - LEVEL / seen, 31) ** 2 * 31 / 32)
    assert critical_values(3, 3) == [math.inf] * 3


class TestRises:
    """Against the lowest so far, whatever came between."""

    tokens: ClassVar = [8] * 6

    @staticmethod
    def sums(shift, noise=0.0):
        return [24.0 + shift + noise * (-1) ** i for i in range(6)]

    def test_what_counts_is_the_lowest_and_how_many_were_seen(self):
        rises = Rises(self.tokens)
        assert not rises.sure(3.0, self.sums(0.0))
        assert not rises.sure(2.9, self.sums(-0.8))
        assert not rises.sure(2.95, self.sums(-0.4, noise=3.0))  # much noise
        assert rises.sure(2.91, self.sums(-0.72))  # none
        assert not rises.sure(2.8, self.sums(-1.6))  # the lowest now
        assert rises.sure(2.9, self.sums(-0.8))
        assert rises.seen == 6

    def test_equal_losses_prove_nothing_and_one_that_is_not_finite_does(self):
        rises = Rises(self.tokens)
        rises.sure(3.0, self.sums(0.0))
        assert not rises.sure(3.0, self.sums(0.0))
        assert rises.sure(math.nan, [math.nan] * 6)
        assert rises.sure(math.inf, [math.inf] * 6)

    @pytest.mark.parametrize("tokens", [None, [5, 5, 5], [5, 5, 5, 0]])
    def test_every_rise_counts_without_losses_by_example_or_with_too_few(self, tokens):
        rises = Rises(tokens)
        sums = tokens and [1.0] * len(tokens)
        assert rises.tokens is None
        assert [rises.sure(loss, sums) for loss in (2.0, 1.0, 1.5, 1.0, 0.5)] == [
            False,
            False,
            True,
            True,
            False,
        ]

    def test_a_loss_without_its_sums_is_refused(self):
        with pytest.raises(ValueError, match="without its sums"):
            Rises(self.tokens).sure(1.0)


def test_what_is_not_finite_is_a_rise():
    assert really_higher([1.0] * 5, [math.nan] * 5, [1] * 5, seen=1)
    assert really_higher([1.0] * 5, [1.0, math.inf, 1.0, 1.0, 1.0], [1] * 5, seen=1)
    assert not really_higher([1.0] * 5, [1.0] * 5, [1] * 5, seen=1)


@pytest.mark.parametrize("seen", [1, 8, 16])
def test_error_rates_on_noise_alone_and_on_a_real_rise(seen):
    """Against the lowest of `seen` losses of equal mean: about LEVEL. A real rise is seen."""
    draw = random.Random(6)
    tokens = [draw.randint(5, 60) for _ in range(32)]

    def noisy(rise=0.0):
        return [n * rise + draw.gauss(0, 0.01) * math.sqrt(n) for n in tokens]

    false = missed = 0
    trials = 1500
    for _ in range(trials):
        low = min((noisy() for _ in range(seen)), key=sum)
        false += really_higher(low, noisy(), tokens, seen=seen)
        missed += not really_higher(low, noisy(rise=0.0035), tokens, seen=seen)
    assert false / trials <= LEVEL * 1.5
    assert missed / trials <= 0.02
