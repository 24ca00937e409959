"""The decision kernel under Triton's interpreter: the same choices as the Python searches on any losses."""

import math
import random
import re
from types import SimpleNamespace

import pytest
import torch

from ffkernels.search import search as python
from ffkernels.search.significance import Rises, critical_values, jackknife_weights
from ffkernels.stage import program

pytest.importorskip("triton", reason="triton is not installed")

SEARCHES = ["linear", "parabolic"]
MAX_TAUS = [1, 2, 3, 4, 5, 7, 16, 31, 100, 256, 1024, 1 << 16]


@pytest.fixture(scope="module")
def device(interpreted):
    """The module; Triton's language is made ready for the interpreter once, not for each of many launches."""
    from triton.runtime import interpreter

    module, prepare = interpreted("decide"), interpreter._patch_lang
    prepared = prepare(module._decide_kernel.fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))
        yield module
    prepared.restore()


class Twins:
    """Both searches, fed the same losses and compared after each. `tokens`: of losses by example."""

    def __init__(self, device, name, max_tau, tokens=None, start=1):
        self.device, self.name, self.max_tau = device, name, max_tau
        self.state = device.DecideState(name, max_tau, "cpu", rows=0 if tokens is None else len(tokens))
        self.begin(tokens, start)

    def begin(self, tokens=None, start=1):
        """A fresh search on the host; the device is told of examples and start, as an executor does it."""
        self.python, self.rises = python.make_search(self.name, self.max_tau, start), Rises(tokens)
        self.state.start_at(start)
        self.sure = []
        if tokens is not None:
            told = (tokens, jackknife_weights(tokens)) if self.rises.tokens is not None else ()
            self.state.know(critical_values(sum(n > 0 for n in tokens), self.state.capacity), *told)

    def observe(self, loss, sums=None):
        """`loss`, or the sums by example that it is the mean of."""
        self.sure.append(self.rises.sure(loss, sums))
        self.python.observe(self.python.propose(), loss, self.sure[-1])
        if sums is not None:
            sums = torch.tensor(sums, dtype=torch.float64)
        self.device.decide(self.state, torch.tensor(loss, dtype=torch.float64), sums)
        following = self.python.propose()
        k = 0 if following is None else following - self.python.best_tau
        found = (self.state.accept.item(), self.state.k.item(), self.state.go.item())
        assert found == (self.python.accepted, k, following is not None), self.python.losses

    def run(self, loss):
        """`loss(τ)`: a number, or a pair of it and its sums."""
        while (tau := self.python.propose()) is not None:
            measured = loss(tau)
            self.observe(*(measured if isinstance(measured, tuple) else (measured,)))
        read = self.state.read()
        assert read.best_tau == self.python.best_tau, self.python.losses
        assert read.stopped_because == self.python.stopped_because, self.python.losses
        assert read.best_loss == self.python.best_loss
        assert repr(read.losses) == repr(self.python.losses)  # repr: nan is not equal to itself
        assert read.sure == self.sure, self.python.losses
        return read


def bowl(draw, max_tau):
    """What a loss along an update looks like: skewed, its bottom anywhere, more or less noise on it."""
    bottom, scale = draw.uniform(0, 1.5 * max_tau), 10 ** draw.uniform(-9, 3)
    skew = draw.uniform(0.05, 3) / max(bottom, 1)
    noise = draw.choice([0, 0, 1e-6, 1e-3, 0.1]) * scale
    return lambda tau: 2 + scale * (1 - math.exp(-skew * (tau - bottom))) ** 2 + noise * draw.gauss(0, 1)


def parabola(draw, max_tau):
    bottom = draw.randint(0, max_tau) + draw.choice([0, 0.5, draw.random()])
    return lambda tau: (tau - bottom) ** 2 / max_tau


def kink(draw, max_tau):
    bottom = draw.randint(0, max_tau)
    return lambda tau: abs(tau - bottom) * (draw.choice([0.1, 1]) if tau > bottom else 1)


def bfloat16(draw, max_tau):
    """A smooth loss that takes few values: ties and plateaus."""
    smooth = bowl(draw, max_tau)
    return lambda tau: torch.tensor(smooth(tau)).bfloat16().item()


def constant(draw, max_tau):
    value = draw.choice([0.0, 1.0, -1e300])
    return lambda tau: value


def broken(draw, max_tau):
    """A bowl that is not a number, or not finite, here and there."""
    whole, share = bowl(draw, max_tau), draw.choice([0.05, 0.3, 0.9])
    return lambda tau: draw.choice([math.nan, math.inf, -math.inf]) if draw.random() < share else whole(tau)


