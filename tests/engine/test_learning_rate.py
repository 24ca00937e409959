"""find_learning_rate: what it finds in valleys that are known, and that it leaves no trace, bit for bit."""

import copy
import random

import pytest
import torch
from torch import nn

import ffkernels
from ffkernels import FastForward, Finding, ValidationLoss, find_learning_rate
from ffkernels.engine.rate_finding import decays
from ffkernels.ops.notices import FFKernelsNotice

SCALES = torch.tensor([1.0, 0.3, 3.0, 0.1])
TARGET = torch.tensor([2.0, -1.0, 0.5, 4.0])


class Bowl(nn.Module):
    """A quadratic bowl; its norm's running statistics and dropout tell whether a run was disturbed."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.drop = nn.Dropout(0.3)

    def forward(self, noise):
        self.drop(self.norm(noise))
        return {"loss": (SCALES * (self.w - TARGET + 0.1 * noise.mean(0)) ** 2).sum()}


def bowl_loss(model):
    return float((SCALES * (model.w - TARGET) ** 2).sum())


def regression(model, optimizer):
    """A training step of a (3 → 2) model on eight random rows, and its loss."""
    inputs, targets = torch.randn(8, 3), torch.randn(8, 2)

    def loss(model):
        return (model(inputs) - targets).square().mean()

    def step():
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return step, lambda model: float(loss(model))


def batches(count=4):
    return [{"noise": torch.randn(3, 4, generator=torch.Generator().manual_seed(i))} for i in range(count)]


def bowl(lr, make=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = Bowl()
    return model, make([model.w], lr=lr, **options)


def everything(model, optimizer, *schedulers):
    torch.manual_seed(5)
    return copy.deepcopy(
        [
            dict(model.state_dict()),
            optimizer.state_dict(),
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [m.training for m in model.modules()],
            [s.state_dict() for s in schedulers],
        ]
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def exact(lr, steps=2, **options):
    """lr·s of the true minimum along the last of `steps` SGD updates, and the weights there."""
    model, optimizer = bowl(lr, **options)
    for batch in batches(steps):
        before = model.w.detach().clone()
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    delta = model.w.detach() - before
    s = float((SCALES * delta * (TARGET - before)).sum() / (SCALES * delta * delta).sum())
    return s * lr, before + s * delta


@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-2, 0.3, 1.0])
def test_the_length_of_the_last_step_that_lowers_the_loss_most(lr):
    model, optimizer = bowl(lr)
    finding = find_learning_rate(model, optimizer, batches(), bowl_loss)
    assert finding.peak == pytest.approx(1.2 * exact(lr)[0], rel=0.02)
    assert finding.peak == pytest.approx(1.2 * lr * (1 + finding.tau)) and finding.scale == finding.lr / lr
    assert finding.lr == pytest.approx(0.7 * lr * (1 + finding.tau))  # nothing says that it will fall
    assert finding.lr_before == lr and finding.optimizer_step == 2
    assert finding.judged_by == "mean"
    # One at the start, and one at s = 0 before the batch statistics moved on.
    assert finding.evaluations == len(finding.curve) + 2 <= 21
    assert finding.curve[0][0] == 0 and finding.curve[1][0] == lr
    assert finding.loss_after == min(loss for _, loss in finding.curve) < finding.loss_before
    assert finding.flops > 0 and finding.seconds > 0


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("warm", [0, 3])
def test_the_run_is_left_as_it_was_bit_for_bit(make, warm):
    model, optimizer = bowl(1e-3, make)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    for batch in batches(warm):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
        scheduler.step()
    model.drop.eval()
    gradient = model.w.grad
    before = everything(model, optimizer, scheduler)
    python, torch_state = random.getstate(), torch.get_rng_state()

    given = iter(batches())

    def step():
        optimizer.zero_grad()
        random.random(), torch.rand(2)
        model(**next(given))["loss"].backward()
        optimizer.step()
        scheduler.step()

    for source in (batches(), step):
        find_learning_rate(model, optimizer, source, bowl_loss, schedulers=scheduler)
        assert random.getstate() == python and torch.equal(torch.get_rng_state(), torch_state)
        assert model.w.grad is gradient
        assert same(before, everything(model, optimizer, scheduler))
        torch.set_rng_state(torch_state)
    # and when it fails
    with pytest.raises(ValueError, match=r"each of the 2 steps, got dict$"):
        find_learning_rate(model, optimizer, batches(1), bowl_loss)

    def broken(model):
        raise OSError("no disk")

    with pytest.raises(OSError):
        find_learning_rate(model, optimizer, batches(), broken)
    assert same(before, everything(model, optimizer, scheduler))


def test_the_learning_rate_is_the_base_one_also_where_a_warm_up_has_not_begun():
    model, optimizer = bowl(0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 8)
    assert optimizer.param_groups[0]["lr"] == 0.0
    finding = find_learning_rate(model, optimizer, batches(), bowl_loss, schedulers=scheduler)
    assert finding.lr_before == 0.01 and finding.lr == pytest.approx(0.7 * exact(0.01)[0], rel=0.02)
    finding.apply(optimizer, scheduler)
    assert scheduler.base_lrs == [pytest.approx(finding.lr)]
    optimizer.step(), scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(finding.lr / 8)


def test_a_step_of_ones_own_may_warm_up():
    """The step that is searched has 2/8 of the base learning rate; what is found is the base."""
    model, optimizer = bowl(0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 8)
    given = iter(batches(3))

    def step():
        optimizer.zero_grad()
        model(**next(given))["loss"].backward()
        optimizer.step()
        scheduler.step()

    finding = find_learning_rate(model, optimizer, step, bowl_loss, schedulers=scheduler)
    assert finding.optimizer_step == 3  # the first was at 0
    assert finding.lr == pytest.approx(0.7 * (1 + finding.tau) * 0.01 * 2 / 8)
    assert finding.scale == pytest.approx(0.7 * (1 + finding.tau) / 4)


def test_keep_move_goes_on_from_the_best_weights():
    model, optimizer = bowl(1e-3, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    kept = model.w.grad = torch.ones(4)
    finding = find_learning_rate(model, optimizer, batches(), bowl_loss, keep_move=True, schedulers=scheduler)
    assert torch.allclose(model.w.detach(), exact(1e-3)[1], atol=0.02)
    assert bowl_loss(model) == finding.loss_after
    assert optimizer.param_groups[0]["lr"] == pytest.approx(finding.lr)
    assert scheduler.base_lrs == [pytest.approx(finding.lr)]
    assert model.w.grad is kept


def test_keep_move_goes_on_with_the_random_numbers():
    model, optimizer = bowl(1e-3)
    torch.manual_seed(3)
    after = [torch.rand(1) for _ in range(3)][-1]
    given = iter(batches())

    def step():
        torch.rand(1)
        optimizer.zero_grad()
        (SCALES * (model.w - TARGET + next(given)["noise"].mean(0)) ** 2).sum().backward()
        optimizer.step()

    torch.manual_seed(3)
    find_learning_rate(model, optimizer, step, bowl_loss, keep_move=True)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("idle", [(1, 2), (2, 3), (1, 3)])
def test_steps_that_change_nothing_do_not_count(idle):
    model, optimizer = bowl(1e-3)
    given, calls = iter(batches()), []

    def step():
        calls.append(1)
        optimizer.zero_grad()
        factor = 0.0 if len(calls) in idle else 1.0
        (factor * model(**next(given))["loss"]).backward()
        optimizer.step()

    assert find_learning_rate(model, optimizer, step, bowl_loss).optimizer_step == 4


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_that_still_seeks_its_scale(fused):
    """It leaves step() out, or a fused optimizer does nothing in it, and unscales the gradients itself."""
    found = {}
    for scale in (2.0**4, 2.0**127):
        model, optimizer = bowl(1e-3, torch.optim.Adam, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-123)
        given, calls = iter(batches(4) if scale < 100 else [batches(1)[0], *batches(3)]), []

        def step(model=model, optimizer=optimizer, scaler=scaler, given=given, calls=calls):
            calls.append(1)
            optimizer.zero_grad()
            scaler.scale(model(**next(given))["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()

        found[scale] = find_learning_rate(model, optimizer, step, bowl_loss), len(calls)
    (plain, steps), (overflown, more) = found.values()
    assert (steps, more) == (2, 3)
    assert overflown.lr == plain.lr and overflown.curve == plain.curve


def test_keep_move_leaves_a_schedule_where_it_stands():
    model, optimizer = bowl(0.01)
    # It multiplies the group's own learning rate at each step: 0.1, 0.4, 0.7, 1 of the base.
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3)
    finding = find_learning_rate(model, optimizer, batches(), bowl_loss, keep_move=True, schedulers=scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * finding.lr)
    for _ in range(3):
        optimizer.step(), scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(finding.lr)


def test_a_tensor_that_groups_share_as_their_learning_rate_is_multiplied_once():
    model = nn.Linear(3, 2)
    shared = torch.tensor(1e-3)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    optimizer = torch.optim.AdamW(groups, lr=shared, capturable=False, foreach=False)
    assert all(group["lr"] is shared for group in optimizer.param_groups)
    step, loss = regression(model, optimizer)
    found = find_learning_rate(model, optimizer, step, loss)
    assert shared == torch.tensor(1e-3) and optimizer.param_groups[1]["lr"] is shared
    found.apply(optimizer)
    assert float(shared) == pytest.approx(found.lr) and found.scale > 2
    assert optimizer.param_groups[1]["lr"] is shared


def test_what_is_found_goes_through_wrappers_and_to_schedulers():
    _model, optimizer = bowl(0.1)

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    finding = Finding(lr=0.5, tau=4.0, scale=5.0)
    finding.apply(Wrapper(optimizer), [scheduler, scheduler])
    assert optimizer.param_groups[0]["lr"] == 0.5 and scheduler.base_lrs == [0.5]
    with pytest.warns(FFKernelsNotice, match=r"finding\.apply\(optimizer, scheduler\)"):
        finding.apply(optimizer)


def test_a_velocity_that_has_not_built_up_is_told_of(recwarn):
    model, optimizer = bowl(1e-3, momentum=0.9)
    find_learning_rate(model, optimizer, batches(22), bowl_loss, after=22)
    assert not [w for w in recwarn if "momentum" in str(w.message)]
    with pytest.warns(FFKernelsNotice, match=r"after 2 steps an update has only 19% .* 22 steps"):
        find_learning_rate(model, optimizer, batches(), bowl_loss)


def test_few_examples_are_judged_by_their_mean(tiny_model, padded_batch):
    model = tiny_model("llama", attention_dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = [padded_batch(5, 24, seed=i) for i in range(2)]
    for examples, judge in ((3, "mean"), (4, "examples")):
        validation = ValidationLoss(model, [padded_batch(examples, 24, seed=9)])
        found = find_learning_rate(model, optimizer, data, validation)
        assert found.judged_by == judge and found.loss_after < found.loss_before


def test_a_loss_that_is_not_finite_is_told_of():
    model, optimizer = bowl(1e-3)
    with pytest.raises(ValueError, match="validation loss is nan before the first step"):
        find_learning_rate(model, optimizer, batches(), lambda model: float("nan"))


class Counted(Bowl):
    """Its loss rises with each training forward, and the buffer that counts them is a new one each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, noise):
        self.count = self.count + 1
        return super().forward(noise)


