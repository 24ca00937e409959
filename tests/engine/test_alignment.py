"""The cosine of each fresh gradient and the last update: its value, where there is none, what it decides."""

import copy
import math

import pytest
import torch
from small_loops import descend

from ffkernels import FastForward, FastForwardConfig, ops
from ffkernels.engine import alignment as module
from ffkernels.engine.alignment import Alignment

TARGET = torch.linspace(-1.0, 2.0, 12).reshape(3, 4)


class Bowl(torch.nn.Module):
    noise = 0.3

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3, 4))
        self.b = torch.nn.Parameter(torch.ones(4))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self, step=0):
        noise = self.noise * torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        return ((self.w - TARGET + noise) ** 2).sum() + (self.b**2).sum()


def held_out(model):
    return float(((model.w - TARGET) ** 2).sum() + (model.b**2).sum())


def train(model, optimizer, steps, first=0):
    """Plain training; the cosines of each step's gradient with the update before, in float64, by hand."""
    cosines, update = [], None
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model.loss(step).backward()
        g = torch.cat([p.grad.flatten().double() for p in (model.w, model.b)])
        cosines.append(None if update is None else float(g @ update / (g.norm() * update.norm())))
        before = [p.detach().clone() for p in (model.w, model.b)]
        optimizer.step()
        pairs = zip((model.w, model.b), before, strict=True)
        update = torch.cat([(p.detach() - old).flatten().double() for p, old in pairs])
    return cosines


def attached(lr=1e-2, **config):
    model = Bowl()
    optimizer = torch.optim.Adam([model.w, model.b], lr=lr)
    return model, optimizer, FastForward(model, optimizer, held_out, FastForwardConfig(**config))


def states_of(parts):
    return copy.deepcopy([part.state_dict() for part in parts])


def resumed(states, order=(0, 1, 2), **options):
    parts = attached(**options)
    for part in order:
        parts[part].load_state_dict(copy.deepcopy(states[part]))
    return parts


def test_it_is_the_cosine_of_the_coming_gradient_with_the_last_update():
    model, optimizer, ff = attached(interval=100)
    plain = Bowl()
    expected = train(plain, torch.optim.Adam([plain.w, plain.b], lr=1e-2), 8)
    train(model, optimizer, 8)
    assert ff._decision.alignment.values == pytest.approx(expected[1:], abs=1e-6) and len(expected) == 8
    assert ff._decision.alignment.last == ff._decision.alignment.values[-1] < 0
    assert ff._decision.alignment.strongest == min(ff._decision.alignment.values)
    assert torch.equal(model.w, plain.w), "looking changes nothing"


def test_too_long_a_step_shows_as_a_positive_one():
    model, optimizer, ff = attached(lr=5.0, interval=100)
    train(model, optimizer, 4)
    assert ff._decision.alignment.values[0] > 0.5 and ff._decision.alignment.strongest <= 0.0


def test_it_has_no_scale():
    scaled = []
    for scale in (1.0, 1024.0):
        model = Bowl()
        optimizer = torch.optim.SGD([model.w, model.b], lr=1e-3 / scale)
        ff = FastForward(model, optimizer, held_out, FastForwardConfig(interval=100))
        for step in range(4):
            descend(optimizer, scale * model.loss(step))
        scaled.append(ff._decision.alignment.values)
    assert scaled[0] == pytest.approx(scaled[1], rel=1e-5) and len(scaled[0]) == 3


@pytest.mark.parametrize("what", ["written", "no gradient", "skipped", "forgotten", "not finite"])
def test_where_there_is_no_such_pair_it_is_not_known(what):
    model, optimizer, ff = attached(interval=100)
    train(model, optimizer, 3)
    known = list(ff._decision.alignment.values)
    if what == "written":
        with torch.no_grad():
            model.w.mul_(1.0)
    elif what == "skipped":  # as a fused optimizer does where it found an infinity
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(model, optimizer, 1, first=3)
        known = list(ff._decision.alignment.values)
    elif what == "forgotten":
        ff.forget_update()
    optimizer.zero_grad()
    if what != "no gradient":
        model.loss(4).backward()
    if what == "not finite":
        model.w.grad[0, 0] = math.nan
    optimizer.step()
    assert ff._decision.alignment.values == known and ff._decision.alignment.last is None


