"""The search for the best multiple of an update, on losses whose minimum is known."""

import math
import random

import pytest

from ffkernels.engine.rate_search import (
    BASELINE_NOT_FINITE,
    CONVERGED,
    LARGEST,
    MAX_EVALUATIONS,
    NO_FALL,
    REACHED_LARGEST,
    SMALLEST,
    RateSearch,
)

TOKENS = [10 + i for i in range(32)]


def run(loss, tokens=None, sums=None):
    search = RateSearch(tokens)
    while (scale := search.propose()) is not None:
        if sums is None:
            search.observe(scale, loss(scale))
        else:
            values = sums(scale)
            search.observe(scale, sum(values) / sum(tokens), values)
    return search


def scales(search):
    return [place.scale for place in search.places]


@pytest.mark.parametrize("best", [0.003, 0.04, 0.3, 0.9, 1.0, 1.7, 13.0, 260.0, 9000.0])
def test_a_parabola_is_found_in_few_vertices(best):
    search = run(lambda s: 3.0 + (s / best - 1) ** 2)
    assert search.scale == pytest.approx(best, rel=0.01)
    assert search.stopped_because == CONVERGED
    way = math.log2(best) / 2 if best > 1 else -math.log2(best)
    assert len(search.places) <= 4 + way + 3
    assert search.best.loss == min(place.loss for place in search.places)


@pytest.mark.parametrize("best", [0.02, 0.6, 5.0, 300.0, 12000.0])
def test_a_lopsided_valley_is_found_within_a_quarter(best):
    search = run(lambda s: 4 - 1.5 * math.exp(-((math.log((s + 1e-9) / best) / 1.5) ** 2)))
    assert search.scale == pytest.approx(best, rel=0.25)


def test_the_order_of_places():
    assert scales(run(lambda s: abs(s - 7.0)))[:4] == [0, 1, 4, 16]
    assert scales(run(lambda s: abs(s - 20.0)))[:5] == [0, 1, 4, 16, 64]
    assert scales(run(lambda s: abs(s - 0.3)))[:5] == [0, 1, 0.5, 0.25, 0.125]
    # 1 is best so far, yet its lower neighbour is not known
    assert scales(run(lambda s: (s - 1.1) ** 2))[:4] == [0, 1, 4, 0.5]


def test_it_stays_within_its_bounds():
    upward = run(lambda s: -s)
    assert upward.stopped_because == REACHED_LARGEST and upward.scale == LARGEST
    assert len(upward.places) <= MAX_EVALUATIONS
    downward = run(lambda s: s)
    assert downward.stopped_because == NO_FALL and downward.scale == 1.0
    assert min(s for s in scales(downward) if s) == SMALLEST
    assert len(downward.places) <= MAX_EVALUATIONS
    assert run(lambda s: math.nan).stopped_because == BASELINE_NOT_FINITE


def test_losses_that_are_not_finite_are_rises():
    search = run(lambda s: (s / 3 - 1) ** 2 if s < 3.5 else math.nan)
    assert scales(search)[:5] == [0, 1, 4, 0.5, 2]
    assert search.scale == 2.0


@pytest.mark.parametrize("seed", range(6))
def test_noise_at_small_steps_does_not_end_it(seed):
    """A step of 1e-4 of the valley under noise of a hundred times its effect."""
    draw = random.Random(seed)
    best = 5000.0

    def sums(s):
        mean = 3 + (s / best - 1) ** 2
        return [n * mean + draw.gauss(0, 0.03) * math.sqrt(n) for n in TOKENS]

    search = run(None, TOKENS, sums)
    assert search.scale == pytest.approx(best, rel=0.05)
    assert len(search.places) <= MAX_EVALUATIONS


def test_it_is_told_what_it_asked_for():
    search = RateSearch()
    with pytest.raises(ValueError, match=r"asked for 0\.0"):
        search.observe(1.0, 3.0)
    with pytest.raises(ValueError, match="sums by example"):
        search.observe(0.0, 3.0, [1.0, 2.0])
    search.observe(0.0, math.inf)
    with pytest.raises(RuntimeError, match="has ended"):
        search.observe(1.0, 3.0)
