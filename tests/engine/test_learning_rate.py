"""find_learning_rate: what it finds in valleys that are known, and that it leaves no trace, bit for bit."""

import copy
import math
import random

import pytest
import torch
from small_loops import descend, same
from torch import nn
from torch.optim import lr_scheduler

import ffkernels
from ffkernels import FastForward, FastForwardConfig, Finding, find_learning_rate
from ffkernels.engine.auto_rate import START, UP
from ffkernels.engine.fast_forward import attached
from ffkernels.ops.notices import FFKernelsNotice


class Bowl(nn.Module):
    """½·curvature·(w − target)²; its norm's statistics and its dropout tell whether a run was disturbed."""

    def __init__(self, curvature=1.0):
        super().__init__()
        self.curvature = curvature
        self.w = nn.Parameter(torch.zeros(4))
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.drop = nn.Dropout(0.3)

    def forward(self, noise):
        self.drop(self.norm(noise))
        miss = self.w - torch.tensor([2.0, -1.0, 0.5, 4.0]) + 0.1 * noise.mean(0)
        return {"loss": 0.5 * self.curvature * miss.square().sum()}


class Counted(Bowl):
    """A buffer that is a new tensor after each training forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, noise):
        self.count = self.count + 1
        return super().forward(noise)


def batches(count=20, noise=1.0):
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    return [{"noise": noise * torch.randn(3, 4, generator=generator)} for generator in generators]


def shaped(shape):
    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, shape)


def bowl(lr=1e-3, kind=torch.optim.SGD, curvature=1.0, schedule=None, model=Bowl, **options):
    torch.manual_seed(0)
    model = model(curvature) if model is Bowl else model()
    optimizer = kind([model.w], lr=lr, **options)
    return model, optimizer, schedule(optimizer) if schedule else None


def stepping(model, optimizer, scheduler=None, count=20, at=lambda step: None, scaler=None, lost=0):
    """A training step of one's own, which draws random numbers and moves its scheduler on."""
    given = enumerate([*batches(lost), *batches(count)])

    def step():
        number, batch = next(given)
        optimizer.zero_grad()
        random.random(), torch.rand(2)
        at(number)
        loss = model(**batch)["loss"]
        (scaler.scale(loss) if scaler else loss).backward()
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        if scheduler:
            scheduler.step()

    return step


def everything(model, optimizer, scheduler=None):
    hooks = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    return copy.deepcopy(
        [
            dict(model.state_dict()),
            optimizer.state_dict(),
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [m.training for m in model.modules()],
            scheduler.state_dict() if scheduler else None,
            random.getstate(),
            torch.get_rng_state(),
            hooks,
            attached(optimizer),
        ]
    )


@pytest.mark.parametrize("curvature", [1e-2, 0.7, 30.0, 1e4])
def test_it_finds_the_rate_that_a_parabola_is_crossed_at_in_one_step(curvature):
    """c is −1 below 1 / curvature and 1 above it: the rise ends within UP, a trim crosses by e at most."""
    found = []
    for given in (1e-9, 1e-3, 50.0):
        model, optimizer, _ = bowl(given, curvature=curvature)
        finding = find_learning_rate(model, optimizer, batches(noise=0.0))
        assert finding.lr_before == given and finding.scale == finding.lr / given
        assert finding.lr == finding.rates[-1] and len(finding.rates) == len(finding.alignments) == 20
        assert not finding.rising and finding.seconds > 0
        found.append(finding.lr)
    assert 1 / UP <= found[0] * curvature < math.e
    assert found == pytest.approx([found[0]] * 3, rel=1e-3)


def test_it_takes_the_steps_that_auto_takes():
    model, optimizer, _ = bowl(kind=torch.optim.Adam)
    finding = find_learning_rate(model, optimizer, batches(30), steps=30)
    config = FastForwardConfig(learning_rate="auto", interval=None)
    with FastForward(model, optimizer, config=config) as ff:
        step, cosines, rates = stepping(model, optimizer, count=30), [], []
        for _ in range(30):
            step()
            cosines.append(ff.alignment)
            rates.append(ff.learning_rate)
    assert finding.rates == pytest.approx(rates, rel=1e-9) and finding.alignments == cosines
    assert cosines[0] is None and rates[:3] == pytest.approx([START, UP * START, UP * UP * START])


def raising(error, at):
    def raise_at(number):
        if number == at:
            raise error

    return raise_at


