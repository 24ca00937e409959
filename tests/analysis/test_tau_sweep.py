import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from ffkernels import FastForward, ops
from ffkernels.analysis.tau_sweep import draw, replay, shape, sweep_table, tau_sweep
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.session import open_session

CONFIG = dict()
ANALYSIS = partial(tau_sweep, at=(2, 4), taus=12)


def test_the_sweep_is_the_losses_by_hand(config, data):
    assert data["taus"] == list(range(13))
    assert [sweep["optimizer_step"] for sweep in data["sweeps"]] == [2, 4]
    with open_session(replace(config, steps=4)) as session:
        for step in range(4):
            before = [p.detach().clone() for p in session.trainable]
            loss = session.step(step)
            if step + 1 not in (2, 4):
                continue
            sweep = data["sweeps"][step // 2]
            assert sweep["train_loss"] == loss and sweep["lr"] == session.learning_rate(step)
            after = [p.detach().clone() for p in session.trainable]
            for tau in (0, 1, 5, 12):
                with torch.no_grad():
                    for p, a, b in zip(session.trainable, after, before, strict=True):
                        p.copy_(a + tau * (a - b))
                # Bit for bit: one multiplication and one addition per element, as ops.step_ has them.
                assert sweep["validation"][tau] == float(session.validation())
                assert sweep["test"][tau] == session.test_loss()
            with torch.no_grad():
                for p, a in zip(session.trainable, after, strict=True):
                    p.copy_(a)


def test_stages_run_after_the_sweep_and_see_the_same(config):
    staged = replace(config, fast_forward=FastForwardConfig(interval=2, search="linear", max_tau=12))
    swept = tau_sweep(staged, at=(2, 4), taus=12)["sweeps"]
    with open_session(replace(staged, steps=4)) as session:
        for step in range(4):
            session.step(step)
        stages = session.ff.stages
    for sweep, stage in zip(swept, stages, strict=True):
        assert stage.losses[0][1] == sweep["validation"][0]
        assert sweep["of_validation"]["linear"]["tau"] == stage.tau


class Bowl(torch.nn.Module):
    """f(w) = Σ cᵢ·(wᵢ − 1)² over two tensors, one of them a float32 matrix of odd size."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
        self.b = torch.nn.Parameter(torch.randn(7, generator=generator))

    def loss(self) -> torch.Tensor:
        return 0.5 * ((self.a - 1) ** 2).sum() + 2.0 * ((self.b - 1) ** 2).sum()


def test_a_quadratic_bowl_has_its_minimum_where_calculus_says():
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    table = ops.TensorTable(list(model.parameters()))
    ops.checkpoint_(table)
    old = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    model.loss().backward()
    optimizer.step()
    ops.delta_(table)
    new = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    gradients = [p.grad.clone() for p in model.parameters()]
    kept = [p.detach().clone() for p in model.parameters()]

    losses = [loss for (loss,) in sweep_table(table, range(121), (lambda: model.loss().detach(),))]

    c = torch.cat([torch.full((15,), 1.0), torch.full((7,), 4.0)]).double()
    d = new - old
    best = float((c * d * (1 - new)).sum() / (c * d * d).sum())
    assert 3 < best < 100
    assert losses.index(min(losses)) == round(best)
    curvature = float((c * d * d).sum())
    second = [x - 2 * y + z for x, y, z in zip(losses, losses[1:], losses[2:], strict=False)]
    assert sum(second) / len(second) == pytest.approx(curvature, rel=1e-3)
    assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_weights_return_also_when_a_loss_raises():
    model = Bowl()
    table = ops.TensorTable(list(model.parameters()))
    ops.checkpoint_(table)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    ops.delta_(table)
    kept = [p.detach().clone() for p in model.parameters()]
    calls = []

    def fails():
        calls.append(model.a.detach().clone())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        sweep_table(table, range(9), (fails,))
    assert not torch.equal(calls[2], kept[0])
    assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))


def test_training_goes_on_as_if_nothing_had_been_looked_at(config, data):
    """The sweep at step 4 comes after the one at step 2: alone it must be the same."""
    assert tau_sweep(config, at=(4,), taus=12)["sweeps"][0] == data["sweeps"][1]


def test_the_picture(data, drawn):
    panels = drawn(draw, data)
    for axes, measured in zip(panels, ("validation", "test"), strict=True):
        curves = [line for line in axes.lines if len(line.get_xdata()) == 13]
        assert [list(line.get_ydata()) for line in curves] == [s[measured] for s in data["sweeps"]]
        points = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert len(points) == 3 * 2  # lowest and two searches, of two sweeps
        lowest = points[0]
        shape = data["sweeps"][0][f"of_{measured}"]
        assert (lowest.get_xdata()[0], lowest.get_ydata()[0]) == (
            shape["argmin"],
            data["sweeps"][0][measured][shape["argmin"]],
        )


def test_the_optimizer_is_free_afterwards(config):
    tau_sweep(replace(config, fast_forward=FastForwardConfig(interval=2)), at=(2,), taus=2)
    with open_session(config) as session:
        FastForward(session.model, session.optimizer, session.validation).detach()


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
    found = shape(losses)
    assert found["turning_points"] == turns and found["unimodal"] is unimodal


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
    assert found["convex_share"] == 1.0  # one finite second difference


def test_what_is_no_curve_is_refused():
    with pytest.raises(ValueError, match="2 losses"):
        shape([1.0, 2.0])
    with pytest.raises(ValueError, match="tau 0 is not finite"):
        shape([math.nan, 1.0, 2.0])
