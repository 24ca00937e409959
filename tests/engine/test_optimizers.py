"""Fast Forward behind every kind of optimizer: a stage repeats its own update, or it is refused."""

import copy
import importlib.util

import pytest
import torch
from small_loops import Factors, same, weights_of
from torch import nn

from ffkernels import FastForward, FastForwardConfig
from ffkernels.stage.optimizer_rehearsal import what_stays

EVERY_2 = FastForwardConfig(interval=2, max_tau=64, patience=None)


def loss_of(model):
    return model.loss()


class ByWeight(torch.optim.Optimizer):
    """A step that takes the weights one by one: `update(p, state, rate)`."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, self.state[p], group["lr"])


class Lion(ByWeight):
    """The sign of an interpolated momentum: every element of an update has the same size."""

    def update(self, p, state, rate):
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        p.add_(torch.sign(momentum.lerp(p.grad, 0.1)), alpha=-rate)
        momentum.lerp_(p.grad, 0.01)


class Nested(torch.optim.RAdam):
    """A step around the parent's: PyTorch runs the hooks of both."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.nested_steps = getattr(self, "nested_steps", 0) + 1
        return loss


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw_single": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "lion": lambda p: Lion(p, lr=1e-3),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=2),
    "nested": lambda p: Nested(p, lr=1e-2),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon(p, lr=1e-3)


def take_step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(closure)
    closure()
    return optimizer.step()


def attached(make, model=None, config=EVERY_2):
    model = model or Factors()
    optimizer = make(list(model.parameters()))
    return model, optimizer, FastForward(model, optimizer, loss_of, config)


def check_stages(make_model, make_optimizer, steps=4, step=take_step, **attach):
    """Train, and hold every stage against the same steps of a copy without Fast Forward."""
    model = make_model()
    optimizer = make_optimizer(list(model.parameters()))
    with FastForward(model, optimizer, loss_of, EVERY_2, **attach) as ff:
        for n in range(steps):
            twin = copy.deepcopy(model)
            twin_optimizer = make_optimizer(list(twin.parameters()))
            twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            before = weights_of(twin)
            step(twin, twin_optimizer)
            stepped = weights_of(twin)
            step(model, optimizer)
            assert ff.optimizer_steps == n + 1
            assert len(ff.stages) == (n + 1) // 2
            tau = ff.stages[-1].tau if n % 2 else 0
            for name, weight in model.named_parameters():
                expected = stepped[name] + tau * (stepped[name] - before[name])
                assert torch.allclose(weight, expected, rtol=0, atol=2e-6), name
            if n % 2 == 0:
                assert all(torch.equal(p, stepped[name]) for name, p in model.named_parameters())
            else:
                assert ff.stages[-1].loss_after == model.loss().item()
            mine, theirs = optimizer.state_dict(), twin_optimizer.state_dict()
            assert same(mine["state"], theirs["state"])
            assert same(mine["param_groups"], theirs["param_groups"])
    assert max(stage.tau for stage in ff.stages) >= 2
    return ff


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stage_repeats_this_optimizers_update_and_leaves_its_state(name):
    check_stages(Factors, OPTIMIZERS[name])
    assert what_stays(OPTIMIZERS[name](list(Factors().parameters()))) == pytest.approx(1.0, abs=0.01)


def test_steps_inside_steps_count_once_whether_or_not_the_parent_was_used_before():
    check_stages(Factors, OPTIMIZERS["nested"])
    torch.optim.RAdam([nn.Parameter(torch.zeros(1))])  # from now on the parent's step runs hooks too
    assert getattr(torch.optim.RAdam.step, "hooked", False)
    check_stages(Factors, OPTIMIZERS["nested"])


@pytest.mark.parametrize("name", ["adam", "nested"])
def test_a_step_that_raises_runs_no_stage_and_leaves_the_next_one_whole(name):
    model, optimizer, ff = attached(OPTIMIZERS[name])
    torch.optim.RAdam([nn.Parameter(torch.zeros(1))])

    def fails():
        raise RuntimeError("bad batch")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="bad batch"):
            optimizer.step(fails)
    assert (ff.optimizer_steps, ff.stages) == (0, [])
    for _ in range(2):
        take_step(model, optimizer)
    assert ff.optimizer_steps == 2 and ff.stages[0].tau > 0


