"""The searches against brute force: hypothesis draws the losses, every τ is tried for the truth."""

import math
import random
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffkernels.search.search import (
    BASELINE_NOT_FINITE,
    CONVERGED,
    IMPROVEMENT_ENDED,
    NO_IMPROVEMENT,
    REACHED_MAX_TAU,
    LinearSearch,
    ParabolicSearch,
    make_search,
)

BOTH = [LinearSearch, ParabolicSearch]


def run(search, loss, sure=lambda tau: True):
    while (tau := search.propose()) is not None:
        assert 0 <= tau <= search.max_tau
        search.observe(tau, loss(tau), sure(tau))
    return search


def budget(max_tau):
    return 2 * math.log2(max_tau) + 6


positive = st.floats(1e-3, 1.0)


@st.composite
def convex(draw):
    """A strictly convex sequence: slopes grow by random amounts, the minimum lies anywhere."""
    max_tau = draw(st.integers(1, 200))
    growth = draw(st.lists(positive, min_size=max_tau, max_size=max_tau))
    slopes = list(accumulate(growth))
    turn = draw(st.floats(-0.2, 1.2)) * slopes[-1]
    return max_tau, list(accumulate((s - turn for s in slopes), initial=draw(st.floats(-10, 10))))


@st.composite
def unimodal(draw):
    """Falling to one minimum, rising after it, by random amounts: neither convex nor smooth."""
    max_tau = draw(st.integers(1, 128))
    bottom = draw(st.integers(0, max_tau))
    steps = draw(st.lists(positive, min_size=max_tau, max_size=max_tau))
    return max_tau, list(accumulate((-s if i < bottom else s for i, s in enumerate(steps)), initial=0.0))


@st.composite
def smooth(draw):
    """What losses along an update look like: a skewed bowl of random width, anywhere."""
    max_tau = draw(st.integers(1, 2048))
    bottom = draw(st.floats(0, 1.5 * max_tau))
    skew = draw(st.floats(0.05, 3.0)) / max(bottom, 1.0)
    scale = draw(st.floats(1e-3, 10))
    return max_tau, [scale * (1 - math.exp(-skew * (t - bottom))) ** 2 for t in range(max_tau + 1)]


anything = st.lists(
    st.one_of(
        st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1), st.just(1.0), st.integers(0, 3)
    ),
    min_size=2,
    max_size=300,
)


