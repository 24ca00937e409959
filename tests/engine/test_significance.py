"""The rule that tells a rise from noise: its statistic by hand, its quantiles, its error rates on noise."""

import math
import random

import pytest

from ffkernels.engine.significance import LEVEL, paired_t, really_higher, t_quantile


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
    ],
)
def test_quantiles(probability, freedom, value):
    assert t_quantile(probability, freedom) == pytest.approx(value, rel=0.02 if freedom < 30 else 2e-3)


def test_too_few_examples_prove_nothing():
    assert t_quantile(0.99, 2) == math.inf
    assert not really_higher([1.0, 2.0], [2.0, 3.5], [4, 4], seen=1)


def test_it_is_the_paired_t_where_examples_are_of_one_length():
    low, high = [1.0, 2.0, 3.0, 4.0, 5.0], [1.5, 2.25, 3.0, 4.75, 5.25]
    d = [b - a for a, b in zip(low, high, strict=True)]
    mean = sum(d) / 5
    deviation = math.sqrt(sum((x - mean) ** 2 for x in d) / 4)
    assert paired_t(low, high, [7] * 5) == pytest.approx(mean / (deviation / math.sqrt(5)))
    assert paired_t(high, low, [7] * 5) == pytest.approx(-paired_t(low, high, [7] * 5))


def test_a_rise_in_proportion_to_the_tokens_is_certain_and_one_long_example_is_not():
    tokens = [10, 200, 30, 40, 50]
    low = [3.0] * 5
    exact = [3.0 + n / 1024 for n in tokens]
    assert paired_t(low, exact, tokens) == math.inf
    assert 0 < paired_t(low, [3.0, 4.0, 3.0, 3.0, 3.0], tokens) < 2.5


def test_examples_without_tokens_are_left_out():
    low, high = [1.0, 2.0, 3.0, 4.0], [1.5, 2.25, 3.5, 4.125]
    assert paired_t([*low, 0.0], [*high, 0.0], [1, 2, 3, 4, 0]) == paired_t(low, high, [1, 2, 3, 4])


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
