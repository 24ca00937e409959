"""When stages run: what alignment and the last stage lead one to expect, on sequences done by hand."""

import math

import pytest

from ffkernels.engine.config import FastForwardConfig
from ffkernels.engine.schedule import FEWEST, StageSchedule
from ffkernels.search.search import make_search


def searched(losses, name="parabolic"):
    """A search that has seen ``losses`` of the τ it asks for, as far as they go."""
    search = make_search(name)
    for loss in losses:
        search.observe(search.propose(), loss)
    return search


FOUND_8 = [3.0, 2.9, 2.8, 2.6, 2.2, 9.0]  # at 0, 1, 2, 4, 8 and 16
NOTHING = [3.0, 3.1]
QUIET = math.inf  # no noise says more than the mean does


def test_intervals_end_after_the_warm_up():
    schedule = StageSchedule(FastForwardConfig(interval=6, warmup=2))
    assert [step for step in range(1, 30) if schedule.due(step)] == [8, 14, 20, 26]


@pytest.mark.parametrize(("interval", "averaged"), [(1, 1), (2, 1), (5, 3), (6, 3), (10, 5)])
def test_the_second_half_of_an_interval_says_what_it_comes_to(interval, averaged):
    assert StageSchedule(FastForwardConfig(interval=interval)).averaged == averaged


@pytest.mark.parametrize(
    ("alignment", "possible", "strongest", "expected"),
    [
        (-0.3, QUIET, -0.6, 1.0),  # half of the slope is gone with one step: one more, and it is 0
        (-0.5, QUIET, -0.6, 5.0),
        (-0.2, QUIET, -0.6, 0.5),
        (-0.6, QUIET, -0.6, math.inf),
        (-0.7, QUIET, -0.6, math.inf),  # a mean beyond what was seen before it
        (0.0, QUIET, -0.6, 0.0),
        (0.1, QUIET, -0.6, 0.0),
        (None, QUIET, 0.0, math.inf),  # nothing is known yet
        (-0.3, -0.4, -0.6, 2.0),  # noise may hide that a third is gone, and not half
        (-0.4, -0.3, -0.6, 2.0),  # a mean that is stronger counts as ever
        (0.01, -0.3, -0.6, 1.0),
        (0.01, 0.005, -0.6, 0.0),  # sure that the last step went too far
        (0.04, -0.02, 0.0, math.inf),  # no c below 0 yet, and not sure that there is none
        (0.04, 0.03, 0.0, 0.0),
        (-0.1, -math.inf, -0.6, math.inf),  # how noisy c is nobody knows
    ],
)
def test_of_a_first_stage_the_slope_says_what_it_would_find_and_noise_what_it_may(
    alignment, possible, strongest, expected
):
    schedule = StageSchedule(FastForwardConfig())
    assert schedule.expected_tau(alignment, possible, strongest) == pytest.approx(expected)


def test_that_is_one_try_and_the_price_holds_for_it():
    schedule = StageSchedule(FastForwardConfig())
    # As a mean -0.1 leaves 1/5 of a step; as -0.4 two, of which one counts, against FEWEST losses.
    assert not schedule.pays(-0.1, -0.4, -0.6, 0.26) and schedule.pays(-0.1, -0.4, -0.6, 0.25)
    schedule.after_stage(searched(NOTHING), -0.1)
    assert schedule.expected_tau(-0.1, -0.6, -0.6) == pytest.approx(0.2)
    assert not schedule.pays(-0.1, -0.6, -0.6, 0.03) and schedule.pays(-0.1, -0.6, -0.6, 0.025)


def test_an_alignment_that_noise_had_the_better_of_is_no_measure_for_later_ones():
    schedule = StageSchedule(FastForwardConfig())
    schedule.after_stage(searched(FOUND_8), 0.002)
    assert schedule.last == (8, 6, 0.002)
    assert schedule.expected_tau(-0.01, -0.02, -0.05) == 8.0
    assert schedule.expected_tau(0.01, -0.02, -0.05) == 0.0