def test_all_multiples_are_compared_with_the_same_buffers():
    torch.manual_seed(0)
    model = Counted()
    optimizer = torch.optim.SGD([model.w], lr=1e-2)
    count = model.count
    finding = find_learning_rate(
        model, optimizer, batches(), lambda model: bowl_loss(model) + 100 * float(model.count)
    )
    assert finding.lr == pytest.approx(0.7 * exact(1e-2)[0], rel=0.02)
    assert finding.loss_before > finding.loss_after > 200
    assert model.count is count and count == 0  # put back, although training had replaced it


def test_modules_that_are_in_eval_while_the_model_trains_stay_so():
    model, optimizer = bowl(1e-3)
    flags = []
    model.norm.register_forward_hook(lambda norm, *_: flags.append((model.training, norm.training)))
    model.norm.eval()
    find_learning_rate(model, optimizer, batches(), bowl_loss)
    model.eval()
    find_learning_rate(model, optimizer, batches(), bowl_loss)
    assert flags == [(True, False)] * 2 + [(True, True)] * 2
    assert not model.training and not model.norm.training


def test_the_very_first_update_can_be_searched():
    model, optimizer = bowl(1e-2)
    finding = find_learning_rate(model, optimizer, batches(1), bowl_loss, after=1)
    assert finding.optimizer_step == 1 and finding.lr == pytest.approx(
        0.7 * exact(1e-2, steps=1)[0], rel=0.02
    )
    assert finding.evaluations == len(finding.curve)