def extreme(draw, max_tau):
    """Sums and quotients that overflow or lose all their digits."""
    scale = draw.choice([5e-324, 1e-310, 1e-160, 1e155, 1.7e308])
    whole = draw.choice([parabola, bowl])(draw, max_tau)
    return lambda tau: scale * min(max(whole(tau) - 2, -1), 1)


KINDS = {kind.__name__: kind for kind in (bowl, parabola, kink, bfloat16, constant, broken, extreme)} | {
    "falling": lambda draw, max_tau: lambda tau: -float(tau),
    "noise": lambda draw, max_tau: lambda tau: draw.random(),
    "mostly_falling": lambda draw, max_tau: lambda tau: -tau + draw.gauss(0, 0.3) * tau,
    "few_values": lambda draw, max_tau: lambda tau: float(draw.randint(0, 3)),
}
EACH = 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_thousand_loss_sequences_give_the_same_choices(device, name, kind):
    """1,100 sequences in all."""
    draw = random.Random(f"{name} {kind}")
    for _ in range(EACH):
        # A linear search takes every step: long ones would only be slow.
        max_tau = draw.choice(MAX_TAUS if name == "parabolic" else MAX_TAUS[:6])
        start = draw.choice([1, 1, 2, 3, 17, draw.randint(1, max_tau), max_tau])
        Twins(device, name, max_tau, start=start).run(KINDS[kind](draw, max_tau))


def by_example(draw, curve, tokens, noise, tilt):
    """A curve as the mean of examples that differ in how they react to a step, with noise of their own."""
    base = [n * draw.uniform(1, 4) for n in tokens]
    reacts = [n * (1 + tilt * draw.gauss(0, 1)) for n in tokens]

    def measure(tau):
        moved = curve(tau)
        sums = [
            b + r * moved + n * noise * draw.gauss(0, 1) for b, r, n in zip(base, reacts, tokens, strict=True)
        ]
        return sum(sums) / sum(tokens), sums

    return measure


def test_rises_are_told_from_noise_as_on_the_host(device):
    """Losses by example, few and of very different lengths, some rows empty; verdicts of both kinds."""
    draw, verdicts = random.Random(1), []
    for turn in range(48):
        kind = KINDS[["bowl", "constant", "noise", "falling", "broken", "extreme"][turn % 6]]
        tokens = [draw.choice([0, 1, 7, 30, 200]) for _ in range(draw.choice([4, 5, 7, 9]))]
        tokens[:3] = [3, 50, 11]  # three at least, which prove nothing
        if turn == 0:  # more rows than are copied at once
            tokens = [draw.randint(0, 9) for _ in range(67)]
        twins = Twins(
            device, "parabolic", draw.choice([1, 3, 16, 100, 1024]), tokens, draw.choice([1, 5, 64])
        )
        level, curve = draw.choice([0, 1e-12, 1e-3, 0.1, 10]), kind(draw, twins.python.max_tau)
        read = twins.run(by_example(draw, curve, tokens, level, draw.choice([0, 0.1, 2])))
        if twins.rises.tokens is not None:
            rose = [loss > min(x for _, x in read.losses[:i]) for i, (_, loss) in enumerate(read.losses) if i]
            verdicts += [sure for sure, up in zip(read.sure[1:], rose, strict=True) if up]
    assert verdicts.count(True) > 10 < verdicts.count(False)


def test_other_examples_are_told_apart_in_place(device):
    """After an exchange the same memory tells of them; too few prove nothing, and every rise counts then."""
    draw = random.Random(5)
    first, fewer, others = [3, 9, 40, 5, 8], [3, 9, 40, 0, 0], [30, 2, 6, 0, 21]
    twins = Twins(device, "parabolic", 64, first)
    address = twins.state._examples.data_ptr()
    for tokens in (first, fewer, others, first):
        twins.state.reset()
        twins.begin(tokens)
        read = twins.run(by_example(draw, lambda tau: 0.001 * (tau - 20) ** 2, tokens, 0.05, 0.5))
        if tokens is fewer:
            losses = [loss for _, loss in read.losses]
            assert read.sure == [i > 0 and loss >= min(losses[:i]) for i, loss in enumerate(losses)]
    assert twins.state._examples.data_ptr() == address