def test_later_the_last_stage_says_so_as_far_as_alignment_has_kept_up():
    schedule = StageSchedule(FastForwardConfig())
    schedule.after_stage(searched(FOUND_8), -0.5)
    assert schedule.last == (8, 6, -0.5)
    assert schedule.expected_tau(-0.25, QUIET, -0.6) == pytest.approx(4.0)  # the slope alone says 0.7
    assert schedule.expected_tau(-0.55, QUIET, -0.6) == pytest.approx(11.0)  # here it says more than 8.8
    assert schedule.expected_tau(0.02, QUIET, -0.6) == 0.0
    assert schedule.expected_tau(None, QUIET, -0.6) == 8.0
    schedule.after_stage(searched(NOTHING), -0.1)
    assert schedule.expected_tau(-0.3, QUIET, -0.6) == pytest.approx(1.0)
    assert schedule.expected_tau(None, QUIET, -0.6) == 0.0


@pytest.mark.parametrize(("price", "runs"), [(0.2, True), (0.25, True), (0.26, False), (1.0, False)])
def test_a_first_stage_runs_where_half_of_its_steps_pay_for_the_fewest_losses(price, runs):
    # r = 2/3: two steps, of which one counts, against FEWEST losses.
    assert StageSchedule(FastForwardConfig()).pays(-0.4, QUIET, -0.6, price) == runs
    assert FEWEST == 4


def test_a_later_stage_is_held_against_what_the_last_one_took():
    schedule = StageSchedule(FastForwardConfig())
    schedule.after_stage(searched(FOUND_8), -0.5)
    # Half of eight steps against six losses.
    assert schedule.pays(-0.5, QUIET, -2.0, 4 / 6) and not schedule.pays(-0.5, QUIET, -2.0, 0.7)
    schedule.after_stage(searched(NOTHING), -0.5)
    # One that found nothing took few losses because it found nothing.
    assert not schedule.pays(-0.4, QUIET, -0.6, 0.3) and schedule.pays(-0.4, QUIET, -0.6, 0.25)


def test_stages_that_fail_in_a_row_come_ever_more_seldom():
    """However strongly gradients agree: held-out examples may go up while those of training go down."""

    def end_of_interval(schedule, losses):
        runs = schedule.pays(-0.59, QUIET, -0.6, 0.3)
        if runs:
            schedule.after_stage(searched(losses), -0.59)
        return runs

    schedule = StageSchedule(FastForwardConfig())
    ran = [interval for interval in range(100) if end_of_interval(schedule, NOTHING)]
    assert ran == [0, 1, 3, 7, 15, 31, 63]
    resumed = StageSchedule(FastForwardConfig())
    resumed.load_state_dict(schedule.state_dict())
    later = [interval for interval in range(100, 130) if end_of_interval(resumed, FOUND_8)]
    assert later == [127, 128, 129]  # one that finds a step ends it


def test_a_first_loss_that_is_not_finite_says_nothing():
    schedule = StageSchedule(FastForwardConfig())
    schedule.after_stage(searched(FOUND_8), -0.5)
    before = schedule.state_dict()
    schedule.after_stage(searched([math.nan]), -0.4)
    assert schedule.state_dict() == before
    ended = StageSchedule(FastForwardConfig(patience=1))
    ended.after_stage(searched([math.inf]))
    assert not ended.ended


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        (FastForwardConfig(patience=None), 10),
        (FastForwardConfig(patience=2), 2),
        (FastForwardConfig(search="linear"), 3),
    ],
)
def test_patience_other_than_auto_and_the_papers_search_look_at_no_alignment(config, stages):
    schedule = StageSchedule(config)
    ran = 0
    for step in range(1, 61):
        if schedule.due(step):
            schedule.after_stage(searched([1.0, 2.0]))
            ran += 1
    assert ran == stages and not schedule.asks_alignment
    assert schedule.ended == (config.patience == 2 or config.search == "linear")


def test_what_ended_a_saved_run_does_not_end_one_of_another_rule():
    ended = StageSchedule(FastForwardConfig(patience=1))
    ended.after_stage(searched(NOTHING))
    assert not ended.due(12)
    for patience in (None, "auto"):
        resumed = StageSchedule(FastForwardConfig(patience=patience))
        resumed.load_state_dict(ended.state_dict())
        assert resumed.due(12) and resumed.failures == 1


def test_a_resumed_schedule_expects_what_the_other_did():
    first, second = StageSchedule(FastForwardConfig()), StageSchedule(FastForwardConfig())
    first.after_stage(searched(FOUND_8), -0.5)
    assert first.fingerprint != second.fingerprint
    second.load_state_dict(first.state_dict())
    assert first.fingerprint == second.fingerprint
    assert [s.expected_tau(-0.25, QUIET, -0.6) for s in (first, second)] == pytest.approx([4.0, 4.0])
