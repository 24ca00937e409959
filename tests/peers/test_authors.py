"""The authors' loop as it is: its schedule, and each fault that benchmarks/peers/README.md tells of."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from ffkernels import FastForwardConfig
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.training.peers import load_module, load_peer
from ffkernels.validation.flops import count_flops


def authors(**options):
    return lambda session: load_peer("authors")(session, **options)


def take(session, number):
    """The first ``number`` optimizer steps; the trainable weights after each."""
    after = []
    for step in range(number):
        session.step(step)
        after.append([p.detach().clone() for p in session.trainable])
    return after


def say(peer, *losses):
    """Let the peer's validations return these instead of running the model."""
    script = iter(losses)
    peer.evaluate = lambda batches: next(script)


def unannounced(monkeypatch):
    """As in a process that has said nothing yet."""
    monkeypatch.setattr("ffkernels.ops.notices._announced", set())


def test_a_stage_after_every_sixth_step_repeats_the_update_until_the_loss_rises(opened):
    session = opened(authors())
    say(session.ff, 3.0, 2.0, 2.5, 9.0, 1.0, 1.5)
    take(session, 12)
    first, second = session.ff.stages
    assert (first.optimizer_step, second.optimizer_step) == (6, 12)
    assert first.losses == [(1, 3.0), (2, 2.0), (3, 2.5)]
    assert second.losses == [(1, 9.0), (2, 1.0), (3, 1.5)]
    assert [s.stopped_because for s in (first, second)] == [
        "the loss rose; the step that raised it stays"
    ] * 2


def test_fault_the_step_that_raised_the_loss_stays(opened):
    plain = take(opened(), 6)
    session = opened(authors())
    say(session.ff, 3.0, 2.0, 2.5)
    *_, moved = take(session, 6)
    assert session.ff.stages[0].tau == 3  # where the best loss was that of τ = 2
    for before, after, weight in zip(plain[4], plain[5], moved, strict=True):
        torch.testing.assert_close(weight, after + 3 * (after - before), rtol=0, atol=1e-6)


def test_fault_without_a_baseline_the_first_step_is_kept_although_it_does_harm(opened):
    """At a learning rate that is too large, each further step does harm; ours stays where it is."""
    rate = {"lr": 0.03}
    plain = opened(**rate)
    take(plain, 6)
    before = float(plain.validation())
    session = opened(authors(), **rate)
    take(session, 6)
    assert session.ff.stages[0].losses[0][0] == 1  # τ = 0 was never measured
    assert session.ff.stages[0].tau >= 2
    assert float(session.validation()) > before + 0.5
    ours = opened(**rate, fast_forward=FastForwardConfig(search="linear"))
    take(ours, 6)
    assert ours.ff.stages[0].tau == 0
    assert float(ours.validation()) == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("loss", [math.nan, 2.0], ids=["nan", "equal"])
def test_fault_nothing_but_a_rise_ends_a_stage(opened, monkeypatch, loss):
    unannounced(monkeypatch)
    session = opened(authors(cap=7))
    say(session.ff, *[loss] * 100)
    with pytest.warns(FFKernelsNotice, match="repeated an update 7 times.*the original has no end for that"):
        take(session, 6)
    assert session.ff.stages[0].evaluations == session.ff.stages[0].tau == 7
    assert session.ff.stages[0].stopped_because == "cap of 7 repetitions"


def test_fault_a_nan_among_the_weights_is_repeated_to_the_cap(opened, monkeypatch):
    unannounced(monkeypatch)
    session = opened(authors(cap=3))
    take(session, 5)
    with torch.no_grad():
        session.trainable[0].fill_(math.nan)
    with pytest.warns(FFKernelsNotice, match="the last: nan"):
        session.step(5)
    assert [math.isnan(loss) for _, loss in session.ff.stages[0].losses] == [True] * 3


def test_fault_every_stage_after_the_first_leaves_two_more_copies_of_the_adapter(opened):
    session = opened(authors())
    say(session.ff, *[1.0, 2.0] * 4)
    adapter = sum(p.nbytes for p in session.trainable)
    held = []
    for step in range(24):
        session.step(step)
        held.append(session.ff.held)
    copies = [bytes_ / adapter for bytes_ in held[5::6]]
    assert copies == [1, 3, 5, 7]  # the last difference, and twice the stages before
    session.close()
    assert session.ff.held == 0


def test_fault_the_loss_is_a_mean_of_batch_means(opened):
    session = opened(authors(eval_batch_size=2))
    peer = session.ff
    session.model.eval()
    with torch.no_grad():
        means = [session.model(**batch).loss.item() for batch in peer.validation]
    assert len(means) == 8
    assert peer.evaluate(peer.validation) == pytest.approx(sum(means) / 8, abs=1e-6)
    by_tokens = float(session.validation())
    assert abs(peer.evaluate(peer.validation) - by_tokens) > 1e-3
    whole = opened(authors(eval_batch_size=16)).ff  # one batch: nothing to weight, but another number
    assert whole.evaluate(whole.validation) == pytest.approx(by_tokens, abs=1e-5)


