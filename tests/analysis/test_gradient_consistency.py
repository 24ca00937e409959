import itertools
import json
from dataclasses import replace
from functools import partial
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F

from ffkernels.analysis.gradient_consistency import agreement, draw, gradient_consistency, what_was_seen
from ffkernels.analysis.rank_correlation import partial_spearman, spearman
from ffkernels.training.trainer import train


def test_agreement_is_the_mean_over_pairs():
    torch.manual_seed(0)
    gradients, update = torch.randn(4, 31) + 0.3, torch.randn(31)
    found = agreement(gradients, update)
    g = gradients.double()
    pairs = [float(F.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(g, 2)]
    assert found["consistency"] == pytest.approx(fmean(pairs), abs=1e-14)
    assert found["lowest"] == pytest.approx(min(pairs)) and found["highest"] == pytest.approx(max(pairs))
    assert found["norm"] == pytest.approx(float(g.mean(0).norm()))
    descent = F.cosine_similarity(-g.mean(0), update.double(), dim=0)
    assert found["descent"] == pytest.approx(float(descent), abs=1e-14)


def test_going_straight_to_the_minimum_is_descent_one_and_zero_when_there():
    """Batches of a quadratic: L_i = ½‖W − c_i‖², gradient W − c_i, the mean's minimum at the mean of c."""
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 3.0]])
    weights, update = torch.tensor([4.0, 1.0]), torch.tensor([-1.0, 0.0])
    assert agreement(weights - centres, update)["descent"] == pytest.approx(1.0)
    lowest_along_it = torch.tensor([0.0, -2.0])
    assert agreement(lowest_along_it - centres, update)["descent"] == pytest.approx(0.0, abs=1e-7)
    assert agreement(weights - centres, torch.zeros(2))["descent"] is None
    assert agreement(weights - centres)["descent"] is None


CONFIG = dict(stages=dict(interval=3, max_tau=30), steps=9)
ANALYSIS = partial(gradient_consistency, batches=4)


def test_measuring_does_not_change_the_run(config, data, tmp_path):
    plain = train(replace(config, out=str(tmp_path)), save=False)
    assert [(s["optimizer_step"], s["tau"]) for s in data["stages"]] == [
        (stage.optimizer_step, stage.tau) for stage in plain.stages
    ]
    assert [s["loss_after"] for s in data["stages"]] == [stage.loss_after for stage in plain.stages]
    assert data["stages"][0]["tau"] > 0


def test_every_stage_has_both_points(data):
    assert [s["optimizer_step"] for s in data["stages"]] == [3, 6, 9]
    assert data["start"]["descent"] is None and data["start"]["consistency"] > 0
    for stage in data["stages"]:
        for point in (stage["before"], stage["after"]):
            assert -1 <= point["lowest"] <= point["consistency"] <= point["highest"] <= 1
            assert point["norm"] > 0
        # A stage with a step ends where its direction stops going down, on its own examples.
        assert stage["before"]["descent"] > 0
        assert stage["tau"] == 0 or stage["after"]["descent"] < stage["before"]["descent"]
    taus = [s["tau"] for s in data["stages"]]
    before = [s["before"]["consistency"] for s in data["stages"]]
    of_both = partial_spearman(before, taus, [0, 1, 2])
    assert data["tau_and_consistency"] == {**spearman(before, taus), "partial": of_both}
    assert data["tau_and_stage"] == spearman([0, 1, 2], taus)
    assert data["batches"] == 4 and data["batch_size"] == 8
    json.dumps(data, allow_nan=False)


def test_the_batches_are_disjoint_and_the_same_each_time(config, data, monkeypatch):
    from ffkernels.training.session import Session

    seen = []
    batch = Session.batch
    monkeypatch.setattr(
        Session, "batch", lambda self, examples: seen.append(examples) or batch(self, examples)
    )
    again = gradient_consistency(replace(config, steps=1), batches=4)
    compared = [tuple(e["input_ids"]) for examples in seen[:4] for e in examples]
    assert len(compared) == len(set(compared)) == 32
    assert again["start"] == data["start"] and again["stages"] == []


def _invented(befores, taus):
    point = {"consistency": 0.5, "lowest": 0.4, "highest": 0.6, "norm": 1.0, "descent": 0.1}
    stages = [
        {"optimizer_step": 6 * i, "tau": t, "before": {**point, "consistency": b}, "after": point}
        for i, (b, t) in enumerate(zip(befores, taus, strict=True), 1)
    ]
    numbers = range(len(taus))
    found = {
        "tau_and_consistency": {
            **spearman(befores, taus),
            "partial": partial_spearman(befores, taus, numbers),
        },
        "tau_and_stage": spearman(numbers, taus),
    }
    return {"start": {**point, "descent": None}, "stages": stages, **found}


def test_what_was_seen_follows_the_data():
    up = what_was_seen(_invented([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [60, 50, 40, 30, 20, 10]))
    assert "agree less than at first: their mean cosine is 0.90" in up[0]
    assert up[1].startswith("τ* rises with that consistency: Spearman's ρ = 1.00 over 6 stages")
    assert "held fixed: nothing to tell it by." in up[1]  # both only drift
    apart = what_was_seen(_invented([0.9, 0.8, 0.5, 0.7, 0.6, 0.4], [60, 50, 10, 40, 30, 20]))
    left = partial_spearman([0.9, 0.8, 0.5, 0.7, 0.6, 0.4], [60, 50, 10, 40, 30, 20], range(6))
    assert f"held fixed: {left:.2f}." in apart[1] and 0.5 < left < 1
    down = what_was_seen(_invented([0.4, 0.5, 0.6, 0.7, 0.8, 0.9], [60, 50, 40, 30, 20, 10]))
    assert "agree more than at first" in down[0] and down[1].startswith("τ* falls with")
    few = what_was_seen(_invented([0.4, 0.41], [3, 2]))
    assert "agree as much as at first" in few[0] and "2 stages are too few" in few[1]
    assert "No relation" in what_was_seen(_invented([0.1, 0.5, 0.2, 0.4], [1, 2, 3, 4]))[1]
    assert "No Fast Forward stage was due" in what_was_seen(_invented([], []))[0]


def test_the_picture(data, drawn):
    upper, _, below = drawn(draw, data)[:3]
    before, after = (line.get_ydata() for line in upper.lines[-2:])
    assert list(before) == [stage["before"]["consistency"] for stage in data["stages"]]
    assert list(after) == [stage["after"]["consistency"] for stage in data["stages"]]
    assert below.collections[0].get_offsets()[:, 1].tolist() == [stage["tau"] for stage in data["stages"]]
    assert len(drawn(draw, _invented([], []))) == 2