def test_after_a_stage_the_next_but_one_is_known_again():
    model, optimizer, ff = attached(lr=1e-3, interval=3)
    train(model, optimizer, 4)
    assert len(ff.stages) == 1 and ff.stages[0].tau > 0
    assert ff._decision.alignment.values == [] and ff._decision.alignment.last is None
    train(model, optimizer, 1, first=4)
    assert len(ff._decision.alignment.values) == 1


def test_frozen_and_empty_weights_and_missing_gradients_count_as_zero():
    weights = [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.empty(0))]
    weights.append(torch.nn.Parameter(torch.tensor([5.0])))
    table = ops.TensorTable([w.detach() for w in weights])
    looking = Alignment()
    looking.before_step(table, weights)
    assert looking.last is None
    with torch.no_grad():
        table.weights[0].add_(torch.tensor([3.0, 4.0]))
        table.weights[2].add_(12.0)
    looking.after_step(table)
    weights[0].grad = torch.tensor([0.0, -2.0])
    looking.before_step(table, weights)
    assert looking.last == pytest.approx(-8.0 / (2.0 * 13.0))
    assert [best.tolist() for best in table.best] == [[4.0, 6.0], [], [17.0]]


def test_a_stage_runs_where_it_pays_and_says_by_what(monkeypatch):
    model, optimizer, ff = attached(lr=1e-3, interval=4)
    train(model, optimizer, 4)
    stage = ff.stages[0]
    assert stage.alignment < -0.5 and stage.price == pytest.approx(1 / (2 + 16 / 18)) and stage.tau > 10
    monkeypatch.setattr(ff._decision.schedule, "pays", lambda *asked: False)
    train(model, optimizer, 8, first=4)
    assert len(ff.stages) == 1 and len(ff._decision.alignment.values) == 0


@pytest.mark.parametrize(
    ("values", "line", "squared_error"),
    [
        # One second difference, 0.1 − 2·0.3 − 0.2 = −0.7: σ² = 0.49 / 6; weights −1, 2 and 5 of 6.
        ([0.1, 0.3, -0.2], (-0.1 + 0.6 - 1.0) / 6, 0.49 / 6 * 10 / 12 * 6.31**2),
        # −0.1 and 0.2: σ² = 0.05 / 12; weights −2, 1, 4 and 7 of 10.
        ([-0.4, -0.3, -0.3, -0.1], (0.8 - 0.3 - 1.2 - 0.7) / 10, 0.05 / 12 * 14 / 20 * 2.92**2),
        # Four of them, all ±0.4: σ² = 0.16 / 6; weights −4, −1, 2, 5, 8 and 11 of 21.
        ([-0.1, -0.3, -0.1, -0.3, -0.1, -0.3], -5.1 / 21, 0.16 / 6 * 22 / 42 * 2.13**2),
        ([-0.1, -0.2, -0.3, -0.4, -0.5], -0.5, 0.0),  # a trend is no noise
        # Of fewer than three values nobody knows the noise.
        *((values, 0.0, math.inf) for values in ([], [-0.3], [-0.3, 0.2])),
    ],
)
def test_what_noise_may_hide_by_hand(values, line, squared_error):
    alignment = Alignment(kept=6)
    alignment.values = values
    assert alignment.possible() == pytest.approx(line - math.sqrt(squared_error))


def test_the_mean_is_of_the_newest():
    alignment = Alignment(kept=4)
    assert alignment.mean(2) is None
    alignment.values = [0.5, -0.1, -0.3]
    assert alignment.mean(2) == pytest.approx(-0.2) and alignment.mean(4) == pytest.approx(0.1 / 3)


def test_no_more_values_are_kept_than_the_interval_asks_for():
    """A warm-up of stages may be long, and every state has them."""
    model, optimizer, ff = attached(lr=1e-3, interval=7, warmup=1000)
    plain = Bowl()
    expected = train(plain, torch.optim.Adam([plain.w, plain.b], lr=1e-3), 30)
    train(model, optimizer, 30)
    assert ff.state_dict()["alignment"]["values"] == pytest.approx(expected[-7:], abs=1e-6)


