"""When stages run: the account that pays for them, against its own promise and on sequences done by hand."""

import math
import random

import pytest

from ffkernels.engine.config import FastForwardConfig
from ffkernels.engine.search import make_search
from ffkernels.engine.stage_schedule import LASTING, SHARE, StageSchedule


def searched(losses, name="parabolic"):
    """A search that has seen ``losses`` of the τ it asks for, as far as they go."""
    search = make_search(name)
    for loss in losses:
        search.observe(search.propose(), loss)
    return search


def steps_with_a_stage(schedule, steps, stage, price):
    """``stage(step)`` gives the losses of the stage that would follow ``step``."""
    ran = []
    for step in range(1, steps + 1):
        due = schedule.due(step)
        schedule.after_step()
        if due:
            schedule.after_stage(step, searched(stage(step)), price)
            ran.append(step)
    return ran


def test_stages_that_pay_run_at_every_interval():
    schedule = StageSchedule(FastForwardConfig(interval=6, warmup=2))
    # 8 steps further at the price of 6 losses of half a step; the loss does not fall in between.
    stage = [3.0, 2.9, 2.8, 2.6, 2.2, 9.0]
    assert steps_with_a_stage(schedule, 40, lambda step: stage, 0.5) == [8, 14, 20, 26, 32, 38]
    assert schedule.balance == 0.0


@pytest.mark.parametrize(("price", "second"), [(0.06, 24), (0.27, 66), (1.0, 210)])
def test_after_a_stage_that_found_nothing_the_pause_is_as_long_as_it_was_dear(price, second):
    schedule = StageSchedule(FastForwardConfig())
    ran = steps_with_a_stage(schedule, 230, lambda step: [3.0, 3.1], price)
    # Two losses of ``price`` steps, and SHARE of a step comes in each step: the next interval's end after it.
    assert ran[:2] == [6, second]
    assert second - 6 > 2 * price / SHARE >= second - 6 - 6


def test_a_step_is_worth_what_training_would_have_taken_for_it():
    schedule = StageSchedule(FastForwardConfig())
    schedule.after_stage(6, searched([3.0, 2.9, 3.5]), 0.1)
    assert schedule.balance == 0.0  # one step further for 0.3
    # Since then six steps brought 0.6, 0.1 each. Another 0.02 is worth a fifth of a step.
    schedule.after_stage(12, searched([2.3, 2.28, 2.5]), 0.1)
    assert schedule.balance == pytest.approx(LASTING * 0.2 - 0.3)
    # Where training brought nothing, a step further is worth a step.
    schedule.balance = 0.0
    schedule.after_stage(18, searched([2.4, 2.39, 2.5]), 0.1)
    assert schedule.balance == 0.0


def test_losses_of_other_examples_are_not_compared():
    schedule = StageSchedule(FastForwardConfig())
    schedule.after_stage(6, searched([3.0, 2.9, 3.5]), 0.1)
    schedule.after_stage(12, searched([2.3, 2.28, 2.5]), 0.1, comparable=False)
    assert schedule.balance == 0.0


def test_a_first_loss_that_is_not_finite_costs_one_loss_and_says_nothing():
    schedule = StageSchedule(FastForwardConfig())
    schedule.after_stage(6, searched([3.0, 2.9, 3.5]), 0.1)
    before = schedule.state_dict()
    schedule.after_stage(12, searched([math.nan]), 0.1)
    assert schedule.state_dict() == {**before, "balance": pytest.approx(-0.1)}
    ended = StageSchedule(FastForwardConfig(patience=1))
    ended.after_stage(6, searched([math.inf]), 0.0)
    assert not ended.ended


def test_what_held_a_saved_run_back_does_not_hold_back_one_of_another_rule():
    lost, ended = StageSchedule(FastForwardConfig()), StageSchedule(FastForwardConfig(patience=1))
    for schedule in (lost, ended):
        schedule.after_stage(6, searched([3.0, 3.1]), 1.0)
    assert not lost.due(12) and not ended.due(12)
    assert lost.fingerprint != StageSchedule(FastForwardConfig()).fingerprint
    for patience, saved in ((None, lost), (3, lost), (None, ended), ("auto", ended)):
        resumed = StageSchedule(FastForwardConfig(patience=patience))
        resumed.load_state_dict(saved.state_dict())
        assert resumed.due(12)
    old = {"failures": 1, "switched_off": False}  # of releases without an account
    resumed = StageSchedule(FastForwardConfig())
    resumed.load_state_dict(old)
    assert resumed.due(12) and resumed.failures == 1


@pytest.mark.parametrize("seed", range(20))
def test_what_it_costs_never_exceeds_what_it_was_worth_and_the_share_but_for_one_stage(seed):
    draw = random.Random(seed)
    price = draw.choice([0.05, 0.27, 0.5, 1.0, 4.0])
    schedule = StageSchedule(FastForwardConfig(interval=draw.choice([1, 3, 6])))
    cost = moved = 0.0
    for step in range(1, 600):
        if schedule.due(step):
            falls = draw.choice([None, 0, 0, 1, 2, 3])
            curve = [math.nan] if falls is None else [3.0 - 0.1 * i for i in range(falls + 1)] + [4.0]
            search = searched(curve)
            while search.propose() is not None:
                search.observe(search.propose(), 4.0)
            schedule.after_stage(step, search, price)
            last = len(search.losses) * price
            cost, moved = cost + last, moved + LASTING * search.best_tau
            assert cost <= moved + SHARE * step + last + 1e-9
        schedule.after_step()


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        (FastForwardConfig(patience=None), 10),
        (FastForwardConfig(patience=2), 2),
        (FastForwardConfig(search="linear"), 3),
        (FastForwardConfig(), 1),
    ],
)
def test_patience_other_than_auto_and_the_papers_search_keep_no_account(config, stages):
    schedule = StageSchedule(config)
    assert len(steps_with_a_stage(schedule, 60, lambda step: [1.0, 2.0], 0.5)) == stages
    assert schedule.ended == (config.patience == 2 or config.search == "linear")


def test_a_resumed_schedule_goes_on_where_the_other_stood():
    losses = {6: [3.0, 2.9, 3.5], 12: [2.9, 2.89, 3.0]}
    whole, first, second = (StageSchedule(FastForwardConfig()) for _ in range(3))
    expected = steps_with_a_stage(whole, 60, lambda step: losses.get(step, [3.0, 3.1]), 0.1)
    ran = steps_with_a_stage(first, 14, lambda step: losses.get(step, [3.0, 3.1]), 0.1)
    second.load_state_dict(first.state_dict())
    for step in range(15, 61):
        if second.due(step):
            ran.append(step)
            second.after_step()
            second.after_stage(step, searched([3.0, 3.1]), 0.1)
        else:
            second.after_step()
    assert ran == expected
    assert second.state_dict() == whole.state_dict()