def only_b():
    model = Factors()
    model.a.requires_grad_(False)
    return model


def by_groups(params):
    groups = zip(params, ({"lr": 1e-4}, {"lr": 1e-3, "weight_decay": 0.1}), strict=True)
    return torch.optim.AdamW([{"params": [p], **own} for p, own in groups], lr=1.0)


@pytest.mark.parametrize(
    "model, make", [(Factors, by_groups), (only_b, OPTIMIZERS["adam"])], ids=["rates of groups", "frozen"]
)
def test_what_has_a_rate_of_its_own_or_no_gradient_moves_by_that(model, make):
    assert all(stage.tau for stage in check_stages(model, make).stages)


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware: up the gradient, a second gradient there, back into other memory, and a real step."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))
        self.steps_for_it = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups, self.state = self.steps_for_it.param_groups, self.steps_for_it.state

    def weights(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def up(self):
        self.old = [p.detach().clone() for p in self.weights()]
        for p in self.weights():
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def down(self):
        for p, old in zip(self.weights(), self.old, strict=True):
            p.data = old
        self.steps_for_it.step()

    def step(self, closure):
        self.up()
        with torch.enable_grad():
            closure()
        self.down()


class Flat(torch.optim.SGD):
    """After each step all weights are views of one new buffer."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        weights = [p for group in self.param_groups for p in group["params"]]
        flat = torch.cat([p.flatten() for p in weights])
        for p, part in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
            p.data = part.view_as(p)


class Alternating(torch.optim.SGD):
    """Each weight lies in one of two buffers, in the other one after each step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            if not hasattr(p, "other"):
                p.other = torch.empty_like(p)
            there, p.other = p.other.copy_(p), p.data
            p.data = there


def by_closure(model, optimizer):
    take_step(model, _Gradients(model))
    optimizer.step(lambda: take_step(model, _Gradients(model)))


def by_halves(model, optimizer):
    take_step(model, _Gradients(model))
    optimizer.up()
    take_step(model, _Gradients(model))
    optimizer.down()


class _Gradients:
    """What makes gradients of take_step, and no step."""

    def __init__(self, model):
        self.zero_grad, self.step = model.zero_grad, lambda: None


@pytest.mark.parametrize(
    "make, step, known",
    [
        (lambda p: Sharp(p, lr=1e-2), by_closure, ""),  # it writes them on the way up
        (lambda p: Sharp(p, lr=1e-2), by_halves, ""),
        (lambda p: Flat(p, lr=1e-2, momentum=0.5), take_step, "2347"),  # not after the stage of step 5
        (lambda p: Alternating(p, lr=1e-2, momentum=0.5), take_step, "2347"),
    ],
)
def test_weights_that_get_other_memory_in_a_step_are_moved_there(make, step, known, recwarn):
    ff = check_stages(Factors, make, step=step)
    assert all(stage.tau for stage in ff.stages)
    assert not [str(w.message) for w in recwarn if "trainable parameters changed" in str(w.message)]
    model, optimizer, ff = attached(make, config=FastForwardConfig(interval=5))
    steps = ""
    for n in range(1, 8):
        step(model, optimizer)
        steps += str(n) if ff.alignment is not None else ""
    assert steps == known and ff.stages[0].tau > 0
    said = [str(w.message) for w in recwarn if "weights are written between" in str(w.message)]
    assert len(said) == (not known)


class Turning(torch.optim.SGD):
    """After each step the weights lie in the other order of rows and columns."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            p.data = p.data.contiguous() if p.data.stride(0) == 1 else p.data.t().contiguous().t()


def test_a_step_that_changes_how_weights_lie_has_no_stage():
    model, optimizer, ff = attached(lambda p: Turning(p, lr=1e-2))
    with pytest.warns(UserWarning, match="2 of another shape, layout, dtype or device, such as 'a'"):
        for _ in range(6):
            take_step(model, optimizer)
    stopped = {stage.stopped_because for stage in ff.stages}
    assert stopped == {"the weights were replaced during the optimizer's step"} and len(ff.stages) == 3


def test_weights_that_a_table_cannot_have_are_refused_until_they_are_others():
    model, optimizer, ff = attached(OPTIMIZERS["sgd"], config=FastForwardConfig(interval=4))
    take_step(model, optimizer)
    model.double()
    for _ in range(2):
        with pytest.raises(TypeError, match=r"^a has dtype torch.float64; allowed are"):
            take_step(model, optimizer)
    model.float()
    for _ in range(3):
        take_step(model, optimizer)
    assert ff.optimizer_steps == 4 and ff.stages[0].tau > 0


class Rest:
    """Two optimizers behind one object that is none."""

    def __init__(self, *optimizers):
        self.optimizers = {type(o).__name__: o for o in optimizers}


class Forgetful(torch.optim.Optimizer):
    def __init__(self, params):
        self.param_groups, self.state = [{"params": list(params)}], {}


@pytest.mark.parametrize(
    "make, told",
    [
        (
            lambda p: [torch.optim.SGD(p), torch.optim.Adam(p)],
            r"got list, which holds 2 of them \(SGD, Adam\)",
        ),
        (
            lambda p: Rest(torch.optim.SGD(p), torch.optim.Adam(p)),
            r"got Rest, .*: make one FastForward for each",
        ),
        (lambda p: iter(p), "must be a torch.optim.Optimizer or wrap one as .optimizer, got list_iterator$"),
        (Forgetful, r"Forgetful .* without hooks .* does not call torch.optim.Optimizer.__init__"),
    ],
)
def test_what_is_no_one_optimizer_is_named(make, told):
    with pytest.raises(TypeError, match=told):
        attached(make)


class TiedMemory(Factors):
    """Two parameters in one memory: the optimizer updates it twice a step, a move must go there once."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Parameter(self.b.data)

    def loss(self):
        return ((self.a @ self.b + self.a @ self.twin + self.a - 1) ** 2).mean()


def test_two_parameters_in_one_memory():
    model, optimizer, ff = attached(OPTIMIZERS["sgd"], TiedMemory())
    assert ff.trainable_numel == 128
    take_step(model, optimizer)
    before = weights_of(model)
    twin = TiedMemory()
    twin.load_state_dict(model.state_dict())
    assert twin.twin.data_ptr() == twin.b.data_ptr()
    take_step(twin, torch.optim.SGD(twin.parameters(), lr=1e-2))
    take_step(model, optimizer)
    tau = ff.stages[0].tau
    assert tau > 0
    expected = twin.b + tau * (twin.b - before["b"])
    assert torch.allclose(model.b, expected, rtol=0, atol=1e-6)
    assert model.twin.data_ptr() == model.b.data_ptr()
    assert ff.stages[0].loss_after == model.loss().item()


def test_parameters_added_in_mid_run_move_from_their_first_full_interval_on():
    model = Factors()
    optimizer = torch.optim.AdamW([model.b], lr=1e-3)
    ff = FastForward(model, optimizer, loss_of, EVERY_2)
    take_step(model, optimizer)
    take_step(model, optimizer)
    assert ff.trainable_numel == 64
    first = weights_of(model)["a"]
    assert torch.equal(first, Factors().a)
    optimizer.add_param_group({"params": [model.a], "lr": 1e-4})
    take_step(model, optimizer)
    before = weights_of(model)["a"]
    told = r"the trainable parameters changed .* \(1 new, such as 'a'\); the table is rebuilt"
    with pytest.warns(UserWarning, match=told):
        take_step(model, optimizer)
    assert ff.trainable_numel == 128
    tau = ff.stages[1].tau
    assert tau > 0
    # Adam moves each element by about its rate in these first steps.
    assert float((model.a.detach() - before).abs().max()) == pytest.approx((tau + 1) * 1e-4, rel=0.1)


def test_two_optimizers_on_one_model_move_disjoint_weights():
    model = Factors()
    one, other = torch.optim.Adam([model.a], lr=1e-3), torch.optim.SGD([model.b], lr=1e-2)
    ff_one = FastForward(model, one, loss_of, EVERY_2)
    ff_other = FastForward(model, other, loss_of, FastForwardConfig(interval=3, patience=None))
    assert (ff_one.trainable_numel, ff_other.trainable_numel) == (64, 64)
    for n in range(6):
        one.zero_grad(), other.zero_grad()
        model.loss().backward()
        b = model.b.detach().clone()
        one.step()
        assert torch.equal(model.b, b)
        if n % 2:
            assert ff_one.stages[-1].loss_after == model.loss().item()
        a = model.a.detach().clone()
        other.step()
        assert torch.equal(model.a, a)
        if n % 3 == 2:
            assert ff_other.stages[-1].loss_after == model.loss().item()
    assert [len(ff_one.stages), len(ff_other.stages)] == [3, 2]
    assert any(s.tau for s in ff_one.stages) and any(s.tau for s in ff_other.stages)


def test_steps_inside_backward_are_refused():
    model = Factors()
    optimizers = {p: torch.optim.SGD([p], lr=1e-2) for p in model.parameters()}
    for optimizer in optimizers.values():
        FastForward(model, optimizer, loss_of, FastForwardConfig(interval=6))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with pytest.raises(RuntimeError, match=r"SGD.step\(\) was called inside backward\(\).*on one optimizer"):
        model.loss().backward()


def test_schedule_free_is_refused():
    class AdamWScheduleFree(torch.optim.AdamW):
        """Modes as schedulefree's optimizers have them: y in the model while training, x for evaluation."""

        def train(self): ...

        def eval(self): ...

    model = Factors()
    with pytest.raises(ValueError, match=r"AdamWScheduleFree has train.*use an optimizer without modes"):
        FastForward(model, AdamWScheduleFree(model.parameters(), lr=1e-3), loss_of)
    if importlib.util.find_spec("schedulefree"):
        import schedulefree

        wrapped = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
        for optimizer in (schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1), wrapped):
            with pytest.raises(ValueError, match="use an optimizer without modes"):
                FastForward(model, optimizer, loss_of)