def test_another_start_is_told_in_place(device):
    """It stays when the search is reset and when other examples are told of; the last one counts."""
    draw, tokens = random.Random(2), [3, 9, 40, 5, 8]
    twins = Twins(device, "parabolic", 64, tokens)
    address = twins.state._examples.data_ptr()
    for start in (1, 30, 64, 1000, 7, 1):
        twins.state.reset()
        twins.begin(tokens, start)
        read = twins.run(by_example(draw, lambda tau: 0.001 * (tau - 20) ** 2, tokens, 0.0, 0.1))
        assert [tau for tau, _ in read.losses[:2]] == [0, min(start, 64)]
    assert twins.state._examples.data_ptr() == address
    with pytest.raises(ValueError, match="start must be an integer from 1 to 65536, got 0"):
        twins.state.start_at(0)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(
    "losses", [[math.nan], [math.inf], [-math.inf], [1.0, math.nan], [1.0, 1.0], [1.0, -math.inf]]
)
def test_a_search_that_ends_at_once(device, name, losses):
    read = Twins(device, name, 8).run(losses.__getitem__)
    assert (read.best_tau, len(read.losses)) == (0, len(losses))


def test_a_long_linear_search(device):
    read = Twins(device, "linear", 300).run(lambda tau: abs(tau - 150.0))
    assert (read.best_tau, len(read.losses)) == (150, 152)
    assert read.stopped_because == python.IMPROVEMENT_ENDED


@pytest.mark.parametrize("name", SEARCHES)
def test_after_its_end_a_search_changes_nothing_and_moves_nothing(device, name):
    twins = Twins(device, name, 4)
    before = twins.run(lambda tau: -float(tau))
    device.decide(twins.state, torch.tensor(-100.0, dtype=torch.float64))
    assert (twins.state.accept.item(), twins.state.k.item(), twins.state.go.item()) == (0, 0.0, 0)
    after = twins.state.read()
    assert (after.losses, after.best_tau, after.stopped_because) == (
        before.losses,
        before.best_tau,
        before.stopped_because,
    )


def test_a_reset_state_is_a_new_one(device):
    twins = Twins(device, "parabolic", 16)
    twins.run(lambda tau: (tau - 5.0) ** 2)
    addresses = [t.data_ptr() for t in (twins.state.accept, twins.state.k, twins.state.go)]
    twins.state.reset()
    assert twins.state.read() == device.Decided([], 0, math.inf, False, None)
    assert (twins.state.accept.item(), twins.state.k.item(), twins.state.go.item()) == (0, 0.0, 1)
    twins.begin()
    assert twins.run(lambda tau: (tau - 9.0) ** 2).best_tau == 9
    assert addresses == [t.data_ptr() for t in (twins.state.accept, twins.state.k, twins.state.go)]


def test_a_state_made_under_inference_mode_can_be_reset_outside_of_it(device):
    with torch.inference_mode():
        state = device.DecideState("parabolic", 8, "cpu")
    state.reset()
    assert state.read().losses == [] and state.device == torch.device("cpu")


def test_outputs_are_what_a_step_reads(device):
    state = device.DecideState("parabolic", 8, "cpu")
    for tensor, dtype in ((state.accept, torch.int32), (state.k, torch.float32), (state.go, torch.int32)):
        assert (tensor.shape, tensor.dtype) == ((1,), dtype)


@pytest.mark.parametrize("name", SEARCHES)
def test_no_search_needs_more_room_than_its_history_has(device, name):
    for max_tau in MAX_TAUS:
        twin = python.make_search(name, max_tau)
        expected = max_tau + 1 if name == "linear" else twin.max_evaluations
        assert device.DecideState(name, max_tau, "cpu").capacity == expected


def test_constants_are_those_of_the_python_searches(device):
    for name in ("GOLDEN", "REFINE_TOLERANCE", "MAX_TAU_LIMIT"):
        ours = getattr(device, name)
        assert getattr(ours, "value", ours) == getattr(python, name), name
    said = {**vars(program), **vars(python)}
    reasons = {name: value for name, value in said.items() if value in device.REASONS[1:] and name.isupper()}
    assert len(reasons) == len(device.REASONS) - 1
    assert device.REASONS[device.NO_UPDATE.value] == program.NO_UPDATE
    assert device.REASONS[device.UPDATE_NOT_FINITE.value] == program.UPDATE_NOT_FINITE
    for name, value in reasons.items():
        assert device.REASONS[getattr(device, name).value] == value