def decided_from_the_record(max_tau, losses, sure, start):
    """The parabolic search told from all that was measured, instead of from a state: τ in order, the best."""
    f, order, refining, halving, start = {}, [], False, False, min(start, max_tau)
    vertices, predicted, misses, unproven = 0, math.inf, [math.inf], []
    tau = 0
    while tau is not None:
        loss = losses[tau] if math.isfinite(losses[tau]) else math.inf
        proven = sure(tau) or loss == math.inf
        before = min(f.values(), default=math.inf)
        f[tau] = loss
        order.append(tau)
        best = min(f, key=lambda t: (f[t], order.index(t)))
        lower = loss < before
        if refining:
            misses.append(abs(loss - predicted) if math.isfinite(loss - predicted) else math.inf)
            unproven.append(not lower and not proven)
        elif tau == 0:
            tau = start if math.isfinite(loss) else None
            continue
        elif not halving and tau < max_tau and (lower or not proven):
            tau = min(2 * tau, max_tau)
            continue
        elif best == 0 or (best == start and not halving):
            halving = True
            tau = min(t for t in f if t) // 2
            if tau:
                continue
            if best == 0:
                break
        if not refining and best == max_tau:
            f[max_tau + 1] = math.inf
            order.append(max_tau + 1)
            refining, tau = True, max_tau - 1
            if tau in f:
                break
            continue
        refining = True
        a, c = max(t for t in f if t < best), min(t for t in f if t > best)
        if unproven[-2:] == [True, True] and misses[-2] <= misses[-1] < math.inf:
            break
        count = len([t for t in order if t <= max_tau])
        if c - a <= 2 or count >= int(2 * math.log2(max_tau)) + 6:
            break
        left, right = (f[best] - f[a]) / (best - a), (f[c] - f[best]) / (c - best)
        curvature = (right - left) / (c - a)
        longer, sign = max((c - best, 1), (best - a, -1))
        golden = best + sign * max(1, math.floor((3 - math.sqrt(5)) / 2 * longer + 0.5))
        if not 0 < curvature < math.inf:
            tau, predicted = golden, math.inf
            continue
        vertex = math.floor(0.5 * (a + best) - 0.5 * left / curvature + 0.5)
        vertex = min(max(vertex, a + 1), c - 1)

        def parabola(t, a=a, b=best, left=left, curvature=curvature):
            return f[b] + (t - b) * (left + curvature * (t - a))

        promise = f[best] - parabola(vertex)
        if promise + max(misses[-2:]) <= 0.01 * (f[0] - f[best]):
            break
        if vertices == 2:
            tau = golden
        else:
            vertices += 1
            tau = vertex if vertex != best else best + sign * max(1, longer // 4)
        predicted = parabola(tau)
    return [t for t in order if t <= max_tau], best


class TestLinear:
    @given(st.one_of(convex(), unimodal(), smooth()))
    def test_is_the_exact_argmin_of_a_unimodal_loss(self, case):
        max_tau, losses = case
        search = run(LinearSearch(max_tau), losses.__getitem__)
        assert search.best_loss == min(losses)
        assert search.best_tau == losses.index(min(losses))

    @given(anything)
    def test_takes_the_papers_steps_on_any_loss(self, losses):
        search = run(LinearSearch(len(losses) - 1), losses.__getitem__)
        expected = 0
        if math.isfinite(losses[0]):
            while expected + 1 < len(losses) and losses[expected + 1] < losses[expected]:
                if not math.isfinite(losses[expected + 1]):
                    break
                expected += 1
        assert search.best_tau == expected
        assert [tau for tau, _ in search.losses] == list(range(len(search.losses)))


class TestParabolic:
    @settings(max_examples=300)
    @given(
        st.tuples(smooth(), st.just(0.01)) | st.tuples(convex(), st.just(0.1)), st.none() | st.floats(0.5, 2)
    )
    def test_loses_at_most_a_hundredth_of_the_decrease(self, case, near):
        """From 1, or from a start within a factor of two; more only where there are kinks."""
        (max_tau, losses), lost = case
        lowest = min(losses)
        bottom = losses.index(lowest)
        search = ParabolicSearch(max_tau, max(1, round(near * bottom)) if near else 1)
        run(search, losses.__getitem__)
        close = abs(search.best_tau - bottom) <= 2
        assert close or search.best_loss - lowest <= lost * (losses[0] - lowest)
        assert len(search.losses) <= budget(max_tau)

    def test_needs_about_ten_validations_where_linear_needs_a_hundred(self):
        def loss(tau):  # a bowl with its bottom at 107, as the first stages at a small learning rate have it
            return 2.2 + 1e-5 * (tau - 107) ** 2 + 2e-8 * (tau - 107) ** 3

        linear, parabolic = run(LinearSearch(256), loss), run(ParabolicSearch(256), loss)
        assert linear.best_tau == 107
        assert len(linear.losses) == 109
        assert abs(parabolic.best_tau - 107) <= 1
        assert len(parabolic.losses) <= 13  # ten to bracket 107 in (64, 128, 256), three to refine
        warm = run(ParabolicSearch(256, 90), loss)
        assert abs(warm.best_tau - 107) <= 1
        assert len(warm.losses) <= 7  # 0, 90, 180, 45 and three

    def test_doubles_then_refines_inside_the_bracket(self):
        search = run(ParabolicSearch(256), lambda tau: (tau - 21.3) ** 2)
        taus = [tau for tau, _ in search.losses]
        assert taus[:7] == [0, 1, 2, 4, 8, 16, 32]
        assert all(8 < tau < 32 for tau in taus[7:])
        assert search.best_tau == 21
        assert search.stopped_because == CONVERGED

    @given(
        losses=anything,
        proven=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        seed=st.integers(0, 99),
        start=st.sampled_from([1, 1, 2, 3, 8, 21, 1000]),
    )
    def test_decides_as_the_record_of_what_was_measured_says(self, losses, proven, seed, start):
        max_tau = len(losses) - 1
        verdicts = [random.Random(seed + tau).random() < proven for tau in range(max_tau + 1)]
        search = run(ParabolicSearch(max_tau, start), losses.__getitem__, verdicts.__getitem__)
        taus, best = decided_from_the_record(max_tau, losses, verdicts.__getitem__, start)
        assert [tau for tau, _ in search.losses] == taus
        assert search.best_tau == best or not math.isfinite(losses[0])

    def test_goes_on_through_rises_that_are_not_sure(self):
        def loss(tau):  # a bowl to 90, with noise that hides it at first
            return 5 + 1e-3 * ((tau - 90) / 90) ** 2 + {2: 4e-4, 8: 4e-4, 16: 5e-4}.get(tau, 0.0)

        plain = run(ParabolicSearch(1024), loss)
        assert (plain.best_tau, len(plain.losses)) == (1, 3)
        search = run(ParabolicSearch(1024), loss, lambda tau: tau > 150)
        assert [tau for tau, _ in search.losses][:10] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
        assert abs(search.best_tau - 90) <= 2

    def test_brackets_the_best_with_what_was_measured_next_to_it(self):
        low = {0: 1.0, 1: 0.9, 2: 0.8, 4: 0.1, 8: 0.6, 16: 0.3, 32: 0.5}
        search = run(ParabolicSearch(64), lambda tau: low.get(tau, 0.7), lambda tau: tau == 32 or tau < 8)
        taus = [tau for tau, _ in search.losses]
        assert taus[:7] == [0, 1, 2, 4, 8, 16, 32]
        assert all(2 < tau < 8 for tau in taus[7:])

    def test_where_nothing_is_lower_and_nothing_sure_it_ends_at_the_limit(self):
        search = run(ParabolicSearch(100), lambda tau: 1.0 + tau, lambda tau: False)
        assert [tau for tau, _ in search.losses] == [0, 1, 2, 4, 8, 16, 32, 64, 100]
        assert (search.best_tau, search.stopped_because) == (0, NO_IMPROVEMENT)

    @pytest.mark.parametrize(
        ("bottom", "expected"),
        [
            (40, [0, 20, 40, 80]),  # falls, and rises
            (22, [0, 20, 40, 10]),  # the start is the best: half of it, too
            (12, [0, 20, 40, 10]),
            (8, [0, 20, 10]),  # not lower than at 0
            (0.6, [0, 20, 10, 5, 2, 1]),
            (100, [0, 20, 40, 80, 100, 99]),
        ],
    )
    def test_starts_where_it_is_told_to(self, bottom, expected):
        search = run(ParabolicSearch(100, 20), lambda tau: (tau - bottom) ** 2)
        taus = [tau for tau, _ in search.losses]
        assert taus[: len(expected)] == expected
        assert abs(search.best_tau - bottom) <= 2

    def test_halves_after_rises_that_were_not_sure(self):
        search = run(ParabolicSearch(100, 20), lambda tau: 1.0 + tau, lambda tau: tau > 50)
        assert [tau for tau, _ in search.losses] == [0, 20, 40, 80, 10, 5, 2, 1]
        assert (search.best_tau, search.stopped_because) == (0, NO_IMPROVEMENT)

    def test_refining_ends_where_errors_are_noise(self):
        """Bowls with noise of 0.3 % of the decrease: close to the bottom, in few validations."""
        count = lost = 0
        for seed in range(200):
            draw = random.Random(seed)
            bottom = draw.uniform(20, 300)
            noise = [draw.gauss(0, 0.003) for _ in range(1025)]

            def bowl(tau, bottom=bottom):
                return (tau / bottom - 1) ** 2

            def loss(tau, bowl=bowl, noise=noise):
                return bowl(tau) + noise[tau]

            search = run(ParabolicSearch(1024), loss, lambda tau, far=1.3 * bottom: tau > far)
            count += len(search.losses)
            lost += bowl(search.best_tau)
        assert lost / 200 <= 0.002
        assert count / 200 <= 15

    def test_looks_back_from_the_limit(self):
        assert run(ParabolicSearch(100), lambda tau: abs(tau - 70)).best_tau == 70
        falling = run(ParabolicSearch(100), lambda tau: -tau)
        assert falling.best_tau == 100
        assert falling.stopped_because == REACHED_MAX_TAU
        assert [tau for tau, _ in falling.losses][-2:] == [100, 99]


@pytest.mark.parametrize("kind", BOTH)
class TestBoth:
    @given(losses=anything, verdicts=st.integers(0, 2**300 - 1), start=st.just(1) | st.integers(1, 300))
    def test_any_loss_ends_and_never_gets_worse(self, kind, losses, verdicts, start):
        search = run(kind(len(losses) - 1, start), losses.__getitem__, lambda tau: bool(verdicts >> tau & 1))
        observed = [math.inf if not math.isfinite(loss) else loss for _, loss in search.losses]
        assert search.best_loss == min(observed)
        assert dict(search.losses)[search.best_tau] == search.best_loss or search.best_loss == math.inf
        assert search.best_tau == search.losses[observed.index(min(observed))][0]
        assert len({tau for tau, _ in search.losses}) == len(search.losses), "no τ is measured twice"
        if kind is ParabolicSearch and len(losses) > 1:
            assert len(search.losses) <= budget(len(losses) - 1)

    @pytest.mark.parametrize("baseline", [math.nan, math.inf, -math.inf])
    def test_a_baseline_that_is_not_finite_ends_it(self, kind, baseline):
        search = run(kind(8), lambda tau: baseline if tau == 0 else 0.0)
        assert (search.best_tau, len(search.losses)) == (0, 1)
        assert search.stopped_because == BASELINE_NOT_FINITE

    @pytest.mark.parametrize("second", [math.nan, math.inf, 1.0, 1.5])
    def test_a_first_step_that_does_not_help_costs_one_validation(self, kind, second):
        search = run(kind(8), lambda tau: 1.0 if tau == 0 else second)
        assert (search.best_tau, len(search.losses)) == (0, 2)
        assert search.stopped_because == NO_IMPROVEMENT

    def test_minus_infinity_is_not_an_improvement(self, kind):
        assert run(kind(8), lambda tau: 1.0 if tau == 0 else -math.inf).best_tau == 0

    def test_accepted_says_whether_the_last_loss_became_the_best(self, kind):
        search, seen = kind(8), []
        while (tau := search.propose()) is not None:
            search.observe(tau, [5.0, 4.0, 3.0, 9.0, 9.0, 9, 9, 9, 9][tau])
            seen.append((tau, search.accepted))
        assert seen[:3] == [(0, False), (1, True), (2, True)]
        assert not any(accepted for tau, accepted in seen if tau > 2)

    def test_misuse_is_refused(self, kind):
        search = kind(1)
        with pytest.raises(ValueError, match=r"tau=3, but propose\(\) asked for tau=0"):
            search.observe(3, 1.0)
        assert search.propose() == search.propose() == 0
        run(search, lambda tau: 1.0)
        with pytest.raises(RuntimeError, match="the search has ended"):
            search.observe(2, 1.0)

    @pytest.mark.parametrize("bad", [0, -1, 1.5, "8", True, None, 1 << 17])
    def test_max_tau_is_checked(self, kind, bad):
        with pytest.raises(ValueError, match="max_tau must be an integer from 1 to 65536"):
            kind(bad)
        with pytest.raises(ValueError, match="start must be an integer from 1 to 65536"):
            kind(8, bad)


def test_linear_says_why_it_ended():
    assert run(LinearSearch(8), lambda tau: abs(tau - 3)).stopped_because == IMPROVEMENT_ENDED
    assert run(LinearSearch(3), lambda tau: -tau).stopped_because == REACHED_MAX_TAU


def test_make_search_names_what_exists():
    assert type(make_search("linear", 4)) is LinearSearch
    assert make_search("linear", 4, 3).start == 1, "the paper's search takes every step"
    assert make_search("parabolic", 64, 3).start == 3
    assert make_search("parabolic", 4, 1 << 16).start == 4
    with pytest.raises(ValueError, match="'parabolic', 'linear', got 'golden'"):
        make_search("golden")
