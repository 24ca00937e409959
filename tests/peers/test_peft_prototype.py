"""The prototype of PEFT's #2693 as it is: its schedule, and each fault in benchmarks/peers/README.md."""

from __future__ import annotations

import math

import pytest
import torch

from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.training.peers import load_peer
from ffkernels.validation.flops import count_flops


def prototype(**options):
    return lambda session: load_peer("peft-prototype")(session, **options)


def take(session, number):
    """The first ``number`` optimizer steps; all weights after each."""
    after = []
    for step in range(number):
        session.step(step)
        after.append([p.detach().clone() for p in session.model.parameters()])
    return after


class Loss:
    def __init__(self, value):
        self.loss = torch.tensor(value)


def say(peer, *losses):
    """Let the peer's validations return these instead of running the model; the divisors it asked for."""
    script, tokens = iter(losses), []
    peer.forward = lambda number: tokens.append(number) or Loss(next(script))
    return tokens


def test_a_stage_after_every_sixth_step_repeats_the_update_until_the_loss_rises(opened):
    session = opened(prototype())
    say(session.ff, 3.0, 2.0, 2.5, 1.0, 1.5)
    take(session, 12)
    first, second = session.ff.stages
    assert (first.optimizer_step, second.optimizer_step) == (6, 12)
    assert first.losses == [(1, 3.0), (2, 2.0), (3, 2.5)]
    assert second.losses == [(1, 1.0), (2, 1.5)]


def test_fault_there_is_no_baseline_and_the_last_step_stays(opened):
    plain = take(opened(), 6)
    session = opened(prototype())
    say(session.ff, 8.0, 9.0)  # whatever the loss was before: the first is never compared with it
    *_, moved = take(session, 6)
    assert session.ff.stages[0].tau == 2
    for before, after, weight in zip(plain[4], plain[5], moved, strict=True):
        torch.testing.assert_close(weight, after + 2 * (after - before), rtol=0, atol=1e-6)


def test_fault_it_clones_every_parameter_in_every_step(opened):
    session = opened(prototype())
    say(session.ff, 1.0, 2.0)
    everything = sum(p.nbytes for p in session.model.parameters())
    held = []
    for step in range(6):
        session.step(step)
        held.append(session.ff.held / everything)
    assert held == [1, 1, 1, 1, 1, 2]  # after a stage the differences of all of them as well, mostly zeros
    frozen = [
        d
        for d, p in zip(session.ff.difference, session.model.parameters(), strict=True)
        if not p.requires_grad
    ]
    assert sum(d.nbytes for d in frozen) > 0.9 * everything
    assert not any(d.any() for d in frozen)
    session.close()
    assert session.ff.held == 0


def test_fault_the_clones_of_steps_without_a_stage_cost_time_too(opened):
    session = opened(prototype())
    say(session.ff, 1.0, 2.0)
    take(session, 5)
    waiting = session.ff._seconds["move"]
    assert waiting > 0
    session.step(5)
    assert session.ff.stages[0].move_seconds > waiting


@pytest.mark.filterwarnings("ignore::ffkernels.ops.notices.FFKernelsNotice")
def test_fault_it_validates_in_train_mode_with_autograd_on(opened):
    session = opened(prototype(cap=2), dropout=0.3)
    take(session, 6)
    assert session.ff.outputs.loss.requires_grad and session.ff.outputs.loss.grad_fn is not None
    once, twice = session.ff.forward(10).loss.item(), session.ff.forward(10).loss.item()
    assert once != twice  # the same weights and examples: the difference is dropout's
    assert float(session.validation()) == float(session.validation())


def test_fault_the_training_batch_divides_the_validation_loss(opened):
    session = opened(prototype())
    tokens = say(session.ff, 1.0, 2.0, 1.0, 2.0)
    take(session, 12)
    sizes = [int(batch["attention_mask"].sum()) for s in (5, 11) for batch in session.load(s).micro_batches]
    assert tokens == [sizes[0]] * 2 + [sizes[1]] * 2
    assert sizes[0] != sizes[1]
    del session.ff.forward
    session.model.eval()
    with torch.no_grad():
        losses = [session.ff.forward(number).loss.item() for number in (40, 80)]
        mean = session.model(**session.ff.batch).loss.item()
    labelled = int((session.ff.batch["labels"][:, 1:] != -100).sum())
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(mean * labelled / 40, rel=1e-5)


def test_it_looks_at_ten_examples_in_one_batch(opened):
    session = opened(prototype())
    assert len(session.ff.batch["input_ids"]) == 10
    rows = {tuple(row["input_ids"]) for row in session.task.validation}
    batch = session.ff.batch
    seen = {
        tuple(i[m.bool()].tolist()) for i, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert len(seen) == 10 and seen <= rows


def test_fault_nan_goes_on_to_the_cap(opened, monkeypatch):
    monkeypatch.setattr("ffkernels.ops.notices._announced", set())
    session = opened(prototype(cap=4))
    say(session.ff, *[math.nan] * 9)
    with pytest.warns(FFKernelsNotice, match="repeated an update 4 times, its own limit"):
        take(session, 6)
    assert session.ff.stages[0].evaluations == session.ff.stages[0].tau == 4
    assert load_peer("peft-prototype")(opened()).cap == 1000


def test_a_stage_is_charged_its_forwards_and_moves(opened):
    session = opened(prototype())
    say(session.ff, 3.0, 2.0, 2.5)
    take(session, 6)
    (stage,) = session.ff.stages
    forward = count_flops(lambda: session.model(**session.ff.batch))
    everything = sum(p.numel() for p in session.model.parameters())
    assert forward > 0
    assert stage.flops == 3 * (forward + 2 * everything)


def test_making_it_leaves_the_random_numbers_alone(opened):
    session = opened()
    before = torch.get_rng_state()
    load_peer("peft-prototype")(session).detach()
    assert torch.equal(torch.get_rng_state(), before)