def test_bad_arguments_are_refused(device):
    with pytest.raises(ValueError, match="'parabolic', 'linear', got 'golden'"):
        device.DecideState("golden", 8, "cpu")
    for bad in (0, -1, 1.5, True, None, 1 << 17):
        with pytest.raises(ValueError, match=re.escape(f"from 1 to 65536, got {bad!r}")):
            device.DecideState("linear", bad, "cpu")
    state = device.DecideState("linear", 8, "cpu")
    with pytest.raises(
        ValueError, match=r"loss is \(\) torch.float32 on cpu; a decision needs one torch.float64"
    ):
        device.decide(state, torch.tensor(1.0))
    loss, state = torch.zeros((), dtype=torch.float64), device.DecideState("parabolic", 8, "cpu", rows=4)
    sums = torch.zeros(4, dtype=torch.float64)
    for bad, message in (
        (None, "no sums by example for a state of 4 rows"),
        (sums[:3], r"\(3,\) sums by example for a state of 4 rows"),
        (sums.float(), "sums are torch.float32 on cpu"),
        (torch.zeros(8, dtype=torch.float64)[::2], "contiguous: False"),
    ):
        with pytest.raises(ValueError, match=message):
            device.decide(state, loss, bad)
    with pytest.raises(ValueError, match="12 critical values, 3 tokens and 4 weights were given; this state"):
        state.know([0.0] * 12, [1.0] * 3, [1.0] * 4)
    with pytest.raises(ValueError, match=r"largest is \(2,\) torch.float32 on cpu; a decision needs one"):
        device.begin(state, torch.ones(2))


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(
    ("largest", "reason"),
    [
        (0.5, None),
        (1e-45, None),
        (3.4e38, None),
        (0.0, program.NO_UPDATE),
        (-0.0, program.NO_UPDATE),
        (math.inf, program.UPDATE_NOT_FINITE),
        (math.nan, program.UPDATE_NOT_FINITE),
    ],
)
def test_a_search_begins_only_with_an_update_that_is_one(device, name, largest, reason):
    """Whatever the state held before."""
    twins = Twins(device, name, 8)
    fresh = twins.state._memory[:16].clone()
    twins.run(lambda tau: (tau - 3.0) ** 2)
    device.begin(twins.state, torch.tensor(largest))
    assert twins.state.go.item() == (reason is None)
    assert (twins.state.accept.item(), twins.state.k.item()) == (0, 0.0)
    assert twins.state.read() == device.Decided([], 0, math.inf, False, reason)
    assert torch.equal(twins.state._memory[2:16], fresh[2:])
    if reason is None:
        twins.begin()
        assert twins.run(lambda tau: (tau - 5.0) ** 2).best_tau == 5
    else:  # a loss that comes nevertheless changes nothing
        device.decide(twins.state, torch.tensor(1.0, dtype=torch.float64))
        assert twins.state.read() == device.Decided([], 0, math.inf, False, reason)


def test_preparing_runs_nothing(device):
    twins = Twins(device, "parabolic", 8)
    twins.observe(2.0)
    before = twins.state._memory.clone()
    device.prepare(twins.state)
    assert torch.equal(twins.state._memory, before)


def test_where_the_decision_cannot_set_the_condition_a_kernel_beside_it_does(device, monkeypatch):
    set_to = []
    monkeypatch.setattr(device.condition, "set_beside", lambda handle, go: set_to.append((handle, go.item())))
    state = device.DecideState("linear", 8, "cpu")
    device.begin(state, torch.tensor(1.0), handle=7)
    for loss in (3.0, 2.0, 2.5):
        device.decide(state, torch.tensor(loss, dtype=torch.float64), handle=7)
    device.begin(state, torch.tensor(0.0), handle=7)
    device.begin(state, torch.tensor(1.0))
    assert set_to == [(7, 1), (7, 1), (7, 1), (7, 0), (7, 0)]


def test_which_way_a_condition_is_set_is_chosen_per_device(device):
    condition, gpus = device.condition, [torch.device("cuda", i) for i in range(2)]
    assert not condition.inside(torch.device("cpu"))
    assert condition.inside(gpus[0]) and condition.inside(gpus[1])
    try:
        for way in (condition.BESIDE, condition.BEHIND):
            condition.use(gpus[1], way)
            assert condition.inside(gpus[0]) and not condition.inside(gpus[1])
            assert not condition.behind(gpus[0]) and condition.behind(gpus[1]) == (way == "behind")
    finally:
        condition.use(gpus[1], condition.INSIDE)
    with pytest.raises(ValueError, match="set 'inside', 'beside', 'behind' the decision, not 'around'"):
        condition.use(gpus[0], "around")


@pytest.mark.parametrize("handle", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_handle_keeps_its_bits_as_a_signed_number(device, handle):
    passed = device.condition.signed(handle)
    assert -(1 << 63) <= passed < 1 << 63 and passed % (1 << 64) == handle