def test_where_alignment_is_gone_no_stage_looks_for_it():
    model, optimizer, ff = attached(lr=0.1, interval=4)
    train(model, optimizer, 20)
    early = len(ff.stages)
    train(model, optimizer, 100, first=20)
    assert len(ff.stages) == early < 5 and not ff._decision.schedule.ended
    assert FastForwardConfig().patience == "auto"


def test_with_closures_it_is_said_that_nothing_is_known():
    model, optimizer, ff = attached(lr=1e-3, interval=2)

    def closure():
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    with pytest.warns(ops.FFKernelsNotice, match=r"Adam\.step\(\) is called with a closure"):
        for _ in range(4):
            optimizer.step(closure)
    assert [stage.alignment for stage in ff.stages] == [None, None] and ff.stages[0].tau > 0


@pytest.mark.parametrize("at", range(1, 12))
def test_a_resumed_run_continues_bit_for_bit(at):
    model, optimizer, ff = attached(lr=3e-3, interval=4)
    train(model, optimizer, at)
    saved = states_of((model, optimizer, ff))
    train(model, optimizer, 14 - at, first=at)
    for order in ((0, 1, 2), (2, 1, 0)):
        parts = resumed(saved, order, lr=3e-3, interval=4)
        train(parts[0], parts[1], 14 - at, first=at)
        assert torch.equal(model.w, parts[0].w)
        assert parts[2]._decision.alignment.state_dict(None) == ff._decision.alignment.state_dict(None)
        found = [[(s.optimizer_step, s.tau, s.losses) for s in one.stages] for one in (parts[2], ff)]
        assert found[0] == found[1] != []


@pytest.mark.parametrize("at", [None, 1, 2, 4, 5])
def test_noise_leads_to_a_first_stage_that_the_mean_forbids_also_in_a_resumed_run(monkeypatch, at):
    monkeypatch.setattr(Bowl, "noise", 3.0)
    model, optimizer, ff = attached(lr=1e-4, interval=6)
    if at is not None:
        train(model, optimizer, at)
        model, optimizer, ff = resumed(states_of((model, optimizer, ff)), lr=1e-4, interval=6)
    train(model, optimizer, 6 - (at or 0), first=at or 0)
    plain = Bowl()
    c = train(plain, torch.optim.Adam([plain.w, plain.b], lr=1e-4), 6)[1:]
    assert c == pytest.approx([-0.450, -0.209, -0.556, 0.008, -0.006], abs=1e-3)
    mean, strongest = sum(c[-3:]) / 3, min(c)
    # Half a step by the mean, where 2 · 4 · 0.346 are asked for.
    assert mean / (strongest - mean) == pytest.approx(0.497, abs=1e-3)
    (stage,) = ff.stages
    assert (stage.tau, stage.alignment) == (1024, pytest.approx(mean, abs=1e-6))
    assert stage.price == pytest.approx(9 / 26) and stage.loss_before - stage.loss_after > 1.3


def test_without_the_weights_before_it_goes_on_as_the_run_that_forgot_them():
    model, optimizer, ff = attached(lr=3e-3, interval=4)
    train(model, optimizer, 6)
    ff.forget_update()
    saved = states_of((model, optimizer, ff))
    assert saved[2]["alignment"]["before"] is None
    train(model, optimizer, 6, first=6)
    again, fresh, other = resumed(saved, lr=3e-3, interval=4)
    train(again, fresh, 6, first=6)
    assert torch.equal(model.w, again.w)
    assert other._decision.alignment.values == ff._decision.alignment.values


def test_states_of_before_and_of_other_weights_are_borne():
    model, optimizer, ff = attached(interval=100)
    train(model, optimizer, 3)
    state = ff.state_dict()
    old = {key: value for key, value in state.items() if key != "alignment"}
    ff.load_state_dict(old)
    state["alignment"]["before"] = state["alignment"]["before"][:1]
    ff.load_state_dict(state)
    train(model, optimizer, 1, first=3)
    assert ff._decision.alignment.last is None and len(ff._decision.alignment.values) == 2