@pytest.mark.filterwarnings("ignore::ffkernels.ops.notices.FFKernelsNotice")
def test_fault_its_test_evaluation_turns_dropout_off_until_the_next_stage(opened):
    session = opened(authors(evaluate_every=1, cap=2), dropout=0.1)
    training = []
    for step in range(8):
        training.append(session.model.training)
        session.step(step)
    # Step 1 trains, the evaluation after it ends that; the stage after step 6 turns training on for one step.
    assert training == [True, False, False, False, False, False, True, False]


def test_fault_a_stage_disturbs_the_random_numbers_of_training(opened):
    session = opened(authors())
    before = torch.get_rng_state()
    session.ff.evaluate(session.ff.validation)
    assert not torch.equal(torch.get_rng_state(), before)
    before = torch.get_rng_state()
    session.validation()
    assert torch.equal(torch.get_rng_state(), before)


def test_fault_every_repetition_costs_a_dict_a_pool_and_a_load_state_dict(opened, monkeypatch):
    module, pools = load_module("authors"), []

    class Counted(ThreadPoolExecutor):
        def __init__(self, *args, **kwargs):
            pools.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Counted)
    session = opened(authors())
    loads, load = [], session.model.load_state_dict
    session.model.load_state_dict = lambda state, strict: (
        loads.append((len(state), strict)) or load(state, strict)
    )
    say(session.ff, 4.0, 3.0, 2.0, 2.5)
    take(session, 6)
    assert loads == [(len(session.trainable), False)] * 4
    assert len(pools) == 1 + 4


def test_fault_stabilization_counts_micro_batches(opened):
    """Of four micro-batches a step, "10 steps" are two and a half; of one they are ten."""
    session = opened(authors(stabilization=10), micro_batch_size=1)
    say(session.ff, 1.0, 2.0)
    take(session, 8)
    assert [stage.optimizer_step for stage in session.ff.stages] == [8]  # counted from the third on
    session = opened(authors(stabilization=10, interval=2))
    say(session.ff, 1.0, 2.0)
    take(session, 12)  # where each is a step it asks after the step: the eleventh is the first to count
    assert [stage.optimizer_step for stage in session.ff.stages] == [12]


def test_fault_only_names_with_lora_in_them_move(opened, monkeypatch):
    unannounced(monkeypatch)
    dora = opened(authors(), method="dora")
    assert dora.ff.names == dora.names  # magnitudes are called lora_magnitude_vector
    plain = torch.nn.Linear(2, 1)
    session = SimpleNamespace(
        **{**vars(dora), "model": plain, "optimizer": torch.optim.SGD(plain.parameters())}
    )
    monkeypatch.setattr(load_module("authors").AuthorsLoop, "evaluate", lambda self, batches: 1.0)
    with pytest.warns(FFKernelsNotice, match="no parameter has 'lora' in its name"):
        peer = load_peer("authors")(session, interval=2, cap=3)
    weight = plain.weight.detach().clone()
    plain.weight.grad = torch.zeros_like(weight)
    with pytest.warns(FFKernelsNotice, match="repeated an update 3 times"):
        session.optimizer.step(), session.optimizer.step()
    assert torch.equal(plain.weight, weight)
    assert peer.stages[0].flops == 0 and peer.stages[0].evaluations == 3


def test_a_stage_is_charged_its_forwards_and_moves(opened):
    session = opened(authors())
    say(session.ff, 3.0, 2.0, 2.5)
    take(session, 6)
    (stage,) = session.ff.stages
    batches = list(session.ff.validation)

    def forward():
        with torch.no_grad():
            for batch in batches:
                session.model(**batch)

    adapter = sum(p.numel() for p in session.trainable)
    assert count_flops(forward) > 0
    assert stage.flops == 3 * (count_flops(forward) + 2 * adapter)
    assert stage.seconds == pytest.approx(stage.validate_seconds + stage.move_seconds)
    assert stage.move_seconds > 0


def test_detached_it_lets_the_optimizer_alone(opened):
    session = opened(authors(interval=2))
    say(session.ff, 1.0, 2.0)
    take(session, 2)
    session.close()
    session.close()
    moved = [p.detach().clone() for p in session.trainable]
    for step in range(2, 6):
        session.step(step)
    assert len(session.ff.stages) == 1
    assert any(not torch.equal(a, b) for a, b in zip(moved, session.trainable, strict=True))


@pytest.mark.parametrize("bad", [{"interval": 1}, {"cap": 1}, {"eval_batch_size": 0}, {"stabilization": -1}])
def test_bad_options_are_named(opened, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}: must be an integer of at least"):
        opened(authors(**bad))
