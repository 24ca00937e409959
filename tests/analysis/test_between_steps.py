from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ffkernels.analysis import between_steps
from ffkernels.analysis.between_steps import (
    cosine,
    cosines,
    flat,
    flat_gradient,
    gradients_of,
    inner_products,
    waiting_stages,
)
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import open_session


def test_flat_copies_in_order():
    tensors = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, torch.tensor(5.0, dtype=torch.bfloat16)]
    vector = flat(tensors)
    assert vector.tolist() == [1.0, 3.0, 2.0, 4.0, 5.0] and vector.dtype == torch.float32
    vector.zero_()
    assert tensors[0][0, 0] == 1.0


def test_a_weight_without_gradient_counts_as_zero():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    (2.0 * weights[1]).sum().backward()
    assert flat_gradient(weights).tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("slice_", [7, 1 << 20])
def test_cosines_are_torchs_in_float64(monkeypatch, slice_):
    monkeypatch.setattr(between_steps, "_SLICE", slice_)
    torch.manual_seed(0)
    rows = torch.randn(5, 101) + 0.5
    expected = F.cosine_similarity(rows.double()[:, None], rows.double()[None], dim=-1)
    torch.testing.assert_close(cosines(rows), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(inner_products(rows, rows[:2]), rows.double() @ rows[:2].double().T)
    assert cosine(rows[0], rows[3]) == pytest.approx(float(expected[0, 3]), abs=1e-14)


def test_products_are_accumulated_in_float64():
    ones = torch.ones(1, 100_000)
    ones[0, 0] = 2.0**26  # float32 would lose every 1 that is added to its square
    assert float(inner_products(ones, ones)) == 2.0**52 + 99_999


def test_a_zero_vector_has_no_cosine():
    assert torch.isnan(cosines(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))[0]).all()


def test_the_gradient_is_a_training_steps_and_leaves_no_trace(small):
    config = TrainConfig(**{**small, "dropout": 0.5, "micro_batch_size": 3})
    with open_session(config) as session:
        random = torch.get_rng_state()
        gradient, again = gradients_of(session, [session.load(0)] * 2)
        assert not torch.equal(gradient, again)  # another draw of dropout
        assert torch.equal(torch.get_rng_state(), random)
        assert all(w.grad is None for w in session.trainable)
        session.backward(session.load(0))
        assert torch.equal(flat_gradient(session.trainable), gradient)


def test_waiting_stages_make_the_same_run(small):
    stages = FastForwardConfig(interval=3, warmup=1, max_tau=20)
    config = TrainConfig(**small, fast_forward=stages)
    with open_session(config) as session:
        for step in range(8):
            session.step(step)
        expected, taus = flat(session.trainable), [stage.tau for stage in session.ff.stages]
    with open_session(config, attach=waiting_stages) as session:
        for step in range(8):
            session.step(step)
            before = flat(session.trainable)
            due = session.ff.stage_due
            assert due == (step in (3, 6))
            stage = session.ff.run_due_stage()
            assert (stage is not None) == due and not session.ff.stage_due
            assert torch.equal(before, flat(session.trainable)) == (stage is None or stage.tau == 0)
        assert torch.equal(flat(session.trainable), expected)
        assert [stage.tau for stage in session.ff.stages] == taus and max(taus) > 0


def test_without_fast_forward_no_stage_waits(small):
    with open_session(TrainConfig(**small), attach=waiting_stages) as session:
        assert session.ff is None