def test_large_buffers_are_not_copied_but_watched(monkeypatch):
    monkeypatch.setattr("ffkernels.engine.run_state.LARGE", 3)
    model, optimizer = bowl(1e-3)
    with pytest.raises(RuntimeError, match=r"wrote 'norm.running_mean'"):
        find_learning_rate(model, optimizer, batches(), bowl_loss)
    assert torch.equal(model.w, torch.zeros(4)) and model.norm.num_batches_tracked == 0


def test_groups_keep_their_ratio():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "lr": 1e-3}, {"params": [model.bias], "lr": 16e-3}], lr=1.0
    )
    step, loss = regression(model, optimizer)
    finding = find_learning_rate(model, optimizer, step, loss, keep_move=True)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second / first == pytest.approx(16)
    assert first == pytest.approx(finding.lr) and finding.scale > 5


def test_first_steps_that_do_harm_are_taken_back_and_made_smaller(tiny_model, padded_batch):
    found = {}
    for lr in (1e-3, 30.0):
        model = tiny_model("llama", attention_dropout=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        data = [padded_batch(5, 24, seed=i) for i in range(2)]
        validation = ValidationLoss(model, [padded_batch(8, 24, seed=9)])
        before = everything(model, optimizer)
        found[lr] = find_learning_rate(model, optimizer, data, validation)
        assert same(before, everything(model, optimizer))
        assert found[lr].judged_by == "examples"
    assert found[1e-3].restarts == 0 and found[30.0].restarts >= 2
    assert found[30.0].lr == pytest.approx(found[1e-3].lr, rel=0.9)
    assert found[30.0].scale == pytest.approx(found[30.0].lr / 30)


def test_what_is_refused():
    model, optimizer = bowl(0.1)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        find_learning_rate(3, optimizer, batches(), bowl_loss)
    with pytest.raises(ValueError, match="after=0"):
        find_learning_rate(model, optimizer, batches(), bowl_loss, after=0)
    with pytest.raises(TypeError, match="batches is a dict"):
        find_learning_rate(model, optimizer, batches()[0], bowl_loss)
    with pytest.raises(ValueError, match=r"did not call step\(\)"):
        find_learning_rate(model, optimizer, lambda: None, bowl_loss)
    silent = copy.deepcopy(model)
    silent.forward = lambda noise: {"logits": noise}
    with pytest.raises(ValueError, match="returned no loss"):
        find_learning_rate(silent, torch.optim.SGD([silent.w], lr=1.0), batches(), bowl_loss)
    with pytest.raises(TypeError, match="scheduler is a int"):
        find_learning_rate(model, optimizer, batches(), bowl_loss, schedulers=3)
    other = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([model.w], lr=1.0), lambda k: 1.0)
    with pytest.raises(ValueError, match="another optimizer"):
        find_learning_rate(model, optimizer, batches(), bowl_loss, schedulers=other)
    with pytest.raises(ValueError, match="LBFGS"):
        find_learning_rate(model, torch.optim.LBFGS([model.w]), batches(), bowl_loss)
    with pytest.raises(ValueError, match="does not scale"):
        find_learning_rate(model, torch.optim.Rprop([model.w]), batches(), bowl_loss)
    torch.nn.init.ones_(model.w)
    with pytest.raises(ValueError, match=r"\d+ steps did not change the weights"):
        find_learning_rate(
            model,
            torch.optim.SGD([model.w], lr=1e-30),
            [{"noise": 0 * b["noise"]} for b in batches()],
            bowl_loss,
        )
    with pytest.raises(ValueError, match="none of the weights"):
        find_learning_rate(model, optimizer, batches(), ValidationLoss(Bowl(), bowl_loss))
    with FastForward(model, optimizer, bowl_loss), pytest.raises(RuntimeError, match="carries a FastForward"):
        find_learning_rate(model, optimizer, batches(), bowl_loss)