def test_on_a_gpu_it_is_read_one_step_later_and_decides_the_same(monkeypatch):
    """The reading as a GPU has it: nothing is read in the step that asked."""
    waits = []

    def late(sums):
        kept = sums.clone()
        return lambda: waits.append(1) or kept.tolist()

    monkeypatch.setattr(module, "read_later", late)
    monkeypatch.setattr(module, "_reads_at_once", lambda device: False)
    model, optimizer, ff = attached(interval=100)
    plain = Bowl()
    expected = train(plain, torch.optim.Adam([plain.w, plain.b], lr=1e-2), 6)
    train(model, optimizer, 6)
    assert ff._decision.alignment.values == pytest.approx(expected[1:-1], abs=1e-6) and len(waits) == 4
    assert ff._decision.alignment.mean(4) == pytest.approx(sum(expected[1:-1]) / 4, abs=1e-6)
    saved = ff._decision.alignment.state_dict(ff._moved.table)
    assert saved["values"] == pytest.approx(expected[1:], abs=1e-6)


def test_the_table_may_move_to_another_device():
    model, optimizer, ff = attached(interval=100)
    train(model, optimizer, 3)
    ff._decision.alignment._sums = torch.empty(3, dtype=torch.float64, device="meta")
    ff.forget_update()  # as the table does when it is made anew
    train(model, optimizer, 2, first=3)
    assert len(ff._decision.alignment.values) == 3


def test_the_event_that_is_waited_for_is_of_the_stream_that_copies(monkeypatch):
    """A model on cuda:1 in a process whose current device is cuda:0."""
    recorded = []

    class Event:
        def record(self, stream=None):
            recorded.append(stream)

    class Pinned:
        def copy_(self, sums, non_blocking):
            assert non_blocking

    class Sums:
        device, shape, dtype = torch.device("cuda:1"), (3,), torch.float64

    monkeypatch.setattr(torch, "empty", lambda *shape, **kwargs: Pinned())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", str(device)))
    module.read_later(Sums())
    assert recorded == [("stream of", "cuda:1")]


class Shard:
    """One of two ranks; ``others`` is what the other one adds, 0 where it has no pair."""

    def __init__(self, rank, others=1.0):
        self.rank, self.size, self.others = rank, 2, others

    def add(self, kind, numbers):
        return [number + self.others for number in numbers]


def stepped(shard):
    """After a step that nothing is known of."""
    weight = torch.nn.Parameter(torch.ones(4))
    alignment, table = Alignment(shard), ops.TensorTable({"w": weight})
    alignment.before_step(table, [weight])
    with torch.no_grad():
        weight.add_(1.0)
    alignment.after_step(table)
    return alignment, table, weight


@pytest.mark.parametrize(
    ("rank", "others", "known"),
    [
        (None, 1.0, True),
        (None, 0.0, False),  # else it would wait for the other's sums for good
        (0, 1.0, True),
        (1, 1.0, False),  # a state of another rank: where shards are equally large, nothing else tells
    ],
)
def test_a_cosine_of_shards_is_taken_where_the_rank_saved_it_and_all_others_take_theirs(rank, others, known):
    alignment, table, weight = stepped(Shard(0, others))
    if rank is not None:
        state = copy.deepcopy(alignment.state_dict(table))
        alignment = Alignment(Shard(rank, others))
        alignment.load_state_dict(state, table)
    weight.grad = torch.ones(4)
    alignment.before_step(table, [weight])
    assert (alignment.last is not None) == known


@pytest.mark.parametrize(("first", "told"), [(1, []), (2, ["OutOfMemoryError"])])
def test_a_rank_that_raises_tells_the_others_only_where_they_listen(monkeypatch, first, told):
    """In a step without an exchange they are in the next backward by then, and neither ends."""

    class Others:
        def fail(self, error, forwards=False):
            heard.append(type(error).__name__)

    def no_room(*args):
        raise torch.OutOfMemoryError("no room on this rank")

    heard = []
    model, optimizer, ff = attached(interval=3)
    train(model, optimizer, first)
    ff.ranks = Others()
    monkeypatch.setattr(ops, "align_", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, optimizer, 1, first=first)
    assert heard == told
