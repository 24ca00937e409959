import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from ffkernels.analysis.stage_taus import condition_number, draw, gradient_facts, stage_taus
from ffkernels.training.session import open_session

CONFIG = dict(stages=dict(interval=2, patience=None, max_tau=32), lr=3e-4, steps=8)
ANALYSIS = partial(stage_taus, seeds=(0, 5))


def test_condition_numbers_that_are_known():
    left, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())
    right, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double())
    values = torch.tensor([8.0, 4.0, 2.0, 0.5], dtype=torch.float64)
    matrix = left[:, :4] * values @ right
    assert condition_number(matrix) == pytest.approx(16.0)
    assert condition_number(matrix.T.float()) == pytest.approx(16.0, rel=1e-5)
    assert condition_number(1e-20 * matrix) == pytest.approx(16.0)
    values[3] = 1e-9  # rounding of float32, not a direction
    assert condition_number(left[:, :4] * values @ right) == pytest.approx(4.0)
    assert condition_number(torch.ones(3, 5)) == pytest.approx(1.0)
    for nothing in (torch.zeros(3, 5), torch.zeros(0, 5), torch.tensor([[math.inf, 1.0]])):
        assert math.isnan(condition_number(nothing))


def test_vectors_count_for_the_norm_and_not_for_the_condition():
    facts = gradient_facts(
        [
            torch.diag(torch.tensor([3.0, 1.0])),
            torch.tensor([2.0, 2.0]),
            None,
            torch.zeros(2, 2),
            5 * torch.eye(2),
        ]
    )
    assert facts["gradient_norm"] == pytest.approx(math.sqrt(9 + 1 + 8 + 50))
    assert facts["condition_number"] == 2.0 and facts["condition_largest"] == 3.0 and facts["matrices"] == 2


def test_every_stage_has_the_gradient_of_its_own_step(config, data):
    assert [(s["seed"], s["number"], s["optimizer_step"]) for s in data["stages"]] == [
        (seed, n, 2 * n) for seed in (0, 5) for n in (1, 2, 3, 4)
    ]
    with open_session(replace(config, seed=5)) as session:
        by_hand = []
        for step in range(session.steps):
            session.backward(session.load(step))
            gradients = [p.grad.clone() for p in session.trainable]
            session.update(step)
            if step % 2:
                singular = [torch.linalg.svdvals(g.double()) for g in gradients]
                by_hand.append(
                    (
                        torch.cat([g.flatten() for g in gradients]).double().norm().item(),
                        sorted(float(s[0] / s[-1]) for s in singular),
                    )
                )
        taus = [stage.tau for stage in session.ff.stages]
    recorded = data["stages"][4:]
    assert [s["tau"] for s in recorded] == taus and any(taus)
    for stage, (norm, conditions) in zip(recorded, by_hand, strict=True):
        assert stage["gradient_norm"] == pytest.approx(norm, rel=1e-9)
        assert stage["matrices"] == len(conditions)
        assert stage["condition_largest"] == pytest.approx(conditions[-1], rel=1e-6)
        middle = len(conditions) // 2
        assert stage["condition_number"] == pytest.approx((conditions[middle - 1] + conditions[middle]) / 2)


def test_correlations_are_over_all_stages(data):
    assert {key: value["n"] for key, value in data["correlations"].items()} == {
        "gradient_norm": 8,
        "condition_number": 8,
        "optimizer_step": 8,
    }
    assert all(-1 <= value["rho"] <= 1 for value in data["correlations"].values())
    assert "partial" not in data["correlations"]["optimizer_step"]


def test_looking_changes_nothing(config, data):
    with open_session(config) as session:
        for step in range(session.steps):
            session.step(step)
        assert [s.tau for s in session.ff.stages] == [s["tau"] for s in data["stages"][:4]]
        assert [s.loss_after for s in session.ff.stages] == [s["loss_after"] for s in data["stages"][:4]]


def test_the_picture(data, drawn):
    stages, norm, condition = drawn(draw, data)
    assert [list(line.get_xdata()) for line in stages.lines] == [[1, 2, 3, 4]] * 2
    for axes, quantity in ((norm, "gradient_norm"), (condition, "condition_number")):
        points = [(x, y) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)]
        assert points == [(s[quantity], s["tau"]) for s in data["stages"]]
        assert "n = 8" in axes.get_title(loc="left")


def test_a_stage_without_a_condition_is_drawn(data, drawn):
    stages = [dict(stage) for stage in data["stages"]]
    stages[0]["condition_number"] = None  # as JSON has it
    panels = drawn(draw, {**data, "stages": stages})
    assert sum(len(line.get_xdata()) for line in panels[2].lines) == 8