def test_schedules_keep_their_shape():
    from torch.optim.lr_scheduler import (
        ChainedScheduler,
        CosineAnnealingLR,
        LinearLR,
        OneCycleLR,
        SequentialLR,
    )

    makes = {
        "cosine": lambda o: CosineAnnealingLR(o, 20),
        "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 5), CosineAnnealingLR(o, 15)], [5]),
        "chained": lambda o: ChainedScheduler([LinearLR(o, 0.5, 1.0, 4), CosineAnnealingLR(o, 20)]),
        "onecycle": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=21),
    }
    for name, make in makes.items():
        curves = []
        for scaled in (False, True):
            optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
            scheduler, rates = make(optimizer), []
            for step in range(20):
                optimizer.step(), scheduler.step()
                if scaled and step == 2:
                    Finding(lr=2.5, tau=24.0, scale=25.0).apply(optimizer, scheduler)
                rates.append(optimizer.param_groups[0]["lr"])
            curves.append(rates)
        assert [25 * lr for lr in curves[0][2:]] == pytest.approx(curves[1][2:], rel=1e-9), name


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=5, cycle_momentum=False),
    ],
)
def test_what_is_found_is_the_peak_of_schedules_that_rise(make):
    for own in (False, True):
        model, optimizer = bowl(3.0)
        scheduler, given = make(optimizer), iter(batches())

        def step(model=model, optimizer=optimizer, given=given, scheduler=scheduler):
            optimizer.zero_grad()
            model(**next(given))["loss"].backward()
            optimizer.step()
            scheduler.step()

        finding = find_learning_rate(
            model, optimizer, step if own else batches(), bowl_loss, schedulers=scheduler
        )
        best, _ = min(finding.curve, key=lambda place: place[1])
        assert finding.lr_before == 0.1 and finding.peak == pytest.approx(1.2 * best)
        assert finding.part == (1.2 if isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR) else 0.7)
        finding.apply(optimizer, scheduler)
        peak = 0.0
        for _ in range(12):
            optimizer.step(), scheduler.step()
            peak = max(peak, optimizer.param_groups[0]["lr"])
        assert peak == pytest.approx(finding.lr, rel=0.02)