@pytest.mark.parametrize("at", [None, raising(KeyboardInterrupt, 7), raising(OSError("no disk"), 13)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("warm", [0, 3])
def test_the_run_is_left_as_it_was_bit_for_bit(kind, warm, at):
    model, optimizer, scheduler = bowl(kind=kind, model=Counted, schedule=shaped(lambda k: 1 / (1 + k)))
    step = stepping(model, optimizer, scheduler)
    for _ in range(warm):
        step()
    model.drop.eval()
    gradient, count, before = model.w.grad, model.count, everything(model, optimizer, scheduler)
    if at is None:
        find_learning_rate(model, optimizer, batches(), schedulers=scheduler)
        assert same(before, everything(model, optimizer, scheduler))
        find_learning_rate(model, optimizer, stepping(model, optimizer, scheduler), schedulers=scheduler)
    else:
        own = stepping(model, optimizer, scheduler, at=at)
        with pytest.raises((KeyboardInterrupt, OSError)):
            find_learning_rate(model, optimizer, own, schedulers=scheduler)
    assert same(before, everything(model, optimizer, scheduler))
    assert model.w.grad is gradient and model.count is count


def test_a_warm_up_that_has_not_begun_is_passed_over():
    model, optimizer, scheduler = bowl(0.01, schedule=shaped(lambda k: min(1.0, k / 8)))
    assert optimizer.param_groups[0]["lr"] == 0.0
    finding = find_learning_rate(model, optimizer, batches(), schedulers=scheduler)
    plain, alone, _ = bowl(0.01)
    assert finding.lr == pytest.approx(find_learning_rate(plain, alone, batches()).lr)
    assert finding.lr_before == 0.01
    finding.apply(optimizer, scheduler)
    assert scheduler.base_lrs == [pytest.approx(finding.lr)]
    optimizer.step(), scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(finding.lr / 8)


def test_a_warm_up_inside_a_step_of_ones_own_does_not_multiply_what_is_found():
    """Its 20th step has a third of the base rate, which alignment has driven up to three times the best."""
    model, optimizer, scheduler = bowl(schedule=shaped(lambda k: (k + 1) / 60))
    step = stepping(model, optimizer, scheduler)
    finding = find_learning_rate(model, optimizer, step, schedulers=scheduler)
    assert 0.3 < finding.lr < 1.7 and finding.lr_before == 1e-3


def test_steps_that_loss_scaling_leaves_out_do_not_count():
    found = []
    for scale, lost in ((2.0**4, 0), (2.0**127, 1)):
        model, optimizer, _ = bowl(kind=torch.optim.Adam)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-123)
        step = stepping(model, optimizer, scaler=scaler, lost=lost)
        found.append(find_learning_rate(model, optimizer, step))
    assert found[0].rates == found[1].rates and len(found[0].rates) == 20


def test_groups_keep_their_ratio_and_rates_of_0_are_passed_over():
    model = nn.Linear(3, 2)
    frozen = nn.Parameter(torch.zeros(1))
    groups = [{"params": [frozen], "lr": 0.0}, {"params": [model.weight], "lr": 1e-3}]
    optimizer = torch.optim.SGD([*groups, {"params": [model.bias], "lr": 16e-3}])

    def step():
        descend(optimizer, (model(torch.randn(8, 3)) - torch.randn(8, 2)).square().mean())

    torch.manual_seed(0)
    finding = find_learning_rate(model, optimizer, step)
    finding.apply(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert finding.lr_before == 1e-3 and rates == pytest.approx([0.0, finding.lr, 16 * finding.lr])


def test_a_tensor_that_groups_share_as_their_rate_is_multiplied_once():
    model, shared = nn.Linear(3, 2), torch.tensor(1e-3)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    optimizer = torch.optim.AdamW(groups, lr=shared, capturable=False, foreach=False)
    Finding(lr=4e-3, lr_before=1e-3).apply(optimizer)
    assert all(group["lr"] is shared for group in optimizer.param_groups)
    assert float(shared) == pytest.approx(4e-3)


def test_modules_that_are_in_eval_while_the_model_trains_stay_so():
    model, optimizer, _ = bowl()
    flags = set()
    model.norm.register_forward_hook(lambda norm, *_: flags.add((model.training, norm.training)))
    model.norm.eval()
    find_learning_rate(model, optimizer, batches())
    assert flags == {(True, False)}
    model.eval()
    find_learning_rate(model, optimizer, batches())
    assert flags == {(True, False), (True, True)} and not model.training


def test_large_buffers_are_not_copied_but_watched(monkeypatch):
    monkeypatch.setattr("ffkernels.engine.run_state.LARGE", 3)
    model, optimizer, _ = bowl()
    with pytest.raises(RuntimeError, match=r"wrote 'norm.running_mean'"):
        find_learning_rate(model, optimizer, batches())
    assert torch.equal(model.w, torch.zeros(4)) and model.norm.num_batches_tracked == 0


def test_a_rate_that_still_rises_is_told_of():
    model, optimizer, _ = bowl()
    with pytest.warns(FFKernelsNotice, match=r"after 5 steps the learning rate still rises: .*steps=10"):
        finding = find_learning_rate(model, optimizer, batches(5), steps=5)
    assert finding.rising and finding.lr == pytest.approx(UP**4 * START)


class Signs(torch.optim.SGD):
    """Steps of a length of its own."""

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(0.01 * p.grad.sign())


class Silent(Bowl):
    def forward(self, noise):
        return {"logits": noise}


REFUSED = {
    "model": (TypeError, r"torch\.nn\.Module", dict(model=3)),
    "steps": (ValueError, "steps=1: must be an integer of at least 2", dict(steps=1)),
    "few": (TypeError, "this list gave 'nothing more'", dict(batches=batches(19))),
    "one": (TypeError, "this dict gave 'noise'", dict(batches=batches(1)[0])),
    "number": (TypeError, "this int gave 'nothing more'", dict(batches=3)),
    "idle": (ValueError, r"0 of 20 steps called step\(\)", dict(batches=lambda: None)),
    "silent": (ValueError, r"Silent returned no loss for a batch with \['noise'\]", dict(kind=Silent)),
    "scheduler": (TypeError, "scheduler is a int", dict(schedulers=3)),
    "several": (ValueError, "LBFGS evaluates the loss several times", dict(make=torch.optim.LBFGS)),
    "own way": (ValueError, "Rprop's steps are as long as lr at the first", dict(make=torch.optim.Rprop)),
    "own length": (
        ValueError,
        "'auto': Signs's update does not scale with its learning rate",
        dict(make=Signs),
    ),
    "zero": (ValueError, "largest base learning rate is 0", dict(lr=0.0)),
}


@pytest.mark.parametrize(("error", "message", "given"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(error, message, given):
    given = dict(kind=Bowl, make=torch.optim.SGD, lr=0.1, batches=batches()) | given
    model = given.pop("kind")()
    optimizer = given.pop("make")([model.w], lr=given.pop("lr"))
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        find_learning_rate(given.pop("model", model), optimizer, given.pop("batches"), **given)
    assert same(before, everything(model, optimizer))


def test_what_is_refused_of_an_optimizer_that_others_sit_on():
    (model, optimizer, scheduler), (*_, other) = (bowl(schedule=shaped(lambda k: 1.0)) for _ in range(2))
    with pytest.raises(ValueError, match="another optimizer"):
        find_learning_rate(model, optimizer, batches(), schedulers=other)
    for refused in (
        lambda: find_learning_rate(model, optimizer, batches()),
        lambda: Finding(1.0, 1.0).apply(optimizer),
    ):
        with pytest.raises(RuntimeError, match="schedulers=scheduler"):
            refused()
    config = FastForwardConfig(learning_rate="auto", interval=None)
    with FastForward(model, optimizer, config=config, scheduler=scheduler):
        with pytest.raises(RuntimeError, match="already carries a FastForward"):
            find_learning_rate(model, optimizer, batches(), schedulers=scheduler)
        assert attached(optimizer) is not None


def test_gradients_that_are_zero_give_no_rate():
    model, optimizer, _ = bowl(curvature=0.0)
    with pytest.raises(ValueError, match=r"20 of 20 steps .* no gradient met an update"):
        find_learning_rate(model, optimizer, batches())


SHAPES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(o, 15)], [5]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.5, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 20)]
    ),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=21),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=5, cycle_momentum=False),
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_what_is_found_is_set_in_schedulers_and_through_wrappers(make):
    class Wrapper:
        def __init__(self, inner, name="optimizer"):
            setattr(self, name, inner)

    curves = []
    for scaled in (False, True):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler, rates = make(optimizer), []
        for step in range(20):
            optimizer.step(), scheduler.step()
            if scaled and step == 2:
                Finding(lr=2.5, lr_before=0.1).apply(Wrapper(optimizer), [scheduler, scheduler])
            rates.append(optimizer.param_groups[0]["lr"])
        curves.append(rates)
    assert [25 * lr for lr in curves[0][2:]] == pytest.approx(curves[1][2:], rel=1e-9)