class Adam8bitLike(ByWeight):
    """bitsandbytes' shape: moments quantised by blocks in uint8 beside their scales, a `step` of its own."""

    def update(self, p, state, rate):
        momentum = torch.zeros_like(p)
        if state:
            momentum = (state["state1"].float() - 128) / 127 * state["absmax1"]
        momentum.lerp_(p.grad, 0.1)
        state["absmax1"] = momentum.abs().amax()
        state["state1"] = (momentum / state["absmax1"] * 127 + 128).round().to(torch.uint8)
        p.add_(torch.sign(momentum), alpha=-rate)


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "Lion8bit", None])
def test_eight_bit_optimizers(name):
    kind, options = Adam8bitLike, {}
    if name is not None:
        kind, options = getattr(pytest.importorskip("bitsandbytes").optim, name), {"min_8bit_size": 16}
    model, optimizer, ff = attached(lambda p: kind(p, lr=1e-3, **options))
    for _ in range(2):
        take_step(model, optimizer)
    state, tau = copy.deepcopy(optimizer.state[model.a]), ff.stages[0].tau
    assert state["state1"].dtype == torch.uint8
    assert tau > 0 and ff.stages[0].loss_after == model.loss().item()
    if name is None:
        # Zero before the first step, ±lr after it, then τ + 1 times ±lr of the second one's signs.
        assert set((model.b.detach().abs() * 1e3).round().int().unique().tolist()) <= {tau, tau + 2}
    take_step(model, optimizer)
    assert same(optimizer.state[model.a]["state1"], state["state1"]) is False
    take_step(model, optimizer)
    assert len(ff.stages) == 2 and ff.stages[1].loss_after == model.loss().item()