def test_which_schedules_let_the_rate_fall():
    from torch.optim import lr_scheduler as of
    from transformers import get_scheduler

    def falls(make):
        return decays([make(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))])

    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"):
        for warmup, steps in ((0, 64), (3, 100), (50, 500)):
            assert falls(lambda o, *given: get_scheduler(name, o, warmup, steps)), (name, warmup)  # noqa: B023
    for name in ("constant", "constant_with_warmup"):
        assert not falls(lambda o: get_scheduler(name, o, num_warmup_steps=7)), name  # noqa: B023
    assert falls(lambda o: of.CosineAnnealingLR(o, 9)) and falls(lambda o: of.ExponentialLR(o, 0.9))
    assert falls(lambda o: of.LinearLR(o, 1.0, 0.1)) and not falls(lambda o: of.LinearLR(o, 0.1, 1.0))
    assert not falls(lambda o: of.StepLR(o, 5)) and not falls(lambda o: of.ReduceLROnPlateau(o))
    assert not falls(
        lambda o: of.LambdaLR(o, lambda step: [0.0, 0.0, 1.0, 1.0][step])
    )  # ends, and begins at 0


def test_the_limits_of_a_schedule_that_reacts_to_losses_stay():
    GreedyLR = pytest.importorskip("transformers.optimization").GreedyLR
    _, optimizer = bowl(0.1)
    scheduler = GreedyLR(optimizer, min_lr=1e-4, max_lr=2.0)
    Finding(lr=0.5, tau=4.0, scale=5.0).apply(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert scheduler.max_lrs == [2.0] and scheduler.min_lrs == [1e-4]


def test_a_finding_is_plain_data():
    finding = Finding(lr=1e-2, tau=9.0, curve=[(0.0, 3.5), (1e-3, 3.0)], evaluations=3)
    assert Finding.from_dict(finding.to_dict()) == finding
    assert finding.to_dict()["curve"] == [[0.0, 3.5], [1e-3, 3.0]]
    assert ffkernels.find_learning_rate is find_learning_rate