def test_the_limits_of_a_schedule_that_reacts_to_losses_stay():
    GreedyLR = pytest.importorskip("transformers.optimization").GreedyLR
    _, optimizer, _ = bowl(0.1)
    scheduler = GreedyLR(optimizer, min_lr=1e-4, max_lr=2.0)
    Finding(lr=0.5, lr_before=0.1).apply(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert scheduler.max_lrs == [2.0] and scheduler.min_lrs == [1e-4]
    assert ffkernels.find_learning_rate is find_learning_rate


@pytest.mark.slow
def test_on_the_embedded_model_what_is_found_trains_as_the_tuned_rate():
    """60 steps of batch 16, for which 1e-2 is the best rate of Adam's sweeps."""
    from ffkernels.training.config import TrainConfig
    from ffkernels.training.session import open_session

    def session(lr):
        settings = dict(batch_size=16, steps=60, warmup_steps=0, test_examples=200, threads=1, seed=10)
        return open_session(TrainConfig(lr=lr, **settings))

    def loss(lr):
        with session(lr) as run:
            for step in range(60):
                run.step(step)
            return run.test_loss()

    found = []
    for given in (1e-6, 1.0):
        with session(given) as run:
            batches = (run.load(step).micro_batches[0] for step in range(20))
            found.append(find_learning_rate(run.model, run.optimizer, batches).lr)
    assert found[0] == pytest.approx(found[1], rel=1e-2)
    assert loss(found[0]) < 1.03 * loss(1e-2), found
