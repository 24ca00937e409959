from __future__ import annotations

import math

import pytest

from ffkernels.analysis.curves import convex_share, replay, shape, turning_points

VALLEY = [(tau - 30) ** 2 / 100 for tau in range(101)]


def test_a_parabola_is_convex_with_one_minimum():
    found = shape(VALLEY)
    assert found["argmin"] == 30 and found["decrease"] == 9.0
    assert found["convex_share"] == 1.0 and found["convex_until"] == 99
    assert found["turning_points"] == 1 and found["unimodal"]
    assert found["linear"] == {
        "tau": 30,
        "evaluations": 32,
        "stopped_because": "loss stopped falling",
        "found": 1.0,
    }
    assert found["parabolic"]["tau"] == 30 and found["parabolic"]["evaluations"] < 16


def test_a_cosine_is_convex_on_every_second_quarter():
    # Period 40: second differences are −2(1 − cos) · f(τ), so above 0 exactly where f is below 0.
    curve = [math.cos(2 * math.pi * (tau + 0.6) / 40) for tau in range(80)]
    expected = sum(f < 0 for f in curve[1:-1]) / 78
    found = shape(curve)
    assert found["convex_share"] == pytest.approx(expected) and expected == 40 / 78
    assert found["convex_until"] == 0
    assert found["turning_points"] == 3 and not found["unimodal"]
    assert found["linear"]["tau"] == 19  # the first valley


def test_convex_at_first_and_then_not():
    # Second differences 2, 2, 2, then −2.
    found = shape([9, 4, 1, 0, 1, 0])
    assert found["convex_share"] == 0.75 and found["convex_until"] == 3
    assert found["turning_points"] == 2 and not found["unimodal"]


@pytest.mark.parametrize(
    ("losses", "turns", "unimodal"),
    [
        ([3, 2, 1], 0, True),
        ([1, 2, 3], 0, True),
        ([1, 1, 1], 0, True),
        ([3, 2, 2, 2, 1], 0, True),
        ([3, 2, 2, 3], 1, True),
        ([1, 2, 1], 1, False),
        ([3, 2, 3, 2, 3], 3, False),
    ],
)
def test_turning_points(losses, turns, unimodal):
    assert turning_points(losses) == turns
    assert shape(losses)["unimodal"] is unimodal


def test_a_flat_curve_falls_nowhere():
    found = shape([1.0, 1.0, 1.0, 1.0])
    assert found["argmin"] == 0 and found["decrease"] == 0 and found["convex_share"] == 0
    assert found["linear"]["tau"] == found["parabolic"]["tau"] == 0
    assert math.isnan(found["linear"]["found"])


def test_a_small_bump_stops_the_linear_search_alone():
    curve = list(VALLEY)
    curve[3] = curve[2] + 1e-3
    found = shape(curve)
    assert found["turning_points"] == 3 and not found["unimodal"]
    assert found["linear"]["tau"] == 2
    assert found["linear"]["found"] == pytest.approx((9 - 7.84) / 9)
    assert found["parabolic"]["tau"] == 30


def test_a_search_that_reaches_the_end_says_so():
    falling = [-float(tau) for tau in range(11)]
    for search in ("linear", "parabolic"):
        assert replay(search, falling)["tau"] == 10
        assert replay(search, falling)["stopped_because"] == "reached max_tau"


def test_losses_that_are_not_finite_are_hills():
    found = shape([2.0, 1.0, 1.5, math.nan, math.inf])
    assert found["argmin"] == 1 and found["linear"]["tau"] == 1 and found["unimodal"]
    assert found["turning_points"] == 1
    assert convex_share([2.0, 1.0, 1.5, math.inf, math.inf]) == 1.0  # one finite second difference


def test_what_is_no_curve_is_refused():
    with pytest.raises(ValueError, match="2 losses"):
        shape([1.0, 2.0])
    with pytest.raises(ValueError, match="tau 0 is not finite"):
        shape([math.nan, 1.0, 2.0])
